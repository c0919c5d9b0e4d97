"""The scan of windows on CPU: numba, parallel over blocks of neurons, the loop over windows inside.

The membranes of a block stay in the first-level caches; loops over its neurons are innermost, short and free of
branches, so that the compiler vectorises them. The operations and their order are those of `reference`, in float32
without contraction, so that spikes agree bit for bit.
"""

import math

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.lif.cpu import HALF_BLOCK, after_reset, fill_slope, fires
from spikefit.ops.lif.equation import RESETS
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads
from spikefit.ops.window_scan import sine
from spikefit.ops.window_scan.equation import Equation
from spikefit.ops.window_scan.fusion import COMPILED

# Neurons per block: with four windows, backward works on 14 rows of 8 KiB.
WIDTH = 2048

A, C, SUM, MEAN, RELU, OMEGA = (COMPILED.index(name) for name in ("a", "c", "sum", "mean", "relu", "omega"))
NONE, HARD = RESETS.index("none"), RESETS.index("hard")

# float32 numbers: a Python float would promote float32 arithmetic to float64
ZERO, HALF, ONE, TWO = (np.float32(c) for c in (0, 0.5, 1, 2))
S0, S1, S2, S3 = (np.float32(c) for c in sine.S)
C0, C1, C2, C3 = (np.float32(c) for c in sine.C)
PER_PI, ROUNDER = np.float32(sine.PER_PI), np.float32(sine.ROUNDER)
PI_HIGH, PI_MIDDLE, PI_LOW = (np.float32(c) for c in (sine.PI_HIGH, sine.PI_MIDDLE, sine.PI_LOW))


def forward(
    x_RN: Tensor, given_PN: Tensor | None, spikes_PN: Tensor, m_PN: Tensor, phi: float, v_threshold: float,
    equation: Equation,
) -> None:  # fmt: skip
    """Fill `spikes_PN`, and the membranes `m_PN` unless it is empty.

    `x_RN` has P rows, or one row that every window reads; all but it and the spikes are float32.
    """
    if x_RN.dtype != torch.float32:
        for cut in _half_blocks(spikes_PN):
            width = cut.stop - cut.start
            spikes, m = torch.empty(len(spikes_PN), width), torch.empty(len(m_PN), width)
            given = None if given_PN is None else given_PN[:, cut].contiguous()
            forward(x_RN[:, cut].float(), given, spikes, m, phi, v_threshold, equation)
            spikes_PN[:, cut] = spikes
            if len(m_PN) > 0:
                m_PN[:, cut] = m
        return
    use_torch_threads()
    _forward(
        x_RN.numpy(), _rows(given_PN), spikes_PN.numpy(), m_PN.numpy(), np.array(equation.links.codes),
        *_numbers(phi, v_threshold, equation),
    )  # fmt: skip


def backward(
    g_PN: Tensor, q_PN: Tensor | None, x_RN: Tensor, given_PN: Tensor | None, dx_PN: Tensor, dgiven_PN: Tensor,
    phi: float, v_threshold: float, equation: Equation,
) -> None:  # fmt: skip
    """Fill `dx_PN`, and `dgiven_PN` unless it is empty; `g_PN`, `q_PN` are dL/ds and dL/dm (None for zeros)."""
    if x_RN.dtype != torch.float32:
        for cut in _half_blocks(g_PN):
            width = cut.stop - cut.start
            dx, dgiven = torch.empty(len(g_PN), width), torch.empty(len(dgiven_PN), width)
            q, given = (None if t is None else t[:, cut].contiguous() for t in (q_PN, given_PN))
            backward(g_PN[:, cut].float(), q, x_RN[:, cut].float(), given, dx, dgiven, phi, v_threshold, equation)
            dx_PN[:, cut] = dx
            if len(dgiven_PN) > 0:
                dgiven_PN[:, cut] = dgiven
        return
    slope: tuple = FORMS[equation.surrogate.name].kernel, np.float32(equation.surrogate.parameter)
    use_torch_threads()
    _backward(
        g_PN.numpy(), _rows(q_PN), x_RN.numpy(), _rows(given_PN), dx_PN.numpy(), dgiven_PN.numpy(),
        np.array(equation.links.codes), *_numbers(phi, v_threshold, equation), *slope,
    )  # fmt: skip


def _numbers(phi: float, v_threshold: float, equation: Equation) -> tuple:
    """What both kernels take of the equation."""
    constants = (phi * (math.pi / 2), equation.leak, v_threshold)
    reset = RESETS.index(equation.reset)
    return COMPILED.index(equation.fuse), *map(np.float32, constants), reset, equation.strict


def _rows(rows_PN: Tensor | None) -> np.ndarray:
    """[P, N], or [0, 0] for a tensor that is not there."""
    return np.empty((0, 0), np.float32) if rows_PN is None else rows_PN.numpy()


def _half_blocks(rows_PN: Tensor) -> list[slice]:
    """Cut the neurons so that about `HALF_BLOCK` elements are converted at a time."""
    P, N = rows_PN.shape
    width = max(WIDTH, HALF_BLOCK // P)
    return [slice(i, min(N, i + width)) for i in range(0, N, width)]


@numba.njit(cache=True, error_model="numpy")
def _reduced(y):
    """(r, (-1)^n) with y = n pi + r."""
    n = (y * PER_PI + ROUNDER) - ROUNDER
    r = ((y - n * PI_HIGH) - n * PI_MIDDLE) - n * PI_LOW
    odd = n - TWO * ((n * HALF + ROUNDER) - ROUNDER)
    return r, ONE - TWO * (odd * odd)


@numba.njit(cache=True, error_model="numpy")
def _sine(r, sign):
    z = r * r
    p = ((S3 * z + S2) * z + S1) * z + S0
    return sign * (r + r * z * p)


@numba.njit(cache=True, error_model="numpy")
def _cosine(r, sign):
    z = r * r
    p = ((C3 * z + C2) * z + C1) * z + C0
    return sign * ((ONE - HALF * z) + z * z * p)


@numba.njit(cache=True, error_model="numpy")
def _source(code, given_PN, made, zeros, lo, hi):
    """The block of neurons that a link reads; `code` is `Link.code`."""
    if code > 0:
        return given_PN[code - 1, lo:hi]
    if code < 0:
        return made[-code - 1, : hi - lo]
    return zeros[: hi - lo]


@numba.njit(cache=True, error_model="numpy")
def _fuse(a, c, out, fuse, h):
    """What the window starts from: `out`, or the source itself where nothing is to be computed."""
    if fuse == A:
        return a
    if fuse == C:
        return c
    if fuse == OMEGA:
        for i in range(out.size):
            r_a, sign_a = _reduced(h * a[i])
            r_c, sign_c = _reduced(h * c[i])
            out[i] = TWO * (_sine(r_a, sign_a) * _cosine(r_c, sign_c))
    elif fuse == SUM:
        for i in range(out.size):
            out[i] = a[i] + c[i]
    elif fuse == MEAN:
        for i in range(out.size):
            out[i] = HALF * (a[i] + c[i])
    elif fuse == RELU:
        for i in range(out.size):
            t = a[i] + c[i]
            out[i] = ZERO if t <= ZERO else t
    else:
        out[:] = ZERO
    return out


@numba.njit(cache=True, error_model="numpy")
def _fuse_back(a, c, d, da, dc, fuse, h):
    """da, dc <- d times the slope of the fusion in A and in C."""
    if fuse == OMEGA:
        scale = TWO * h
        for i in range(d.size):
            r_a, sign_a = _reduced(h * a[i])
            r_c, sign_c = _reduced(h * c[i])
            e = scale * d[i]
            da[i] = e * (_cosine(r_a, sign_a) * _cosine(r_c, sign_c))
            dc[i] = -e * (_sine(r_a, sign_a) * _sine(r_c, sign_c))
    elif fuse == RELU:
        for i in range(d.size):
            e = ZERO if a[i] + c[i] <= ZERO else d[i]
            da[i], dc[i] = e, e
    else:
        scale = HALF if fuse == MEAN else ONE
        for i in range(d.size):
            da[i], dc[i] = scale * d[i], scale * d[i]


@numba.njit(cache=True, error_model="numpy")
def _charge(x, r, u, leak):
    for i in range(u.size):
        u[i] = leak * r[i] + x[i]


@numba.njit(cache=True, error_model="numpy")
def _fire(u, s, theta, strict):
    if strict:
        for i in range(u.size):
            s[i] = ONE if u[i] > theta else ZERO
    else:
        for i in range(u.size):
            s[i] = ONE if u[i] >= theta else ZERO


@numba.njit(cache=True, error_model="numpy")
def _hand_on(u, m, theta, reset, strict):
    """m <- membrane after the reset; may be `u` itself."""
    if reset == HARD:
        for i in range(u.size):
            m[i] = u[i] * (ONE - fires(u[i], theta, strict))
    else:
        for i in range(u.size):
            m[i] = after_reset(u[i], fires(u[i], theta, strict), theta, reset, ZERO)


@numba.njit(cache=True, error_model="numpy")
def _copy(u, out):
    for i in range(u.size):  # a slice on the left takes twice the time
        out[i] = u[i]


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(x_RN, given_PN, spikes_PN, m_PN, codes, fuse, h, leak, theta, reset, strict):
    P, N = spikes_PN.shape
    for b in prange((N + WIDTH - 1) // WIDTH):
        lo, hi = b * WIDTH, min(N, (b + 1) * WIDTH)
        n = hi - lo
        made, start, zeros = np.empty((P, n), np.float32), np.empty(n, np.float32), np.zeros(n, np.float32)
        for p in range(P):
            a = _source(codes[2 * p], given_PN, made, zeros, lo, hi)
            c = _source(codes[2 * p + 1], given_PN, made, zeros, lo, hi)
            u = made[p]
            _charge(x_RN[p if x_RN.shape[0] > 1 else 0, lo:hi], _fuse(a, c, start, fuse, h), u, leak)
            _fire(u, spikes_PN[p, lo:hi], theta, strict)
            if reset != NONE:
                _hand_on(u, u, theta, reset, strict)
            if m_PN.shape[0] > 0:
                _copy(u, m_PN[p, lo:hi])


@numba.njit(cache=True, error_model="numpy")
def _to_input(g, slope, u, q, dm, dx, d, leak, theta, reset, strict):
    """dx <- D = dL/du of one window from dL/ds and the two parts of dL/dm, d <- leak D; `q` may be empty."""
    if q.size > 0:
        for i in range(dx.size):
            dm[i] += q[i]
    if reset == HARD:
        for i in range(dx.size):
            dm[i] = dm[i] * (ONE - fires(u[i], theta, strict))
    for i in range(dx.size):
        dx[i] = g[i] * slope[i] + dm[i]
    for i in range(dx.size):
        d[i] = leak * dx[i]


@numba.njit(cache=True, error_model="numpy")
def _add(code, d, dgiven_PN, dm, lo, hi):
    """Add the gradient of a source to that of the tensor it was read from."""
    if code > 0:
        if dgiven_PN.shape[0] > 0:
            out = dgiven_PN[code - 1, lo:hi]
            for i in range(d.size):
                out[i] += d[i]
    elif code < 0:
        out = dm[-code - 1, : hi - lo]
        for i in range(d.size):
            out[i] += d[i]


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _backward(
    g_PN, q_PN, x_RN, given_PN, dx_PN, dgiven_PN, codes, fuse, h, leak, theta, reset, strict, kind, parameter
):  # fmt: skip
    P, N = g_PN.shape
    for b in prange((N + WIDTH - 1) // WIDTH):
        lo, hi = b * WIDTH, min(N, (b + 1) * WIDTH)
        n = hi - lo
        u_all, d, zeros = np.empty((P, n), np.float32), np.empty(n, np.float32), np.zeros(n, np.float32)
        # without a reset the membrane handed on is the charged one
        made = u_all if reset == NONE else np.empty((P, n), np.float32)
        start, slope = np.empty(n, np.float32), np.empty(n, np.float32)
        for p in range(P):
            a = _source(codes[2 * p], given_PN, made, zeros, lo, hi)
            c = _source(codes[2 * p + 1], given_PN, made, zeros, lo, hi)
            _charge(x_RN[p if x_RN.shape[0] > 1 else 0, lo:hi], _fuse(a, c, start, fuse, h), u_all[p], leak)
            if reset != NONE:
                _hand_on(u_all[p], made[p], theta, reset, strict)

        dm, da, dc = np.zeros((P, n), np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        for p in range(dgiven_PN.shape[0]):
            dgiven_PN[p, lo:hi] = ZERO
        for p in range(P - 1, -1, -1):
            code_a, code_c = codes[2 * p], codes[2 * p + 1]
            fill_slope(u_all[p], slope, theta, kind, parameter)
            q = q_PN[p, lo:hi] if q_PN.shape[0] > 0 else zeros[:0]
            _to_input(g_PN[p, lo:hi], slope, u_all[p], q, dm[p], dx_PN[p, lo:hi], d, leak, theta, reset, strict)
            # a fusion with one source has no link in the place of the other
            if fuse in (A, C):
                _add(code_a, d, dgiven_PN, dm, lo, hi)
                _add(code_c, d, dgiven_PN, dm, lo, hi)
            elif code_a != 0 or code_c != 0:
                a = _source(code_a, given_PN, made, zeros, lo, hi)
                c = _source(code_c, given_PN, made, zeros, lo, hi)
                _fuse_back(a, c, d, da, dc, fuse, h)
                _add(code_a, da, dgiven_PN, dm, lo, hi)
                _add(code_c, dc, dgiven_PN, dm, lo, hi)
