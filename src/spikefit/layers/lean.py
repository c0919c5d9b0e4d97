"""The exact lean form of a unit: packed spikes between forward and backward, everything else rebuilt.

    forward    z_t = W * i_t  ->  m, r  ->  x = norm(z) + shortcut  ->  (s, v_T) = LIF(x, v_0)  ->  bits = pack(s)
    backward   z again (or kept)  ->  u from x and the spikes that were  ->  sums  ->  dz in the place of z
               ->  dW, d_in piece by piece, d_in in the place of dz

The forward runs the operations of `SpikingUnit.forward` in their order, so spikes and membranes are the same bits. The
statistics of the norm are kept, never taken again; the reset uses the stored spikes, so rounding in the recomputed z
cannot flip one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.errors import StateError
from spikefit.layers.norm import Normal
from spikefit.layers.packed import PackedSpikes, Spikes, grid_of, pooled_space
from spikefit.layers.weight import Map, stepwise
from spikefit.ops.dispatch import Backend
from spikefit.ops.fire import Current, Grid, fire, fire_gradient, fire_sums
from spikefit.ops.lif.op import Dynamics
from spikefit.ops.norm import NormGradient, moments, norm_gradient, scale_and_shift

# Values of the input or the current, whichever is larger, that one backward call of a weight takes.
PIECE = 1 << 20


class Branch(NamedTuple):
    """One term of the current, norm(W * input).

    Attributes:
        source: the input [T, B, ...].
        map, weight, bias: of the weight, cast and standardised as its forward takes them.
        normal: its norm.
        chunk: batch rows per call of the weight in forward; None for all.
        over_time: whether the convolution reaches over time, [T, B, C] -> [T', B, C_out].
    """

    source: Spikes
    map: Map
    weight: Tensor
    bias: Tensor | None
    normal: Normal
    chunk: int | None = None
    over_time: bool = False

    @property
    def repeats(self) -> int:
        """How many steps one computed step stands for: T where a dense input repeats one, else 1."""
        x = self.source
        return x.shape[0] if isinstance(x, Tensor) and x.shape[0] > 1 and x.stride(0) == 0 and not self.over_time else 1


def run_lean(
    branches: list[Branch],
    shortcut: Spikes | None,
    v_0: Tensor | None,
    dynamics: Dynamics,
    *,
    pool: str | None,
    keep: str,
    backend: Backend,
) -> tuple[PackedSpikes, Tensor, list[tuple[Tensor, Tensor] | None]]:
    """Run a unit whose backward is exact and rebuilds what it needs.

    Args:
        branches: the terms of the current; their sum is taken in this order.
        shortcut: a further term that is added as it is, [T, B, C, ...]; None for none.
        v_0: membrane [B, C, ...]; zeros if None.
        dynamics: equation and coefficients of the neurons.
        pool: None, "max" or "avg".
        keep: "input" keeps z of every branch, "spikes" runs the weights again in backward.
        backend: of the neurons.

    Returns:
        (spikes, last membrane before the pool [B, C, ...], mean and variance of every branch or None).
    """
    sources = [b.source for b in branches]
    plan = _Plan(
        [
            b._replace(source=_template(b.source), weight=b.weight[:0], bias=None, normal=_bare(b.normal))
            for b in branches
        ],
        None if shortcut is None else _template(shortcut),
        dynamics._replace(learned=None),
        pool or "",
        keep,
        backend,
    )
    tensors: list[Tensor | None] = []
    for b, source in zip(branches, sources, strict=True):
        tensors += [*_tensors(source), b.weight, b.bias, b.normal.first, b.normal.second]
    carrier, bits, v_T, *stats = _Lean.apply(plan, v_0, dynamics.learned, *_tensors(shortcut), *tensors)
    space = tuple(v_T.shape[2:])
    spikes = PackedSpikes(carrier, bits, v_T.shape[1], space, plan.pool, False, carrier.dtype)
    pairs = iter(zip(stats[::2], stats[1::2], strict=True))
    return spikes, v_T, [next(pairs) if b.normal.kind == "batch" else None for b in branches]


class _Plan(NamedTuple):
    """The call without its tensors, which go in as arguments and come back as saved tensors."""

    branches: list[Branch]
    shortcut: Spikes | None
    dynamics: Dynamics
    pool: str
    keep: str
    backend: Backend


class _Given(NamedTuple):
    """The tensors of one branch."""

    source: Tensor
    bits: Tensor | None
    weight: Tensor
    bias: Tensor | None
    first: Tensor | None
    second: Tensor | None


def _template(x: Spikes) -> Spikes:
    """A source without its memory and its place in the graph."""
    return x.without_bits() if isinstance(x, PackedSpikes) else x.detach()[:0]


def _bare(normal: Normal) -> Normal:
    return normal._replace(first=None, second=None)


def _tensors(x: Spikes | None) -> tuple[Tensor | None, Tensor | None]:
    return (x.carrier, x.bits) if isinstance(x, PackedSpikes) else (x, None)


class _Input:
    """The input of a branch: dense steps on demand; a sequence that repeats one step is that step."""

    def __init__(self, branch: Branch, given: Tensor, bits: Tensor | None, dtype: torch.dtype) -> None:
        template = branch.source
        self.packed = template.with_bits(given, bits) if isinstance(template, PackedSpikes) else None
        self.given, self.dtype = given, dtype
        self.shape = given.shape
        self.repeated = branch._replace(source=given).repeats > 1 and self.packed is None
        self.timesteps = 1 if self.repeated else given.shape[0]

    def steps(self, first: int, last: int) -> Tensor:
        """[last - first, B, ...] in the dtype of the weight."""
        dense = self.given[first:last] if self.packed is None else self.packed.steps(first, last)
        return dense.to(self.dtype)


def _forward_weight(b: Branch, x: _Input, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z [T, B, C, ...] as the unit's one forward makes it."""
    if b.over_time:
        return _unfold(b.map(_fold(x.steps(0, x.timesteps), True), weight, bias), 0, True).contiguous()
    return stepwise(lambda t: x.steps(t, t + 1)[0], x.timesteps, b.map, weight, bias, b.chunk)


def _fold(x: Tensor, over_time: bool) -> Tensor:
    """Steps [k, B, ...] as rows for one call of a weight."""
    return x.permute(1, 2, 0) if over_time else x.flatten(0, 1)


def _unfold(rows: Tensor, batch: int, over_time: bool) -> Tensor:
    """The inverse of `_fold`."""
    return rows.permute(2, 0, 1) if over_time else rows.unflatten(0, (-1, batch))


def _rows(z: Tensor) -> Tensor:
    """[T, B, C, ...] -> [T, M, C], channels last; a copy only if they do not lie so."""
    return z.movedim(2, -1).reshape(z.shape[0], -1, z.shape[2])


def _like(rows_TMC: Tensor, batch: int, space: tuple[int, ...]) -> Tensor:
    """[T, M, C] -> [T, B, C, ...]."""
    return rows_TMC.view(rows_TMC.shape[0], batch, *space, rows_TMC.shape[2]).movedim(-1, 2)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, v_0, learned, added, added_bits, *tensors):
        given = _split(tensors)
        with torch.autocast(given[0].weight.device.type, enabled=False):
            return _forward(ctx, plan, v_0, learned, added, added_bits, given)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _bits, q, *_stats):
        with torch.autocast(ctx.device, enabled=False):
            return _backward(ctx, g, q)


def _split(tensors) -> list[_Given]:
    width = len(_Given._fields)
    return [_Given(*tensors[i : i + width]) for i in range(0, len(tensors), width)]


def _forward(ctx, plan: _Plan, v_0, learned, added, added_bits, given: list[_Given]):
    inputs = [_Input(b, t.source, t.bits, t.weight.dtype) for b, t in zip(plan.branches, given, strict=True)]
    zs, maps, stats = [], [], []
    for b, t, x in zip(plan.branches, given, inputs, strict=True):
        z = _forward_weight(b, x, t.weight, t.bias)
        mean_var = None
        if b.normal.kind == "batch":
            mean_var = moments(z, per_step=b.normal.per_step, backend=b.normal.backend)
            stats += mean_var
        zs.append(z)
        maps.append(_affine(b.normal, t, mean_var, z))
    batch, channels, space = zs[0].shape[1], zs[0].shape[2], tuple(zs[0].shape[3:])
    # a repeated input gives one step of current, for all T of the neuron
    T = max(z.shape[0] if not x.repeated else x.shape[0] for z, x in zip(zs, inputs, strict=True))
    grid = grid_of(batch, space, plan.pool)
    current = _current(plan, [_rows(z) for z in zs], maps, added, added_bits)
    dynamics = plan.dynamics._replace(learned=learned)
    start = None if v_0 is None else _state_rows(v_0, (batch, channels, *space), zs[0])
    bits, v_T = fire(current, start, T, grid, dynamics, backend=plan.backend)

    kept = [z.detach() for z in current.zs] if plan.keep == "input" else []
    ctx.save_for_backward(v_0, learned, added, added_bits, bits, *stats, *kept, *[x for t in given for x in t])
    ctx.plan, ctx.grid, ctx.space, ctx.device = plan, grid, space, bits.device.type
    ctx.counts = (len(stats), len(kept))
    ctx.steps = [z.shape[0] for z in zs]
    ctx.dtype = zs[0].dtype
    carrier = bits.new_zeros((), dtype=zs[0].dtype).expand(T, batch, channels, *pooled_space(space, plan.pool))
    ctx.mark_non_differentiable(bits, *stats)
    ctx.set_materialize_grads(False)
    return carrier, bits, _like(v_T.unsqueeze(0), batch, space)[0], *stats


def _state_rows(v_0: Tensor, shape: tuple[int, ...], z: Tensor) -> Tensor:
    """The membrane [B, C, ...] as rows [M, C]."""
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    if v_0.shape != shape or v_0.dtype != compute or v_0.device != z.device:
        raise StateError(
            f"lif: expected a membrane {shape} {compute} on {z.device}, got {tuple(v_0.shape)} {v_0.dtype} on "
            f"{v_0.device}. Pass the state of this batch, or None to start from zero."
        )
    return _rows(v_0.unsqueeze(0))[0]


def _affine(normal: Normal, given: _Given, mean_var, z: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a branch, [R, C] in the compute dtype."""
    compute, C = torch.float64 if z.dtype == torch.float64 else torch.float32, z.shape[2]
    if mean_var is not None:
        scale, shift = scale_and_shift(given.first, given.second, *mean_var, normal.eps)
    elif normal.kind == "affine":
        scale, shift = given.first, given.second
    else:
        scale, shift = z.new_ones(C), z.new_zeros(C)
    return scale.to(compute).view(-1, C), shift.to(compute).view(-1, C)


def _current(plan: _Plan, zs: list[Tensor], maps, added: Tensor | None, added_bits: Tensor | None) -> Current:
    """The terms of the current on rows of channels."""
    extra = None
    if isinstance(plan.shortcut, PackedSpikes):
        packed = plan.shortcut.with_bits(added, added_bits)
        if packed.pool or packed.flat:
            extra, added_bits = _rows(packed.steps(0, packed.shape[0])), None
    elif added is not None:
        extra = _rows(added[:1] if added.shape[0] > 1 and added.stride(0) == 0 else added)
    return Current(zs, [m[0] for m in maps], [m[1] for m in maps], extra, added_bits)


def _backward(ctx, g: Tensor | None, q: Tensor | None):
    plan: _Plan = ctx.plan
    none = [None] * len(ctx.needs_input_grad)
    if g is None and q is None:
        return tuple(none)
    v_0, learned, added, added_bits, bits, *rest = ctx.saved_tensors
    stats, kept = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts)]
    given = _split(rest[sum(ctx.counts) :])
    pairs = iter(zip(stats[::2], stats[1::2], strict=True))
    mean_vars = [next(pairs) if b.normal.kind == "batch" else None for b in plan.branches]
    width = len(_Given._fields)
    wants = [_Given(*ctx.needs_input_grad[5 + width * k : 5 + width * (k + 1)]) for k in range(len(given))]

    works = [
        _Work(b, t, ctx.steps[k], ctx.grid, ctx.space, ctx.dtype, wants[k].source, kept[k] if kept else None)
        for k, (b, t) in enumerate(zip(plan.branches, given, strict=True))
    ]
    maps = [
        _affine(b.normal, t, m, w.z.unsqueeze(0).movedim(-1, 2))
        for b, t, m, w in zip(plan.branches, given, mean_vars, works, strict=True)
    ]
    current = _current(plan, [w.z for w in works], maps, added, added_bits)
    T, M, C = bits.shape[0], ctx.grid.images * ctx.grid.height * ctx.grid.width, works[0].z.shape[2]
    if g is None:
        g = current.zs[0].new_zeros(T, ctx.grid.pooled_rows, C)
    start = None if v_0 is None else _rows(v_0.unsqueeze(0))[0]
    end = None if q is None else _rows(q.unsqueeze(0))[0]
    arguments = (_rows(g.to(ctx.dtype)).contiguous(), end, current, start, bits, ctx.grid)
    dynamics = plan.dynamics._replace(learned=learned)

    sums = None
    if any(b.normal.kind == "batch" or w.first or w.second for b, w in zip(plan.branches, wants, strict=True)):
        sums = fire_sums(*arguments, dynamics, backend=plan.backend)
    gradients = [
        _norm_gradient(b.normal, t, m, scale, sums, k, ctx.steps[k] * M)
        for k, (b, t, m, (scale, _)) in enumerate(zip(plan.branches, given, mean_vars, maps, strict=True))
    ]
    factors = [torch.stack([d.a, d.b, d.c]).to(maps[0][0].dtype) for d in gradients]
    dx, dv_0, d_3 = fire_gradient(
        *arguments,
        dynamics,
        factors,
        want_current=ctx.needs_input_grad[3],
        want_state=ctx.needs_input_grad[1],
        want_coefficients=learned is not None and ctx.needs_input_grad[2],
        backend=plan.backend,
    )
    del arguments, current, g
    result: list[Tensor | None] = [
        None,
        _like(dv_0.unsqueeze(0), ctx.grid.images, ctx.space)[0] if ctx.needs_input_grad[1] else None,
        d_3.to(learned.dtype) if learned is not None and ctx.needs_input_grad[2] else None,
        _like(dx, ctx.grid.images, ctx.space).to(added.dtype) if ctx.needs_input_grad[3] else None,
        None,
    ]
    del dx
    for work, d, t, want in zip(works, gradients, given, wants, strict=True):
        d_source, d_weight, d_bias = work.finish(want)
        result += [d_source, None, d_weight, d_bias]
        result += [d.d_weight.sum(0).to(t.first.dtype) if want.first else None]
        result += [d.d_bias.sum(0).to(t.second.dtype) if want.second else None]
    return tuple(result)


def _norm_gradient(
    normal: Normal, given: _Given, mean_var, scale: Tensor, sums: Tensor | None, k: int, count: int
) -> NormGradient:
    """dz = a dx + b z + c of branch k, and the gradients of its two vectors."""
    nothing = torch.zeros_like(scale, dtype=torch.float64)
    if sums is None:
        return NormGradient(scale.double(), nothing, nothing, nothing, nothing)
    sum_g, sum_gz = sums[0], sums[1 + k]
    if scale.shape[0] == 1:
        sum_g, sum_gz = sum_g.sum(0, keepdim=True), sum_gz.sum(0, keepdim=True)
    if mean_var is None:
        return NormGradient(scale.double(), nothing, nothing, sum_gz, sum_g)
    return norm_gradient(sum_g, sum_gz, given.first, *mean_var, normal.eps, count // scale.shape[0])


class _Work:
    """The backward of one branch: z is rebuilt, becomes dz in place, and gives way to the gradient of the input.

    One buffer serves both where the input is at least as large as z: z lies at its end, the gradient of the input grows
    from its start, and never reaches steps of dz that are still to be read.
    """

    def __init__(
        self,
        branch: Branch,
        given: _Given,
        steps: int,
        grid: Grid,
        space: tuple[int, ...],
        dtype: torch.dtype,
        want_source: bool,
        kept: Tensor | None,
    ) -> None:
        self.branch, self.given, self.batch, self.space = branch, given, grid.images, space
        self.input = _Input(branch, given.source, given.bits, given.weight.dtype)
        rows, channels = grid.images * grid.height * grid.width, given.weight.shape[0]
        size = steps * rows * channels
        # a repeated input has the gradient of its one step
        taken = self.input.timesteps * self.input.shape[1:].numel() if want_source else 0
        self.shared = taken >= size and given.source.dtype == dtype
        self.buffer = given.weight.new_empty(taken if self.shared else size, dtype=dtype)
        self.z = self.buffer[self.buffer.numel() - size :].view(steps, rows, channels)
        if kept is not None:
            self.z.copy_(kept)
            return
        for first, last in self._pieces():
            piece = _fold(self.input.steps(first, last), branch.over_time)
            made = _unfold(branch.map(piece, given.weight, given.bias), self.batch, branch.over_time)
            self.z[slice(None) if branch.over_time else slice(first, last)] = _rows(made)

    def _pieces(self) -> list[tuple[int, int]]:
        """Steps of the input per call of the weight."""
        T = self.input.timesteps
        if self.branch.over_time:
            return [(0, T)]
        step = max(1, PIECE // max(self.z[0].numel(), self.input.shape[1:].numel()))
        return [(t, min(T, t + step)) for t in range(0, T, step)]

    def finish(self, want: _Given) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_source, d_weight, d_bias) from dz, which stands in the place of z."""
        weight, shape = self.given.weight, self.input.shape
        wants = (bool(want.source), bool(want.weight), bool(want.bias))
        total: list[Tensor | None] = [None, None]
        d_source = self._room() if want.source else None
        for first, last in self._pieces():
            x = _fold(self.input.steps(first, last), self.branch.over_time)
            dz = self.z if self.branch.over_time else self.z[first:last]
            dz = _fold(_like(dz, self.batch, self.space), self.branch.over_time)
            dx, *d = self.branch.map.gradient(x, dz, weight, wants)
            for i, value in enumerate(d):
                if value is not None:
                    total[i] = (
                        value.float()
                        if total[i] is None and value.dtype.itemsize < 4
                        else value
                        if total[i] is None
                        else total[i].add_(value)
                    )
            if d_source is not None:
                d_source[first:last] = _unfold(dx, self.batch, self.branch.over_time)
        if d_source is not None and self.input.repeated:
            d_source = torch.cat([d_source, d_source.new_zeros(shape[0] - 1, *shape[1:])])
        return d_source, *(None if t is None else t.to(weight.dtype) for t in total)

    def _room(self) -> Tensor:
        """Memory for the gradient of the input, [T, B, C, ...], channels last."""
        T, shape = self.input.timesteps, self.input.shape
        if self.shared:
            flat = self.buffer[: T * shape[1:].numel()]
        else:
            flat = self.given.source.new_empty(T * shape[1:].numel())
        return flat.view(T, shape[1], *shape[3:], shape[2]).movedim(-1, 2)
