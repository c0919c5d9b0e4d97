"""Spikes of a real-valued map for every window of it, drawn or compared with a level.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573), and its release, which draws without a gradient; the other two
codings are ours.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.errors import OptionError
from spikefit.layers.windows import Windows, cut, pieces, summed
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.packbits import pack, unpack

CODINGS: tuple[str, ...] = ("bernoulli_sg", "bernoulli_ste", "heaviside", "analog")


def encode(x_BHWC: Tensor, windows: Windows, coding: str, generator: torch.Generator | None = None) -> Tensor:
    """Spikes of every window of a map.

        bernoulli_sg, bernoulli_ste    s_p = 1 if x_p > U(0, 1) else 0, a number for every element of every window
        heaviside                      s_p = 1 if x_p > 1/2 else 0
        analog                         x_p itself
        backward                       ds/dx = 1 where 0 < x < 1, else 0; with bernoulli_sg 0 everywhere

    Args:
        x_BHWC: map [B, H, W, C].
        windows: places of the windows.
        coding: one of `CODINGS`.
        generator: of the random numbers, on the device of the map; None for torch's global one there.

    Returns:
        [P, B, h, w, C], dtype of the map.

    Raises:
        OptionError: a generator of another device.
    """
    if coding == "analog":
        return cut(x_BHWC, windows)
    if torch.compiler.is_compiling():
        return _plain(x_BHWC, windows, coding, generator)
    return _Code.apply(x_BHWC, windows, coding, generator)


def _plain(x: Tensor, windows: Windows, coding: str, generator: torch.Generator | None) -> Tensor:
    """`encode` for torch.compile, in operations that it knows."""
    spikes = _fired(x, windows, coding, generator).to(x.dtype)
    if coding == "bernoulli_sg":
        return spikes
    inside = x.where((x > 0) & (x < 1), 0)
    return spikes + pieces(inside - inside.detach(), windows)


def encode_packed(
    x_BHWC: Tensor, windows: Windows, coding: str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """As `encode`, but the spikes as (carrier, bits), for `decode`.

    Returns:
        carrier: a tensor without memory of its own (all strides 0) that ties them into the autograd graph.
        bits: [P, B, h, w, ceil(C / 8)] uint8.
    """
    return _CodePacked.apply(x_BHWC, windows, coding, generator)


def decode(carrier: Tensor, bits: Tensor) -> Tensor:
    """The spikes [P, B, h, w, C] of `encode_packed`."""
    return _Decode.apply(carrier, bits)


def _fired(x: Tensor, windows: Windows, coding: str, generator: torch.Generator | None) -> Tensor:
    """The spikes as bool."""
    seen = pieces(x, windows)
    if coding == "heaviside":
        return seen > 0.5
    if generator is not None and generator.device.type != x.device.type:
        raise OptionError(
            f"encode: expected a generator on {x.device.type}, where the map is, got one on {generator.device.type}; "
            f"make it with torch.Generator({x.device.type!r})."
        )
    dtype = compute_dtype(x.dtype)
    if generator is None:  # also where torch.compile makes symbols of sides
        return seen > torch.rand_like(seen, dtype=dtype)
    return seen > torch.rand(seen.shape, dtype=dtype, device=x.device, generator=generator)


def _remember(ctx, x: Tensor, windows: Windows, coding: str) -> None:
    ctx.windows, ctx.passes = windows, coding != "bernoulli_sg"
    if ctx.passes:
        # where the slope is 1: a bit an element
        ctx.channels = x.shape[-1]
        ctx.save_for_backward(pack(((x > 0) & (x < 1)), check=False))


def _to_map(ctx, g: Tensor | None) -> Tensor | None:
    if g is None or not ctx.passes:
        return None
    (inside,) = ctx.saved_tensors
    return summed(g, ctx.windows) * unpack(inside, ctx.channels, dtype=g.dtype)


class _Code(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, windows, coding, generator):
        spikes = _fired(x, windows, coding, generator).to(x.dtype)
        _remember(ctx, x, windows, coding)
        if not ctx.passes:
            ctx.mark_non_differentiable(spikes)
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return _to_map(ctx, g), None, None, None


class _CodePacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, windows, coding, generator):
        fired = _fired(x, windows, coding, generator)
        carrier, bits = x.new_zeros(()).expand(fired.shape), pack(fired, check=False)
        _remember(ctx, x, windows, coding)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        if not ctx.passes:
            ctx.mark_non_differentiable(carrier, bits)
        return carrier, bits

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _bits):
        return _to_map(ctx, g), None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, bits):
        return unpack(bits, carrier.shape[-1], dtype=carrier.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, None
