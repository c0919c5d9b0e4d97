"""One term of a lean unit's current, norm(W * input): its forward, and the backward that rebuilds z."""

from typing import NamedTuple

import torch
from torch import Tensor

from spikefit.layers.applying import Traced
from spikefit.layers.norm import Normal
from spikefit.layers.packed import PackedSpikes, Spikes
from spikefit.layers.running import Sums
from spikefit.layers.weight import Map, stepwise
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.norm import Moments, NormGradient, norm_gradient, running_map, scale_and_shift

# Values of the input or the current, whichever is larger, that one call of a weight takes in backward.
PIECE = 1 << 20

# (mean, variance), float64 [R, C]
Statistics = tuple[Tensor, Tensor]


class Branch(NamedTuple):
    """One term of the current.

    Attributes:
        source: the input [T, B, ...].
        map, weight, bias: of the weight, cast and standardised as its forward takes them.
        normal: its norm.
        chunk: batch rows per call of the weight in forward; None for all.
        over_time: whether the convolution reaches over time, [T, B, C] -> [T', B, C_out].
        traced: traces that a rule puts in the place of the input in the gradients of weight and norm; None for neither.
    """

    source: Spikes
    map: Map
    weight: Tensor
    bias: Tensor | None
    normal: Normal
    chunk: int | None = None
    over_time: bool = False
    traced: Traced | None = None

    @property
    def repeats(self) -> int:
        """How many steps one computed step stands for: T where a dense input repeats one, else 1."""
        x = self.source
        if self.over_time or isinstance(x, PackedSpikes) or x.shape[0] == 1:
            return 1
        return x.shape[0] if x.stride(0) == 0 else 1

    def tensors(self) -> list[Tensor | None]:
        """All tensors of the branch, in the order `with_tensors` takes them."""
        a = None if self.traced is None else self.traced.a
        return [*tensors_of(self.source), self.weight, self.bias, self.normal.first, self.normal.second, a]

    def without_tensors(self) -> "Branch":
        """A description that holds no memory and no graph."""
        normal = self.normal._replace(first=None, second=None)
        source, weight = template_of(self.source), self.weight.detach()[:0]
        # what follows the norm knows the rule and all its traces
        traced = None if self.traced is None else self.traced._replace(a=None, follow=None)
        return self._replace(source=source, weight=weight, bias=None, normal=normal, traced=traced)

    def with_tensors(self, tensors: list[Tensor | None]) -> "Branch":
        """The branch again, from what `without_tensors` and `tensors` returned."""
        source, bits, weight, bias, first, second, a = tensors
        assert source is not None
        assert weight is not None
        normal = self.normal._replace(first=first, second=second)
        made = self._replace(source=filled(self.source, source, bits), weight=weight, bias=bias, normal=normal)
        return made if self.traced is None else made._replace(traced=self.traced._replace(a=a))

    def computed_steps(self) -> int:
        """Steps of the input that the weight sees."""
        return 1 if self.repeats > 1 else self.source.shape[0]

    def steps(self, first: int, last: int) -> Tensor:
        """Dense steps of the input, [last - first, B, ...], in the dtype of the weight."""
        x = self.source
        dense = x.steps(first, last) if isinstance(x, PackedSpikes) else x[first:last]
        return dense.to(self.weight.dtype)

    def read_by_weight(self, first: int, last: int) -> Tensor:
        """What the gradient of the weight reads: steps of the input, or the trace in their place."""
        if self.traced is None or self.traced.a is None:
            return self.steps(first, last)
        return self.traced.a[first:last].to(self.weight.dtype)

    def read_by_norm(self, z: Tensor, statistics: Statistics | None) -> Tensor:
        """n of x = first n + second, shape of `z`: the normalised z, or z itself where the map is given."""
        if statistics is None:
            return z
        shape, dtype = (-1, 1, z.shape[2], *[1] * (z.ndim - 3)), compute_dtype(z.dtype)
        mean, var = (s.to(dtype).view(shape) for s in statistics)
        return (z - mean) * torch.rsqrt(var + self.normal.eps)

    def forward(self) -> Tensor:
        """z [T, B, C, ...], by the one forward of a weight; one step if the input repeats one."""
        if self.over_time:
            return unfold(self.map(fold(self.steps(0, self.source.shape[0]), True), self.weight, self.bias), 0, True)
        count = self.computed_steps()
        return stepwise(lambda t: self.steps(t, t + 1)[0], count, self.map, self.weight, self.bias, self.chunk)

    def running(self, statistics: Statistics, rows: int, compute: torch.dtype) -> Statistics | None:
        """Running statistics [C] that the value uses in the place of those of z; None if it does not.

        `rows` is the number of values of one channel in z.
        """
        if self.normal.start is None:
            return None
        mean, var = (t.to(compute) for t in statistics)
        return self.normal.start.settled(Sums.of(Moments(mean, var, rows // mean.shape[0]), self.repeats))

    def affine(
        self, statistics: Statistics | None, compute: torch.dtype, running: Statistics | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the norm, [R, C] in the compute dtype."""
        first, second, C = self.normal.first, self.normal.second, self.weight.shape[0]
        if first is None or second is None:
            ones = self.weight.new_ones((1, C), dtype=compute)
            return ones, torch.zeros_like(ones)
        if statistics is not None and running is not None:
            scale, shift = running_map(first, second, *running, self.normal.eps)
            # a row per step, as the gradient has
            rows = statistics[0].shape[0]
            return scale.to(compute).repeat(rows, 1), shift.to(compute).repeat(rows, 1)
        if statistics is not None:
            first, second = scale_and_shift(first, second, *statistics, self.normal.eps)
        return first.to(compute).view(-1, C), second.to(compute).view(-1, C)

    def norm_gradient(
        self,
        statistics: Statistics | None,
        scale: Tensor,
        sums: tuple[Tensor, Tensor] | None,
        rows: int,
        running: Statistics | None = None,
    ) -> NormGradient:
        """dz = a dx + b z + c, and the gradients of the two vectors of the norm, from the sums of dx and dx z.

        `rows` is the number of values of one channel in z.
        """
        nothing = torch.zeros_like(scale, dtype=torch.float64)
        if sums is None:
            return NormGradient(scale.double(), nothing, nothing, nothing, nothing)
        sum_g, sum_gz = (s.sum(0, keepdim=True) if scale.shape[0] == 1 else s for s in sums)
        if statistics is None or self.normal.first is None:
            return NormGradient(scale.double(), nothing, nothing, sum_gz, sum_g)
        count = rows // scale.shape[0]
        return norm_gradient(sum_g, sum_gz, self.normal.first, *statistics, self.normal.eps, count, running)

    def vector_gradients(self, d: NormGradient, dx: Tensor, trace: Tensor | None) -> tuple[Tensor, Tensor]:
        """(dfirst, dsecond) [C] of the norm: those in `d`, or of dx [T, M, C] with a trace of what the norm reads."""
        d_first, d_second, wide = d.d_weight.sum(0), d.d_bias.sum(0), compute_dtype(dx.dtype)
        if trace is not None:
            d_first = (dx.to(wide) * as_rows(trace).to(wide)).sum((0, 1))
        return d_first, d_second if self.traced is None else d_second * self.traced.c


def template_of(x: Spikes) -> Spikes:
    """A sequence without its memory and its place in the graph."""
    return x.without_bits() if isinstance(x, PackedSpikes) else x.detach()[:0]


def filled(template: Spikes, source: Tensor, bits: Tensor | None) -> Spikes:
    """The sequence again, from what `template_of` and `tensors_of` returned."""
    return template.with_bits(source, bits) if isinstance(template, PackedSpikes) and bits is not None else source


def tensors_of(x: Spikes | None) -> tuple[Tensor | None, Tensor | None]:
    """(carrier, bits) of packed spikes, (tensor, None) of dense ones."""
    return (x.carrier, x.bits) if isinstance(x, PackedSpikes) else (x, None)


def fold(x: Tensor, over_time: bool) -> Tensor:
    """Steps [k, B, ...] as rows for one call of a weight."""
    return x.permute(1, 2, 0) if over_time else x.flatten(0, 1)


def unfold(rows: Tensor, batch: int, over_time: bool) -> Tensor:
    """The inverse of `fold`."""
    return rows.permute(2, 0, 1).contiguous() if over_time else rows.unflatten(0, (-1, batch))


def as_rows(z: Tensor) -> Tensor:
    """[T, B, C, ...] -> [T, M, C], channels last; a copy only if they do not lie so."""
    return z.movedim(2, -1).reshape(z.shape[0], -1, z.shape[2])


def as_images(rows_TMC: Tensor, batch: int, space: tuple[int, ...]) -> Tensor:
    """[T, M, C] -> [T, B, C, ...]."""
    return rows_TMC.view(rows_TMC.shape[0], batch, *space, rows_TMC.shape[2]).movedim(-1, 2)


class Rebuilt:
    """z of a branch again, which becomes dz in its place and then makes room for the gradient of the input.

    One buffer serves all three where the input is at least as large as z: z lies at its end, the gradient of the input
    grows from its start, and never reaches steps of dz that are still to be read.
    """

    def __init__(
        self, branch: Branch, z_like: torch.Size, dtype: torch.dtype, kept: Tensor | None, want_source: bool
    ) -> None:
        self.branch, self.batch, self.space = branch, z_like[1], tuple(z_like[3:])
        steps, channels, size = z_like[0], z_like[2], z_like.numel()
        source = branch.source
        self.taken = branch.computed_steps() * source.shape[1:].numel() if want_source else 0
        self.shared = self.taken >= size and tensors_of(source)[0].dtype == dtype  # type: ignore[union-attr]
        self.buffer: Tensor | None = branch.weight.new_empty(self.taken if self.shared else size, dtype=dtype)
        self.z = self.buffer[self.buffer.numel() - size :].view(steps, -1, channels)
        if kept is not None:
            self.z.copy_(kept)
            return
        weight = branch.map.prepared(branch.weight)
        for first, last in self._pieces():
            rows = branch.map(fold(branch.steps(first, last), branch.over_time), weight, branch.bias)
            made = as_rows(unfold(rows, self.batch, branch.over_time))
            (self.z if branch.over_time else self.z[first:last]).copy_(made)
            del rows, made  # before the next piece is made

    def _pieces(self) -> list[tuple[int, int]]:
        """Steps of the input per call of the weight."""
        T = self.branch.computed_steps()
        if self.branch.over_time:
            return [(0, T)]
        values = max(self.z[0].numel(), self.branch.source.shape[1:].numel())
        most = PIECE if self.branch.chunk is None else min(PIECE, self.branch.chunk * values // self.batch)
        step = max(1, most // values)
        return [(t, min(T, t + step)) for t in range(0, T, step)]

    def gradients(self, wants: tuple[bool, bool, bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_source, d_weight, d_bias) from dz, which stands in the place of z; the memory of dz is given up."""
        branch, over_time = self.branch, self.branch.over_time
        d_source, d_weight, d_bias = self._room() if wants[0] else None, None, None
        for first, last in self._pieces():
            dz = as_images(self.z if over_time else self.z[first:last], self.batch, self.space)
            # the gradient of the input reads the weight alone, so a trace can stand in the place of the input
            x = fold(branch.read_by_weight(first, last), over_time)
            dx, dw, db = branch.map.gradient(x, fold(dz, over_time), branch.weight, wants)
            d_weight, d_bias = _added(d_weight, dw), _added(d_bias, db)
            if d_source is not None and dx is not None:
                d_source[first:last] = unfold(dx, self.batch, over_time)
            del x, dz, dx, dw, db  # before the next piece is made
        self.buffer = None
        del self.z
        if d_source is not None and branch.repeats > 1:
            rest = d_source.new_zeros(branch.source.shape[0] - 1, *d_source.shape[1:])
            d_source = torch.cat([d_source, rest])
        if branch.traced is not None:
            d_bias = None if d_bias is None else d_bias * branch.traced.c
            if d_weight is not None and branch.traced.a is None:
                d_weight = d_weight * branch.traced.c
        dtype = branch.weight.dtype
        return (
            d_source,
            d_weight if d_weight is None else d_weight.to(dtype),
            None if d_bias is None else d_bias.to(dtype),
        )

    def _room(self) -> Tensor:
        """Memory for the gradient of the input, [T, B, C, ...], channels last."""
        shape = self.branch.source.shape
        like = tensors_of(self.branch.source)[0]
        assert like is not None
        flat = self.buffer[: self.taken] if self.shared and self.buffer is not None else like.new_empty(self.taken)
        return flat.view(-1, shape[1], *shape[3:], shape[2]).movedim(-1, 2)


def _added(total: Tensor | None, piece: Tensor | None) -> Tensor | None:
    """total + piece; in float32 at least, as one call over all pieces would add."""
    if piece is None or total is None:
        return piece if piece is None or piece.dtype.itemsize >= 4 else piece.float()
    return total.add_(piece)
