"""The exact lean form of a unit: packed spikes between forward and backward, everything else rebuilt.

    forward    z_t = W * i_t  ->  mean, var  ->  x = norm(z) + shortcut  ->  (s, v_T) = LIF(x, v_0)  ->  bits = pack(s)
    backward   z again (or kept)  ->  u from x and the spikes that were  ->  sums  ->  dz in the place of z
               ->  dW and d_in, piece by piece, d_in in the place of dz

The forward runs the operations of `SpikingUnit.forward` in their order, so spikes and membranes are the same bits. The
statistics of the norm are kept, never taken again; the reset uses the stored spikes, so rounding in the recomputed z
cannot flip one. Under a rule with traces (`Traced`) the gradients of weight and norm read these in the place of what
weight and norm read; z, u and the gradient of the input are got as without.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spikefit.errors import StrategyError
from spikefit.layers.branch import Branch, Rebuilt, Statistics, as_images, as_rows, filled, template_of, tensors_of
from spikefit.layers.packed import PackedSpikes, Spikes, grid_of, pooled_space
from spikefit.ops.dispatch import Backend
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.fire import Current, fire, fire_gradient, fire_sums
from spikefit.ops.lif.op import Dynamics, checked_membrane
from spikefit.ops.norm import moments


def run_lean(
    branches: list[Branch],
    shortcut: Spikes | None,
    v_0: Tensor | None,
    dynamics: Dynamics,
    *,
    pool: str | None,
    keep: str,
    backend: Backend,
) -> tuple[PackedSpikes, Tensor, list[Statistics | None]]:
    """Run a unit whose backward is exact and rebuilds what it needs.

    Args:
        branches: the terms of the current; their sum is taken in this order. With traces the sequence is one step.
        shortcut: a further term that is added as it is, [T, B, C, ...]; None for none.
        v_0: membrane [B, C, ...]; zeros if None.
        dynamics: equation and coefficients of the neurons.
        pool: None, "max" or "avg".
        keep: "input" keeps z of every branch, "spikes" runs the weights again in backward.
        backend: of the neurons.

    Returns:
        (spikes, last membrane before the pool [B, C, ...], statistics of every branch or None).
    """
    plan = _Plan(
        [b.without_tensors() for b in branches],
        None if shortcut is None else template_of(shortcut),
        dynamics._replace(learned=None),
        pool or "",
        keep,
        backend,
    )
    tensors = [t for b in branches for t in b.tensors()]
    follow = [None if b.traced is None else b.traced.follow for b in branches]
    carrier, bits, v_T, *stats = _Lean.apply(plan, follow, v_0, dynamics.learned, *tensors_of(shortcut), *tensors)
    spikes = PackedSpikes(carrier, bits, v_T.shape[1], tuple(v_T.shape[2:]), plan.pool, False, carrier.dtype)
    return spikes, v_T, _paired(plan, stats)


class _Plan(NamedTuple):
    """A call without its tensors, which go in as arguments and come back as saved tensors."""

    branches: list[Branch]
    shortcut: Spikes | None
    dynamics: Dynamics
    pool: str
    keep: str
    backend: Backend


# Arguments of `_Lean` before the tensors of the branches, and tensors of a branch.
LEADING, WIDTH = 6, 7


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, follow, v_0, learned, added, added_bits, *tensors):
        branches = _with_tensors(plan, tensors)
        # casts were made before; inside, every operation runs in the dtype of its operands
        with torch.autocast(branches[0].weight.device.type, enabled=False):
            return _forward(ctx, plan, follow, branches, v_0, learned, added, added_bits, tensors)

    @staticmethod
    def backward(ctx, g, _bits, q, *_stats):
        if torch.is_grad_enabled():
            raise StrategyError(
                "lean: a lean unit has no second derivative (create_graph=True); use strategy='bptt' with "
                "backend='reference'."
            )
        if g is None and q is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(ctx.device, enabled=False):
            return _backward(ctx, g, q)


def _with_tensors(plan: _Plan, tensors) -> list[Branch]:
    cut = [list(tensors[i : i + WIDTH]) for i in range(0, len(tensors), WIDTH)]
    return [b.with_tensors(t) for b, t in zip(plan.branches, cut, strict=True)]


def _paired(plan: _Plan, stats) -> list[Statistics | None]:
    """(mean, var) of the branches that have statistics, None for the others."""
    pairs = iter(zip(stats[::2], stats[1::2], strict=True))
    return [next(pairs) if b.normal.kind == "batch" else None for b in plan.branches]


def _forward(ctx, plan: _Plan, follow, branches: list[Branch], v_0, learned, added, added_bits, tensors):
    zs, maps = [], []
    stats: list[Tensor] = []
    traces: list[Tensor | None] = []
    starts: list[Statistics | None] = []
    for b, trace_of in zip(branches, follow, strict=True):
        z = b.forward()
        compute, statistics, running = compute_dtype(z.dtype), None, None
        if b.normal.kind == "batch":
            statistics = moments(z, per_step=b.normal.per_step, backend=b.normal.backend)
            stats += statistics
            running = b.running(statistics, z.numel() // z.shape[2], compute)
        read = statistics if running is None else running
        traces.append(None if trace_of is None else trace_of(b.read_by_norm(z, read)))
        zs.append(z)
        starts.append(running)
        maps.append(b.affine(statistics, compute, running))
    shape = zs[0].shape
    # a repeated input gives one step of current, for all T steps of the neuron
    T = max(z.shape[0] * b.repeats for z, b in zip(zs, branches, strict=True))
    grid = grid_of(shape[1], tuple(shape[3:]), plan.pool)
    current = _current(plan, [as_rows(z) for z in zs], maps, added, added_bits)
    start = None if v_0 is None else _state_rows(checked_membrane("lif", v_0, shape[1:], zs[0]))
    bits, v_T = fire(current, start, T, grid, plan.dynamics._replace(learned=learned), backend=plan.backend)

    kept = current.zs if plan.keep == "input" else []
    ctx.save_for_backward(v_0, learned, added, added_bits, bits, *stats, *kept, *traces, *tensors)
    # vectors of C values, which nothing changes
    ctx.starts = starts
    ctx.plan, ctx.grid, ctx.device, ctx.dtype = plan, grid, bits.device.type, zs[0].dtype
    ctx.shapes, ctx.counts = [z.shape for z in zs], (len(stats), len(kept))
    ctx.mark_non_differentiable(bits, *stats)
    ctx.set_materialize_grads(False)
    space = pooled_space(tuple(shape[3:]), plan.pool)
    carrier = bits.new_zeros((), dtype=zs[0].dtype).expand(T, *shape[1:3], *space)
    return carrier, bits, _state_image(v_T, shape[1], tuple(shape[3:])), *stats


def _state_rows(v: Tensor) -> Tensor:
    """The membrane [B, C, ...] as rows [M, C]."""
    return as_rows(v.unsqueeze(0))[0]


def _state_image(v_MC: Tensor, batch: int, space: tuple[int, ...]) -> Tensor:
    """The inverse of `_state_rows`."""
    return as_images(v_MC.unsqueeze(0), batch, space)[0]


def _current(plan: _Plan, zs: list[Tensor], maps, added: Tensor | None, added_bits: Tensor | None) -> Current:
    """The terms of the current, on rows of channels."""
    scales, shifts = [m[0] for m in maps], [m[1] for m in maps]
    if added is None or plan.shortcut is None:
        return Current(zs, scales, shifts, None, None)
    shortcut = filled(plan.shortcut, added, added_bits)
    if isinstance(shortcut, PackedSpikes):
        if not shortcut.pool and not shortcut.flat:
            return Current(zs, scales, shifts, None, shortcut.bits)
        dense = shortcut.steps(0, shortcut.shape[0])
    else:
        dense = shortcut[:1] if shortcut.shape[0] > 1 and shortcut.stride(0) == 0 else shortcut
    return Current(zs, scales, shifts, as_rows(dense), None)


def _backward(ctx, g: Tensor | None, q: Tensor | None):
    plan, grid, shape = ctx.plan, ctx.grid, ctx.shapes[0]
    v_0, learned, added, added_bits, bits, *rest = ctx.saved_tensors
    first, second = ctx.counts[0], sum(ctx.counts)
    third = second + len(plan.branches)
    statistics, kept, traces = _paired(plan, rest[:first]), rest[first:second], rest[second:third]
    branches = _with_tensors(plan, rest[third:])
    wants = [ctx.needs_input_grad[i : i + WIDTH] for i in range(LEADING, len(ctx.needs_input_grad), WIDTH)]

    rebuilt = [
        Rebuilt(b, ctx.shapes[k], ctx.dtype, kept[k] if kept else None, wants[k][0]) for k, b in enumerate(branches)
    ]
    compute = compute_dtype(ctx.dtype)
    maps = [b.affine(s, compute, start) for b, s, start in zip(branches, statistics, ctx.starts, strict=True)]
    current = _current(plan, [r.z for r in rebuilt], maps, added, added_bits)
    outer = (
        bits.new_zeros((), dtype=ctx.dtype).expand(len(bits), grid.pooled_rows, shape[2]) if g is None else as_rows(g)
    )
    start, end = (None if v is None else _state_rows(v) for v in (v_0, q))
    arguments = (
        outer.to(ctx.dtype).contiguous(), end, current, start, bits, grid, plan.dynamics._replace(learned=learned)
    )  # fmt: skip
    sums = None
    if any(b.normal.kind == "batch" or any(w[4:6]) for b, w in zip(branches, wants, strict=True)):
        sums = fire_sums(*arguments, backend=plan.backend)
    norms = [
        b.norm_gradient(s, m[0], None if sums is None else (sums[0], sums[1 + k]), r.z.shape[0] * r.z.shape[1], start)
        for k, (b, s, m, r, start) in enumerate(zip(branches, statistics, maps, rebuilt, ctx.starts, strict=True))
    ]
    want_v_0, want_learned, want_added = ctx.needs_input_grad[2:5]
    dx, dv_0, d_3 = fire_gradient(
        *arguments,
        [torch.stack([d.a, d.b, d.c]).to(compute_dtype(ctx.dtype)) for d in norms],
        want_current=want_added or any(t is not None and w[4] for t, w in zip(traces, wants, strict=True)),
        want_state=want_v_0,
        want_coefficients=want_learned,
        backend=plan.backend,
    )
    # the gradient that came in and the rows made of it are no longer needed while the weights run
    del arguments, current, outer, g
    space = tuple(shape[3:])
    result: list[Tensor | None] = [
        None,
        None,
        _state_image(dv_0, shape[1], space) if want_v_0 else None,
        d_3.to(learned.dtype) if want_learned else None,
        as_images(dx, shape[1], space).to(added.dtype) if want_added else None,
        None,
    ]
    vectors = []
    for b, d, trace, want in zip(branches, norms, traces, wants, strict=True):
        vectors.append(b.vector_gradients(d, dx, trace if want[4] else None))
    del dx  # as above
    for r, b, want, given in zip(rebuilt, branches, wants, vectors, strict=True):
        d_source, d_weight, d_bias = r.gradients((want[0], want[2], want[3]))
        result += [d_source, None, d_weight, d_bias]
        for value, vector, wanted in zip(given, (b.normal.first, b.normal.second), want[4:6], strict=True):
            result.append(value.to(vector.dtype) if wanted and vector is not None else None)
        result.append(None)
    return tuple(result)
