"""Weight operations over a sequence: convolutions and linear maps, always one time step per call.

The forward of a weight is the same whatever is trained or kept: step t reads [b, ...] rows of one time step. So a
sequence fed in one call, step by step, or recomputed piece by piece gives the same bits. The backward, which only has
to agree to rounding, runs on the folded batch [T * B, ...] in one call.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError
from spikefit.layers.applying import applier_now

Weight = nn.Conv1d | nn.Conv2d | nn.Linear


def apply_weight(module: Weight, x: Tensor, *, chunk: int | None = None) -> Tensor:
    """Apply a convolution or linear map to every step of a sequence.

        z_t = W * i_t + bias

    Args:
        module: nn.Conv1d, nn.Conv2d or nn.Linear (or the standardised forms of this file).
        x: [T, B, C, ...] for convolutions, [T, B, C] for linear maps.
        chunk: batch rows per call; None for all rows of a step.

    Returns:
        z: [T, B, C_out, ...]; 2-d convolutions return channels-last steps.

    Raises:
        ShapeError: another rank, number of channels or dtype than the module expects, or a side below its kernel.
    """
    check_input(module, x)
    applier = applier_now()
    if applier is not None:
        return applier.weigh(module, x, chunk)
    weight, bias = parameters_of(module, x.device.type)
    return apply_map(x, weight, bias, map_of(module), chunk)


def apply_map(x: Tensor, weight: Tensor, bias: Tensor | None, map_: "Map", chunk: int | None) -> Tensor:
    """`apply_weight` with the numbers given, as `parameters_of` returns them."""
    return _Stepwise.apply(x.to(weight.dtype) if autocasting(x.device.type) else x, weight, bias, map_, chunk)


class Map(NamedTuple):
    """A weight without its numbers: a linear map, or a convolution of given geometry.

    `thin` is the stride along each space axis that is applied to the input before the convolution sees it.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    thin: tuple[int, ...] = ()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows [N, C, ...] -> [N, C_out, ...]."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        convolve = F.conv2d if self.kind == "conv2d" else F.conv1d
        return convolve(_dense(self._thinned(x)), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def prepared(self, weight: Tensor) -> Tensor:
        """The weight in the memory order in which a convolution would copy it, call by call."""
        return _dense(weight) if self.kind != "linear" else weight

    def gradient(
        self, x: Tensor, g: Tensor, weight: Tensor, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias) of rows [N, C, ...] for g = dL/dz; those not wanted are None."""
        if self.kind == "linear":
            x_rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            dx = (g_rows @ weight).view(x.shape) if wants[0] else None
            return dx, g_rows.mT @ x_rows if wants[1] else None, g_rows.sum(0) if wants[2] else None
        thinned = self._thinned(x)
        dx, dw, db = torch.ops.aten.convolution_backward(
            _dense(g),
            _dense(thinned),
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            list(wants),
        )
        if wants[0] and self.thin:
            full = torch.zeros_like(x, dtype=dx.dtype)
            self._thinned(full).copy_(dx)
            dx = full
        return dx if wants[0] else None, dw if wants[1] else None, db if wants[2] else None

    def _thinned(self, x: Tensor) -> Tensor:
        return x[(..., *(slice(None, None, step) for step in self.thin))] if self.thin else x  # type: ignore[index]


def map_of(module: Weight) -> Map:
    """The map of a module."""
    if isinstance(module, nn.Linear):
        return Map("linear")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise OptionError(f"apply_weight: give {type(module).__name__} a numeric zero padding.")
    kind = "conv2d" if isinstance(module, nn.Conv2d) else "conv1d"
    stride: tuple[int, ...] = tuple(module.stride)
    thin: tuple[int, ...] = ()
    if set(module.kernel_size) == {1} and set(module.padding) == {0} and max(stride) > 1:
        # oneDNN writes out of bounds in the weight gradient of strided 1x1 convolutions (seen in torch 2.13 on CPU)
        stride, thin = (1,) * len(stride), stride
    return Map(kind, stride, tuple(module.padding), tuple(module.dilation), module.groups, thin)


def check_weight(module: nn.Module) -> None:
    """Raise OptionError unless the map and the numbers of `module` are all it does.

    A unit reads these and never calls the module, so a forward of its own, or a hook in front of it, would be left out.
    """
    known = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Linear.forward, Standardized.forward)
    if type(module).forward not in known:
        raise OptionError(
            f"SpikingUnit: expected nn.Conv1d, nn.Conv2d, nn.Linear or a standardised form of them as synapse, got "
            f"{type(module).__name__} with a forward of its own, which a unit does not call; put that into a block."
        )
    if module._forward_pre_hooks:
        raise OptionError(
            f"SpikingUnit: the synapse {type(module).__name__} has a hook in front of its forward, which a unit does "
            "not call; change weights with torch.nn.utils.parametrizations."
        )


def parameters_of(module: Weight, device: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) as the map takes them: standardised, and cast where autocast asks for it.

    `weight`, if given, is the standardised weight, which is then not computed again.
    """
    if weight is None:
        weight = module.standardized() if isinstance(module, Standardized) else module.weight
    bias = module.bias
    if autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias


def autocasting(device: str) -> bool:
    """Whether weights run in the dtype of autocast now."""
    return torch.is_autocast_enabled(device)


def check_input(module: Weight, x: Tensor, *, who: str | None = None, over_time: bool = False) -> None:
    """Raise ShapeError unless `x` is a sequence that the module takes.

    Args:
        module: the weight.
        x: the sequence; with `over_time` the convolution reaches over its steps, [T, B, C].
        who: name in the message; that of the module if None.
    """
    who = type(module).__name__ if who is None else who
    dense, space = isinstance(module, nn.Linear), SPACE[2 if isinstance(module, nn.Conv2d) else 1]
    if dense or over_time:
        space = ()
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    if x.ndim != 3 + len(space) or x.shape[2] != channels:
        wanted = ", ".join(("T", "B", str(channels), *space))
        hint = _shape_hint(x, channels, len(space), "features" if dense else "channels", over_time)
        raise ShapeError(f"{who}: expected x as [{wanted}], got {tuple(x.shape)}. {hint}")
    check_floating(who, x)
    if x.dtype != module.weight.dtype and not autocasting(x.device.type):
        raise ShapeError(
            f"{who}: expected x in {module.weight.dtype}, the dtype of its weight, got {x.dtype}. "
            f"Call x.to({module.weight.dtype}), or convert the model: model.to({x.dtype})."
        )
    if not isinstance(module, nn.Linear):
        _check_reach(who, map_of(module), module.kernel_size, tuple(x.shape[3:]) if space else (x.shape[0],), over_time)


# names of the space axes, by their number
SPACE: dict[int, tuple[str, ...]] = {1: ("L",), 2: ("H", "W")}


def check_floating(who: str, x: Tensor) -> None:
    """Raise ShapeError unless `x` holds real floating point numbers."""
    if not x.is_floating_point():
        hint = "take x.real or x.abs()" if x.is_complex() else "call x.float(), and scale images to [0, 1]"
        raise ShapeError(f"{who}: expected floating point input, got {x.dtype}; {hint}.")


def _shape_hint(x: Tensor, channels: int, space: int, what: str, over_time: bool) -> str:
    """What to do about a sequence of another rank or number of channels."""
    if x.ndim == 2 and over_time:
        return "A single sequence needs a batch axis: x.unsqueeze(1)."
    if x.ndim == 2 + space:
        return "Time comes first: encoding.repeat(x, timesteps=T) adds it to a static input."
    if x.ndim == 3 + space:
        if space and x.shape[-1] == channels:
            return "Channels come third: x.movedim(-1, 2)."
        return f"Give it {channels} {what}, or create it with in_{what}={x.shape[2]}."
    if space == 0 and x.ndim > 3:
        return "Flatten() in front of it makes one axis of features, GlobalAveragePool() the mean over space."
    return "Time comes first, then the batch, then the channels."


def _check_reach(who: str, map_: Map, kernel: tuple[int, ...], sides: tuple[int, ...], over_time: bool) -> None:
    """Raise ShapeError if the kernel is larger than the padded input."""
    smallest = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(map_.dilation, kernel, map_.padding, strict=True)]
    if any(side < least for side, least in zip(sides, smallest, strict=True)):
        wanted, got = _times(max(1, least) for least in smallest), _times(sides)
        wanted, got = (f"{wanted} time steps", f"T = {got}") if over_time else (f"a side of {wanted}", got)
        raise ShapeError(
            f"{who}: expected at least {wanted} for a kernel of {_times(kernel)}, dilation {_times(map_.dilation)} and "
            f"padding {_times(map_.padding)}, got {got}. Give it a larger input, more padding or a smaller kernel."
        )


def _times(sides: Iterable[int]) -> str:
    return "x".join(map(str, sides))


class _Stepwise(torch.autograd.Function):
    """Forward one step (and `chunk` rows) at a time, backward on the folded batch; keeps the input and the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, map_, chunk):
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.has_bias = map_, bias is not None
        return stepwise(x.__getitem__, x.shape[0], map_, weight, bias, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        wants = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
        dx, dw, db = ctx.map.gradient(x.flatten(0, 1), g.flatten(0, 1), weight, wants)
        return None if dx is None else dx.unflatten(0, x.shape[:2]), dw, db, None, None


def stepwise(
    step: Callable[[int], Tensor], timesteps: int, map_: Map, weight: Tensor, bias: Tensor | None, chunk: int | None
) -> Tensor:
    """z [T, B, ...] of the inputs step(t) [B, ...], `chunk` rows of one step per call: the one forward of a weight."""
    z, weight = None, map_.prepared(weight)
    for t in range(timesteps):
        x = step(t)
        rows = x.shape[0] if chunk is None else min(chunk, x.shape[0])
        for b in range(0, x.shape[0], rows):
            piece = map_(x[b : b + rows], weight, bias)
            if z is None:
                if piece.shape[0] == timesteps * x.shape[0]:
                    return piece.unflatten(0, (timesteps, -1))
                z = _empty(piece, timesteps, x.shape[0])
            z[t, b : b + rows] = piece
            del piece  # before the next one is made
    assert z is not None, "a sequence has at least one step"
    return z


def _dense(x: Tensor) -> Tensor:
    """Images in channels-last, where float32 convolutions are faster; anything else contiguous."""
    return x.contiguous(memory_format=_order(x.ndim))


def _order(ndim: int) -> torch.memory_format:
    return torch.channels_last if ndim == 4 else torch.contiguous_format


def _empty(piece: Tensor, T: int, B: int) -> Tensor:
    """[T, B, ...] in the memory order of `piece`."""
    shape = (T * B, *piece.shape[1:])
    made = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=_order(piece.ndim))
    return made.unflatten(0, (T, B))


def zero_membrane(batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype) -> Tensor:
    """Zeros [B, ...] in the memory order of currents; the first step would copy another one."""
    zeros = torch.empty((batch_size, *shape), device=device, dtype=dtype, memory_format=_order(1 + len(shape)))
    return zeros.zero_()


class Standardized(nn.Module):
    """Weight of mean 0 and variance 1 / fan_in per output channel, times a learnable gain.

        W' = gain (W - mean(W)) / sqrt(fan_in var(W) + eps)

    Base of the convolutions and linear maps used with `norm="ws"`, where no statistics of activations exist.

    Source: Qiao et al. 2019, arXiv:1903.10520; scaling of Brock et al. 2021, arXiv:2101.08692.
    """

    weight: Tensor

    def __init__(self, *args, eps: float = 1e-4, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(len(self.weight)))

    def standardized(self) -> Tensor:
        """W', shape of `weight`."""
        # as an input of its own: where a weight is used more than once, the gradient of each use is added up first
        return _standardize(self.weight.view_as(self.weight), self.gain, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [N, C, ...] -> [N, C_out, ...], as torch's own layer with the weight W'."""
        return map_of(self)(x, self.standardized(), self.bias)  # type: ignore[arg-type]


class StandardizedConv1d(Standardized, nn.Conv1d):
    """nn.Conv1d with a standardised weight."""


class StandardizedConv2d(Standardized, nn.Conv2d):
    """nn.Conv2d with a standardised weight."""


class StandardizedLinear(Standardized, nn.Linear):
    """nn.Linear with a standardised weight."""


def _standardize(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    axes = tuple(range(1, weight.ndim))
    fan_in = math.prod(weight.shape[1:])
    var, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
    scale = gain.view(-1, *[1] * len(axes)) * torch.rsqrt(fan_in * var + eps)
    return (weight - mean) * scale
