"""Spikes on their way from one unit to the next: one bit each, with the pool behind them still to be applied."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.ops.fire import Grid
from spikefit.ops.packbits import unpack


@dataclass(frozen=True)
class PackedSpikes:
    """A sequence of spikes [T, B, C, ...] in bits; what a layer hands to the next instead of a dense tensor.

    Attributes:
        carrier: a tensor of the shape the sequence stands for, without memory of its own (all strides 0); it ties the
            sequence into the autograd graph, its values mean nothing.
        bits: [T, B * pixels, ceil(C / 8)] uint8, channels last, before the pool.
        channels: C.
        space: (H, W), (L,) or () before the pool.
        pool: "", "max" or "avg", applied where the spikes are read.
        flat: whether all axes behind the batch are one, channels first.
        dtype: of the dense sequence.
    """

    carrier: Tensor
    bits: Tensor
    channels: int
    space: tuple[int, ...]
    pool: str
    flat: bool
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the sequence, [T, B, C, ...]."""
        return self.carrier.shape

    @property
    def grid(self) -> Grid:
        """How the rows of bits lie as images."""
        return grid_of(self.shape[1], self.space, self.pool)

    def steps(self, first: int, last: int) -> Tensor:
        """The dense spikes of steps first .. last - 1, [last - first, B, C, ...], channels last; no gradient."""
        bits = self.bits[first:last].unflatten(1, (self.shape[1], *self.space))
        if self.pool == "max":
            windows = _windows(bits, len(self.space))
            bits = windows[0]
            for other in windows[1:]:
                bits = bits | other
        dense = unpack(bits, self.channels, dtype=self.dtype)
        if self.pool == "avg":
            windows = _windows(dense, len(self.space))
            # multiples of 1/2 or 1/4, exact in every dtype
            dense = torch.stack(windows).sum(0) / len(windows)
        dense = dense.movedim(-1, 2)
        return dense.flatten(2) if self.flat else dense

    def flatten(self) -> "PackedSpikes":
        """The same spikes as [T, B, features], channels first."""
        return replace(self, carrier=self.carrier.flatten(2), flat=True)

    def dense(self) -> Tensor:
        """The whole sequence as a tensor, differentiable; a unit that gets it as it is finds the bits again."""
        made = _Dense.apply(self.carrier, self)
        if not torch.compiler.is_compiling():
            made._spikefit_packed = (self, made._version)
        return made

    def mean_over_space(self) -> Tensor:
        """[T, B, C], differentiable; one step is dense at a time."""
        return _MeanOverSpace.apply(self.carrier, self)

    def without_bits(self) -> "PackedSpikes":
        """A description that holds no memory and no graph; `with_bits` makes it whole again."""
        return replace(self, carrier=self.carrier.detach(), bits=self.bits[:0])

    def with_bits(self, carrier: Tensor, bits: Tensor) -> "PackedSpikes":
        """The same description of other bits."""
        return replace(self, carrier=carrier, bits=bits)


Spikes = Tensor | PackedSpikes


def dense(x: Spikes) -> Tensor:
    """`x` itself, or the packed sequence as a tensor."""
    return x.dense() if isinstance(x, PackedSpikes) else x


def packed_or_dense(x: Spikes) -> Spikes:
    """The packed form of a dense sequence that came from `PackedSpikes.dense` and was not touched since, else `x`."""
    if isinstance(x, PackedSpikes) or torch.compiler.is_compiling():
        return x
    packed, version = getattr(x, "_spikefit_packed", (None, None))
    # a hook on the tensor waits for its gradient, which would go past it
    return packed if packed is not None and x._version == version and not x._backward_hooks else x


def grid_of(batch: int, space: tuple[int, ...], pool: str) -> Grid:
    """Images of two, one or no space axes as a grid."""
    height, width = ((1, 1, *space))[-2:]
    return Grid(batch, height, width, pool)


def pooled_space(space: tuple[int, ...], pool: str) -> tuple[int, ...]:
    """Space axes behind the pool."""
    return tuple(side // 2 for side in space) if pool else space


def _windows(x: Tensor, axes: int) -> list[Tensor]:
    """The 2 or 4 places of every 2 or 2x2 window, from [T, B, (H,) W, last]; sides that fill no window are left out."""
    whole = [side // 2 * 2 for side in x.shape[2 : 2 + axes]]
    if axes == 1:
        return [x[:, :, i : whole[0] : 2] for i in range(2)]
    return [x[:, :, i : whole[0] : 2, j : whole[1] : 2] for i in range(2) for j in range(2)]


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, packed):
        # step by step into a tensor of its own: a view of the unpacked bits could not be changed in place
        first = packed.steps(0, 1)
        order = sorted(range(1, first.ndim), key=lambda axis: (-first.stride(axis), axis))
        made = torch.empty_permuted(packed.shape, (0, *order), dtype=first.dtype, device=first.device)
        made[:1] = first
        for t in range(1, packed.shape[0]):
            made[t : t + 1] = packed.steps(t, t + 1)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, None


class _MeanOverSpace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, packed):
        ctx.shape = packed.shape
        axes = tuple(range(3, len(packed.shape)))
        return torch.cat([packed.steps(t, t + 1).mean(axes) for t in range(packed.shape[0])])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        space = ctx.shape[3:]
        return (g / space.numel()).reshape(*g.shape, *[1] * len(space)).expand(ctx.shape), None
