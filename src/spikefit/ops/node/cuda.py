"""The two-group node on CUDA: Triton, one program per block of neuron pairs, the loop over time inside.

A sequence is seen as rows [T, P, 2, M], as in `cpu`. The state of a block stays in registers from the first step to the
last; the operations and their order are those of `reference`, in float32 without contraction to fused multiply-add, so
that outputs agree bit for bit. `TRITON_INTERPRET=1`, set before this file is imported, runs the kernels on CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikefit.ops.lif.cuda import fire, on, reset_of, slope_of
from spikefit.ops.node.equation import TwoGroups
from spikefit.ops.surrogate import FORMS

# Pairs per program.
BLOCK = 256


def forward(
    x_TN: Tensor, v_0: Tensor, y_TN: Tensor, v_T: Tensor, u_TN: Tensor, anchors_AN: Tensor, counts: Tensor,
    run: int, node: TwoGroups, every: int,
) -> None:  # fmt: skip
    """As `cpu.forward`."""
    T, N = x_TN.shape
    sums = _sums(x_TN, counts)
    with on(v_0.device):
        _forward_kernel[(_blocks(N),)](
            x_TN, v_0, y_TN, v_T, u_TN, anchors_AN, sums, run, T, N // 2, N, every, anchors_AN.shape[0],
            *_numbers(node), RESET=node.equation.reset, KEEP=u_TN.numel() > 0, ANCHORS=anchors_AN.numel() > 0,
            COUNT=counts.numel() > 0, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    _add(counts, sums)


def streamlined(
    g_TN: Tensor, q: Tensor, y_TN: Tensor, v_T: Tensor, anchors_AN: Tensor, dx_TN: Tensor, dv_0: Tensor, counts: Tensor,
    run: int, node: TwoGroups, every: int,
) -> None:  # fmt: skip
    """As `cpu.streamlined`."""
    T, N = g_TN.shape
    sums = _sums(g_TN, counts)
    with on(v_T.device):
        _streamlined_kernel[(_blocks(N),)](
            g_TN, q, y_TN, v_T, anchors_AN, dx_TN, dv_0, sums, run, T, N // 2, N, every, anchors_AN.shape[0],
            *_numbers(node), node.equation.surrogate.parameter, **_variant(node), ANCHORS=anchors_AN.numel() > 0,
            COUNT=counts.numel() > 0, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    _add(counts, sums)


def inverse(y_TN: Tensor, w: Tensor, x_TN: Tensor, v: Tensor, counts: Tensor, run: int, node: TwoGroups) -> None:
    """As `cpu.inverse`."""
    T, N = y_TN.shape
    sums = _sums(y_TN, counts)
    with on(w.device):
        _inverse_kernel[(_blocks(N),)](
            y_TN, w, x_TN, v, sums, run, T, N // 2, N, *_numbers(node), RESET=node.equation.reset,
            COUNT=counts.numel() > 0, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    _add(counts, sums)


def adjoint(g_TN: Tensor, q: Tensor, u_TN: Tensor, dx_TN: Tensor, dv_0: Tensor, run: int, node: TwoGroups) -> None:
    """As `cpu.adjoint`."""
    T, N = g_TN.shape
    with on(q.device):
        _adjoint_kernel[(_blocks(N),)](
            g_TN, q, u_TN, dx_TN, dv_0, run, T, N // 2, N, *_numbers(node), node.equation.surrogate.parameter,
            **_variant(node), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _numbers(node: TwoGroups) -> tuple[float, ...]:
    """What every kernel takes of the node."""
    return node.alpha, node.beta, node.leak, node.kappa, node.v_threshold, node.equation.v_reset


def _variant(node: TwoGroups) -> dict[str, object]:
    """What is compiled into the kernels with a gradient."""
    equation = node.equation
    slope = FORMS[equation.surrogate.name].kernel
    return {"RESET": equation.reset, "ATTACHED": not equation.detach_reset, "SLOPE": slope}


def _blocks(neurons: int) -> int:
    return triton.cdiv(neurons // 2, BLOCK)


def _sums(rows_TN: Tensor, counts: Tensor) -> Tensor:
    """Room for the spikes of every block, step and group; none if nobody counts."""
    T, N = rows_TN.shape
    return rows_TN.new_zeros((_blocks(N) if counts.numel() else 0, T, 2), dtype=torch.int32)


def _add(counts: Tensor, sums: Tensor) -> None:
    if counts.numel():
        counts.copy_(sums.sum(0, dtype=torch.int64))


@triton.jit
def _places(run, pairs, BLOCK: tl.constexpr):
    """Where the first and the second neuron of every pair of this program lie in a row [P, 2, run], and which exist."""
    # int64: one sequence can hold more than 2**31 elements
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = n // run * 2 * run + n % run
    return first, first + run, n < pairs


@triton.jit
def _kept(steps, every, anchors, N, here):
    """(where the kept state after so many steps lies, whether it is one of those before the last)."""
    number = tl.zeros_like(here.to(tl.int64)) + steps
    row = number // every
    return (row - 1) * N, here & (number % every == 0) & (row <= anchors)


@triton.jit
def _phi(x, v, leak, kappa, theta, v_reset, RESET: tl.constexpr):
    """Charge, fire and reset of one group: (s, r, u)."""
    u = leak * v + kappa * x
    s = fire(u, theta, False)
    return s, reset_of(u, s, theta, v_reset, RESET), u


@triton.jit
def _undo(y1, y2, w1, w2, alpha, beta, leak, kappa, theta, v_reset, RESET: tl.constexpr):
    """One step backwards: (x1, x2, v1, v2, s1, s2, u1, u2)."""
    s2, r2, u2 = _phi(y1, w1, leak, kappa, theta, v_reset, RESET)
    x1, v1 = tl.div_rn(y2 - s2, beta), tl.div_rn(w2 - r2, alpha)
    s1, r1, u1 = _phi(x1, v1, leak, kappa, theta, v_reset, RESET)
    x2, v2 = tl.div_rn(y1 - s1, beta), tl.div_rn(w1 - r1, alpha)
    return x1, x2, v1, v2, s1, s2, u1, u2


@triton.jit
def _through(u, s, theta, v_reset, p, RESET: tl.constexpr, ATTACHED: tl.constexpr, SLOPE: tl.constexpr):
    """The slopes of spike and reset in u."""
    slope = slope_of(u - theta, p, SLOPE)
    if RESET == "soft":
        keep = slope * 0.0 + 1.0
        if ATTACHED:
            keep = 1.0 - theta * slope
    else:
        keep = 1.0 - s
        if ATTACHED:
            keep += (v_reset - u) * slope
    return slope, keep


@triton.jit
def _pull(
    g1, g2, q1, q2, s1, s2, u1, u2, alpha, beta, leak, kappa, theta, v_reset, p,
    RESET: tl.constexpr, ATTACHED: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The gradient of one step: (dx1, dx2, dv1, dv2)."""
    slope1, keep1 = _through(u1, s1, theta, v_reset, p, RESET, ATTACHED, SLOPE)
    slope2, keep2 = _through(u2, s2, theta, v_reset, p, RESET, ATTACHED, SLOPE)
    m2 = g2 * slope2 + q2 * keep2
    to_y1, to_w1 = g1 + kappa * m2, q1 + leak * m2
    m1 = to_y1 * slope1 + to_w1 * keep1
    return beta * g2 + kappa * m1, beta * to_y1, alpha * q2 + leak * m1, alpha * to_w1


@triton.jit
def _store_counts(sums_ptr, t, T, s1, s2, here):
    row = sums_ptr + (tl.program_id(0).to(tl.int64) * T + t) * 2
    tl.store(row, tl.sum(tl.where(here, s1, 0.0)).to(tl.int32))
    tl.store(row + 1, tl.sum(tl.where(here, s2, 0.0)).to(tl.int32))


@triton.jit
def _forward_kernel(
    x_ptr, v_0_ptr, y_ptr, v_T_ptr, u_ptr, anchors_ptr, sums_ptr, run, T, pairs, N, every, anchors,
    alpha, beta, leak, kappa, theta, v_reset,
    RESET: tl.constexpr, KEEP: tl.constexpr, ANCHORS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, second, here = _places(run, pairs, BLOCK)
    v1, v2 = tl.load(v_0_ptr + first, mask=here, other=0.0), tl.load(v_0_ptr + second, mask=here, other=0.0)
    at = tl.zeros([1], tl.int64)
    for t in range(T):
        x1 = tl.load(x_ptr + at + first, mask=here, other=0.0)
        x2 = tl.load(x_ptr + at + second, mask=here, other=0.0)
        s1, r1, u1 = _phi(x1, v1, leak, kappa, theta, v_reset, RESET)
        y1, w1 = s1 + beta * x2, r1 + alpha * v2
        s2, r2, u2 = _phi(y1, w1, leak, kappa, theta, v_reset, RESET)
        tl.store(y_ptr + at + first, y1, mask=here)
        tl.store(y_ptr + at + second, s2 + beta * x1, mask=here)
        v1, v2 = w1, r2 + alpha * v1
        if KEEP:
            tl.store(u_ptr + at + first, u1, mask=here)
            tl.store(u_ptr + at + second, u2, mask=here)
        if ANCHORS:
            row, kept = _kept(t + 1, every, anchors, N, here)
            tl.store(anchors_ptr + row + first, v1, mask=kept)
            tl.store(anchors_ptr + row + second, v2, mask=kept)
        if COUNT:
            _store_counts(sums_ptr, t, T, s1, s2, here)
        at += N
    tl.store(v_T_ptr + first, v1, mask=here)
    tl.store(v_T_ptr + second, v2, mask=here)


@triton.jit
def _streamlined_kernel(
    g_ptr, q_ptr, y_ptr, v_T_ptr, anchors_ptr, dx_ptr, dv_0_ptr, sums_ptr, run, T, pairs, N, every, anchors,
    alpha, beta, leak, kappa, theta, v_reset, p,
    RESET: tl.constexpr, ATTACHED: tl.constexpr, SLOPE: tl.constexpr, ANCHORS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, second, here = _places(run, pairs, BLOCK)
    v1, v2 = tl.load(v_T_ptr + first, mask=here, other=0.0), tl.load(v_T_ptr + second, mask=here, other=0.0)
    q1, q2 = tl.load(q_ptr + first, mask=here, other=0.0), tl.load(q_ptr + second, mask=here, other=0.0)
    for back in range(T):
        t = T - 1 - back
        at = (tl.zeros([1], tl.int64) + t) * N
        if ANCHORS:
            # a kept state takes the place of the rebuilt one
            row, kept = _kept(t + 1, every, anchors, N, here)
            v1 = tl.where(kept, tl.load(anchors_ptr + row + first, mask=kept, other=0.0), v1)
            v2 = tl.where(kept, tl.load(anchors_ptr + row + second, mask=kept, other=0.0), v2)
        y1 = tl.load(y_ptr + at + first, mask=here, other=0.0)
        y2 = tl.load(y_ptr + at + second, mask=here, other=0.0)
        g1 = tl.load(g_ptr + at + first, mask=here, other=0.0)
        g2 = tl.load(g_ptr + at + second, mask=here, other=0.0)
        _x1, _x2, v1, v2, s1, s2, u1, u2 = _undo(y1, y2, v1, v2, alpha, beta, leak, kappa, theta, v_reset, RESET)
        dx1, dx2, q1, q2 = _pull(
            g1, g2, q1, q2, s1, s2, u1, u2, alpha, beta, leak, kappa, theta, v_reset, p, RESET, ATTACHED, SLOPE
        )
        tl.store(dx_ptr + at + first, dx1, mask=here)
        tl.store(dx_ptr + at + second, dx2, mask=here)
        if COUNT:
            _store_counts(sums_ptr, t, T, s1, s2, here)
    tl.store(dv_0_ptr + first, q1, mask=here)
    tl.store(dv_0_ptr + second, q2, mask=here)


@triton.jit
def _inverse_kernel(
    y_ptr, w_ptr, x_ptr, v_ptr, sums_ptr, run, T, pairs, N, alpha, beta, leak, kappa, theta, v_reset,
    RESET: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, second, here = _places(run, pairs, BLOCK)
    v1, v2 = tl.load(w_ptr + first, mask=here, other=0.0), tl.load(w_ptr + second, mask=here, other=0.0)
    for back in range(T):
        t = T - 1 - back
        at = (tl.zeros([1], tl.int64) + t) * N
        y1 = tl.load(y_ptr + at + first, mask=here, other=0.0)
        y2 = tl.load(y_ptr + at + second, mask=here, other=0.0)
        x1, x2, v1, v2, s1, s2, _u1, _u2 = _undo(y1, y2, v1, v2, alpha, beta, leak, kappa, theta, v_reset, RESET)
        tl.store(x_ptr + at + first, x1, mask=here)
        tl.store(x_ptr + at + second, x2, mask=here)
        if COUNT:
            _store_counts(sums_ptr, t, T, s1, s2, here)
    tl.store(v_ptr + first, v1, mask=here)
    tl.store(v_ptr + second, v2, mask=here)


@triton.jit
def _adjoint_kernel(
    g_ptr, q_ptr, u_ptr, dx_ptr, dv_0_ptr, run, T, pairs, N, alpha, beta, leak, kappa, theta, v_reset, p,
    RESET: tl.constexpr, ATTACHED: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, second, here = _places(run, pairs, BLOCK)
    q1, q2 = tl.load(q_ptr + first, mask=here, other=0.0), tl.load(q_ptr + second, mask=here, other=0.0)
    for back in range(T):
        at = (tl.zeros([1], tl.int64) + T - 1 - back) * N
        u1 = tl.load(u_ptr + at + first, mask=here, other=0.0)
        u2 = tl.load(u_ptr + at + second, mask=here, other=0.0)
        g1 = tl.load(g_ptr + at + first, mask=here, other=0.0)
        g2 = tl.load(g_ptr + at + second, mask=here, other=0.0)
        s1, s2 = fire(u1, theta, False), fire(u2, theta, False)
        dx1, dx2, q1, q2 = _pull(
            g1, g2, q1, q2, s1, s2, u1, u2, alpha, beta, leak, kappa, theta, v_reset, p, RESET, ATTACHED, SLOPE
        )
        tl.store(dx_ptr + at + first, dx1, mask=here)
        tl.store(dx_ptr + at + second, dx2, mask=here)
    tl.store(dv_0_ptr + first, q1, mask=here)
    tl.store(dv_0_ptr + second, q2, mask=here)
