"""The two-group node on CPU: numba, parallel over tiles of neuron pairs, the loop over time inside.

A sequence is seen as rows [T, P, 2, M]: P runs of M first-group neurons, each followed by its M partners. A tile is
WIDTH pairs; what one step of it needs is gathered into one flat scratch that stays in the cache, worked on there, and
scattered back. All loops run over constant offsets of that scratch, so the compiler knows that nothing overlaps and
vectorises. The operations and their order are those of `reference`; fastmath is off, so that outputs agree bit for bit.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.lif.cpu import after_reset, fill_slope, fires, number_type
from spikefit.ops.lif.equation import RESETS
from spikefit.ops.node.equation import TwoGroups
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads

SOFT = RESETS.index("soft")
# Pairs per tile: 14 rows of 1024 float32 are 57 KiB, which the second-level cache holds beside what it prefetches.
WIDTH = 1024
# A cache line more than a tile: rows a power of two apart would share the sets of the cache.
STRIDE = WIDTH + 16
# Rows of the scratch, as offsets: outputs or inputs of a step, their gradients, state, its gradient, membranes, slopes.
A1, A2, G1, G2, V1, V2, Q1, Q2, U1, U2, S1, S2, X1, X2 = (i * STRIDE for i in range(14))
SCRATCH = 14 * STRIDE


def forward(
    x_TN: Tensor, v_0: Tensor, y_TN: Tensor, v_T: Tensor, u_TN: Tensor, anchors_AN: Tensor, counts: Tensor,
    run: int, node: TwoGroups, every: int,
) -> None:  # fmt: skip
    """Fill outputs `y_TN` and `v_T`; also `u_TN`, `anchors_AN` and `counts` [T, 2] unless they are empty.

    Args:
        x_TN, y_TN, u_TN, anchors_AN: rows [.., N] in one memory order.
        v_0, v_T: [N].
        run: M, first-group neurons that lie together.
        node: the node.
        every: steps between two kept states.
    """
    sums = _sums(x_TN, counts)
    use_torch_threads()
    _forward(
        x_TN.numpy(), v_0.numpy(), y_TN.numpy(), v_T.numpy(), u_TN.numpy(), anchors_AN.numpy(), sums, run,
        every, *_numbers(node, v_0),
    )  # fmt: skip
    _add(counts, sums)


def streamlined(
    g_TN: Tensor, q: Tensor, y_TN: Tensor, v_T: Tensor, anchors_AN: Tensor, dx_TN: Tensor, dv_0: Tensor, counts: Tensor,
    run: int, node: TwoGroups, every: int,
) -> None:  # fmt: skip
    """Inverse and gradient in one sweep from the last step to the first; fills `dx_TN`, `dv_0` and `counts`."""
    sums = _sums(g_TN, counts)
    use_torch_threads()
    _streamlined(
        g_TN.numpy(), q.numpy(), y_TN.numpy(), v_T.numpy(), anchors_AN.numpy(), dx_TN.numpy(), dv_0.numpy(), sums, run,
        every, *_numbers(node, v_T), *_gradient_numbers(node, v_T),
    )  # fmt: skip
    _add(counts, sums)


def inverse(y_TN: Tensor, w: Tensor, x_TN: Tensor, v: Tensor, counts: Tensor, run: int, node: TwoGroups) -> None:
    """Run the steps of `y_TN` backwards from the state `w` after them; fills inputs `x_TN` and the state `v` before."""
    sums = _sums(y_TN, counts)
    use_torch_threads()
    _inverse(y_TN.numpy(), w.numpy(), x_TN.numpy(), v.numpy(), sums, run, *_numbers(node, w))
    _add(counts, sums)


def adjoint(g_TN: Tensor, q: Tensor, u_TN: Tensor, dx_TN: Tensor, dv_0: Tensor, run: int, node: TwoGroups) -> None:
    """The gradient from the membranes `u_TN` of all steps; fills `dx_TN` and `dv_0`, which may be `q` itself."""
    use_torch_threads()
    _adjoint(
        g_TN.numpy(), q.numpy(), u_TN.numpy(), dx_TN.numpy(), dv_0.numpy(), run,
        *_numbers(node, u_TN), *_gradient_numbers(node, u_TN),
    )  # fmt: skip


def _numbers(node: TwoGroups, like: Tensor) -> tuple:
    """What every kernel takes of the node, in the compute dtype."""
    number = number_type(like)
    constants = (node.alpha, node.beta, node.leak, node.kappa, node.v_threshold, node.equation.v_reset)
    return *map(number, constants), RESETS.index(node.equation.reset)


def _gradient_numbers(node: TwoGroups, like: Tensor) -> tuple:
    """What the gradients take beside: a, and number and parameter of the surrogate."""
    number, surrogate = number_type(like), node.equation.surrogate
    a = number(0 if node.equation.detach_reset else 1)
    return a, FORMS[surrogate.name].kernel, number(surrogate.parameter)


def _sums(rows_TN: Tensor, counts: Tensor) -> np.ndarray:
    """Room for the spikes of every tile, step and group; none if nobody counts."""
    T, N = rows_TN.shape
    return np.zeros((_tiles(N) if counts.numel() else 0, T, 2), np.int64)


def _add(counts: Tensor, sums: np.ndarray) -> None:
    if counts.numel():
        counts.copy_(torch.from_numpy(sums.sum(0)))


def _tiles(neurons: int) -> int:
    return -(-(neurons // 2) // WIDTH)


@numba.njit(cache=True, error_model="numpy")
def _gather(row, group, lo, n, run, S, at):
    """S[at : at + n] <- pairs lo .. lo + n - 1 of one group, of a row [P, 2, run]."""
    i = 0
    while i < n:
        p, m = divmod(lo + i, run)
        length = min(run - m, n - i)
        first = (2 * p + group) * run + m
        S[at + i : at + i + length] = row[first : first + length]
        i += length


@numba.njit(cache=True, error_model="numpy")
def _scatter(S, at, row, group, lo, n, run):
    """The inverse of `_gather`."""
    i = 0
    while i < n:
        p, m = divmod(lo + i, run)
        length = min(run - m, n - i)
        first = (2 * p + group) * run + m
        row[first : first + length] = S[at + i : at + i + length]
        i += length


@numba.njit(cache=True, error_model="numpy")
def _count(S, theta, n, sums_2):
    """Add the spikes of the membranes in the scratch, of the n pairs that are there."""
    first = second = 0
    for i in range(n):
        first += S[U1 + i] >= theta
        second += S[U2 + i] >= theta
    sums_2[0] += first
    sums_2[1] += second


@numba.njit(cache=True, error_model="numpy")
def _step(S, alpha, beta, leak, kappa, theta, v_reset, reset):
    """One step: A (inputs) -> X (outputs), V and U, all in the scratch."""
    for i in range(WIDTH):
        x1, x2, v1, v2 = S[A1 + i], S[A2 + i], S[V1 + i], S[V2 + i]
        u1 = leak * v1 + kappa * x1
        s1 = fires(u1, theta, False)
        y1 = s1 + beta * x2
        w1 = after_reset(u1, s1, theta, reset, v_reset) + alpha * v2
        u2 = leak * w1 + kappa * y1
        s2 = fires(u2, theta, False)
        S[X1 + i], S[X2 + i] = y1, s2 + beta * x1
        S[V1 + i], S[V2 + i] = w1, after_reset(u2, s2, theta, reset, v_reset) + alpha * v1
        S[U1 + i], S[U2 + i] = u1, u2


@numba.njit(cache=True, error_model="numpy")
def _undo(S, alpha, beta, leak, kappa, theta, v_reset, reset):
    """One step backwards: A (outputs) -> X (inputs), V and U, all in the scratch."""
    for i in range(WIDTH):
        y1, y2, w1, w2 = S[A1 + i], S[A2 + i], S[V1 + i], S[V2 + i]
        u2 = leak * w1 + kappa * y1
        s2 = fires(u2, theta, False)
        x1 = (y2 - s2) / beta
        v1 = (w2 - after_reset(u2, s2, theta, reset, v_reset)) / alpha
        u1 = leak * v1 + kappa * x1
        s1 = fires(u1, theta, False)
        S[X1 + i], S[X2 + i] = x1, (y1 - s1) / beta
        S[V1 + i], S[V2 + i] = v1, (w1 - after_reset(u1, s1, theta, reset, v_reset)) / alpha
        S[U1 + i], S[U2 + i] = u1, u2


@numba.njit(cache=True, error_model="numpy")
def _through(slope, u, theta, v_reset, reset, a):
    """dr/du, the slope of the membrane after the reset in the one before it."""
    one = type(u)(1)
    if reset == SOFT:
        return one - a * theta * slope
    return (one - fires(u, theta, False)) + a * (v_reset - u) * slope


@numba.njit(cache=True, error_model="numpy")
def _pull(S, alpha, beta, leak, kappa, theta, v_reset, reset, a, kind, p):
    """The gradient of one step: G, Q, U -> X (dL/dx) and Q, all in the scratch."""
    fill_slope(S[U1 : U1 + WIDTH], S[S1 : S1 + WIDTH], theta, kind, p)
    fill_slope(S[U2 : U2 + WIDTH], S[S2 : S2 + WIDTH], theta, kind, p)
    for i in range(WIDTH):
        g1, g2, q1, q2 = S[G1 + i], S[G2 + i], S[Q1 + i], S[Q2 + i]
        slope1, slope2 = S[S1 + i], S[S2 + i]
        m2 = g2 * slope2 + q2 * _through(slope2, S[U2 + i], theta, v_reset, reset, a)
        to_y1, to_w1 = g1 + kappa * m2, q1 + leak * m2
        m1 = to_y1 * slope1 + to_w1 * _through(slope1, S[U1 + i], theta, v_reset, reset, a)
        S[X1 + i], S[X2 + i] = beta * g2 + kappa * m1, beta * to_y1
        S[Q1 + i], S[Q2 + i] = alpha * q2 + leak * m1, alpha * to_w1


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(x_TN, v_0, y_TN, v_T, u_TN, anchors_AN, sums, run, every, alpha, beta, leak, kappa, theta, v_reset, reset):
    T, N = x_TN.shape
    pairs = N // 2
    for tile in prange((pairs + WIDTH - 1) // WIDTH):
        lo = tile * WIDTH
        n = min(WIDTH, pairs - lo)
        S = np.zeros(SCRATCH, v_0.dtype)
        _gather(v_0, 0, lo, n, run, S, V1)
        _gather(v_0, 1, lo, n, run, S, V2)
        for t in range(T):
            _gather(x_TN[t], 0, lo, n, run, S, A1)
            _gather(x_TN[t], 1, lo, n, run, S, A2)
            _step(S, alpha, beta, leak, kappa, theta, v_reset, reset)
            _scatter(S, X1, y_TN[t], 0, lo, n, run)
            _scatter(S, X2, y_TN[t], 1, lo, n, run)
            if u_TN.shape[0] > 0:
                _scatter(S, U1, u_TN[t], 0, lo, n, run)
                _scatter(S, U2, u_TN[t], 1, lo, n, run)
            if (t + 1) % every == 0 and (t + 1) // every <= anchors_AN.shape[0]:
                _scatter(S, V1, anchors_AN[(t + 1) // every - 1], 0, lo, n, run)
                _scatter(S, V2, anchors_AN[(t + 1) // every - 1], 1, lo, n, run)
            if sums.shape[0] > 0:
                _count(S, theta, n, sums[tile, t])
        _scatter(S, V1, v_T, 0, lo, n, run)
        _scatter(S, V2, v_T, 1, lo, n, run)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _streamlined(
    g_TN, q, y_TN, v_T, anchors_AN, dx_TN, dv_0, sums, run, every,
    alpha, beta, leak, kappa, theta, v_reset, reset, a, kind, p,
):  # fmt: skip
    T, N = g_TN.shape
    pairs = N // 2
    for tile in prange((pairs + WIDTH - 1) // WIDTH):
        lo = tile * WIDTH
        n = min(WIDTH, pairs - lo)
        S = np.zeros(SCRATCH, v_T.dtype)
        _gather(q, 0, lo, n, run, S, Q1)
        _gather(q, 1, lo, n, run, S, Q2)
        _gather(v_T, 0, lo, n, run, S, V1)
        _gather(v_T, 1, lo, n, run, S, V2)
        for t in range(T - 1, -1, -1):
            if (t + 1) % every == 0 and (t + 1) // every <= anchors_AN.shape[0]:
                # a kept state takes the place of the rebuilt one
                _gather(anchors_AN[(t + 1) // every - 1], 0, lo, n, run, S, V1)
                _gather(anchors_AN[(t + 1) // every - 1], 1, lo, n, run, S, V2)
            _gather(y_TN[t], 0, lo, n, run, S, A1)
            _gather(y_TN[t], 1, lo, n, run, S, A2)
            _undo(S, alpha, beta, leak, kappa, theta, v_reset, reset)
            if sums.shape[0] > 0:
                _count(S, theta, n, sums[tile, t])
            _gather(g_TN[t], 0, lo, n, run, S, G1)
            _gather(g_TN[t], 1, lo, n, run, S, G2)
            _pull(S, alpha, beta, leak, kappa, theta, v_reset, reset, a, kind, p)
            _scatter(S, X1, dx_TN[t], 0, lo, n, run)
            _scatter(S, X2, dx_TN[t], 1, lo, n, run)
        _scatter(S, Q1, dv_0, 0, lo, n, run)
        _scatter(S, Q2, dv_0, 1, lo, n, run)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _inverse(y_TN, w, x_TN, v, sums, run, alpha, beta, leak, kappa, theta, v_reset, reset):
    T, N = y_TN.shape
    pairs = N // 2
    for tile in prange((pairs + WIDTH - 1) // WIDTH):
        lo = tile * WIDTH
        n = min(WIDTH, pairs - lo)
        S = np.zeros(SCRATCH, w.dtype)
        _gather(w, 0, lo, n, run, S, V1)
        _gather(w, 1, lo, n, run, S, V2)
        for t in range(T - 1, -1, -1):
            _gather(y_TN[t], 0, lo, n, run, S, A1)
            _gather(y_TN[t], 1, lo, n, run, S, A2)
            _undo(S, alpha, beta, leak, kappa, theta, v_reset, reset)
            if sums.shape[0] > 0:
                _count(S, theta, n, sums[tile, t])
            _scatter(S, X1, x_TN[t], 0, lo, n, run)
            _scatter(S, X2, x_TN[t], 1, lo, n, run)
        _scatter(S, V1, v, 0, lo, n, run)
        _scatter(S, V2, v, 1, lo, n, run)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _adjoint(g_TN, q, u_TN, dx_TN, dv_0, run, alpha, beta, leak, kappa, theta, v_reset, reset, a, kind, p):
    T, N = g_TN.shape
    pairs = N // 2
    for tile in prange((pairs + WIDTH - 1) // WIDTH):
        lo = tile * WIDTH
        n = min(WIDTH, pairs - lo)
        S = np.zeros(SCRATCH, q.dtype)
        _gather(q, 0, lo, n, run, S, Q1)
        _gather(q, 1, lo, n, run, S, Q2)
        for t in range(T - 1, -1, -1):
            _gather(u_TN[t], 0, lo, n, run, S, U1)
            _gather(u_TN[t], 1, lo, n, run, S, U2)
            _gather(g_TN[t], 0, lo, n, run, S, G1)
            _gather(g_TN[t], 1, lo, n, run, S, G2)
            _pull(S, alpha, beta, leak, kappa, theta, v_reset, reset, a, kind, p)
            _scatter(S, X1, dx_TN[t], 0, lo, n, run)
            _scatter(S, X2, dx_TN[t], 1, lo, n, run)
        _scatter(S, Q1, dv_0, 0, lo, n, run)
        _scatter(S, Q2, dv_0, 1, lo, n, run)
