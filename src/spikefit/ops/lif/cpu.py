"""The LIF sequence on CPU: numba, parallel over blocks of neurons, the loop over time inside.

A block is as many neurons as keep their T membranes in the cache, so the membrane of all steps never exists for a whole
layer. Half precision is converted block by block. The operations and their order are those of `reference`; fastmath is
off, so that spikes agree bit for bit.
"""

import math
from typing import cast

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.lif.equation import GRID_DIGITS, RESETS, Equation, GridLeak, grid_leak
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads

# Bytes of membrane that one block holds in its own buffers, half of a 1 MiB second-level cache: blocks as large as the
# cache allows read memory in the longest runs.
BLOCK_BYTES = 512 * 1024
# Elements converted at a time from and to half precision.
HALF_BLOCK = 1 << 20

NONE, SOFT, HARD = (RESETS.index(name) for name in ("none", "soft", "hard"))
ATAN = FORMS["atan"].kernel


def forward(x_RN: Tensor, v_0: Tensor, spikes_TN: Tensor, v_T: Tensor, coefficients, equation: Equation) -> None:
    """Fill `spikes_TN` and `v_T`; `x_RN` has T rows, or one row that every step reads."""
    if x_RN.dtype in (torch.float16, torch.bfloat16):
        for cut in _half_blocks(spikes_TN):
            scratch = torch.empty_like(spikes_TN[:, cut], dtype=torch.float32)
            forward(x_RN[:, cut].float(), v_0[cut], scratch, v_T[cut], coefficients, equation)
            spikes_TN[:, cut] = scratch
        return
    number = number_type(v_0)
    leak, gain, theta = map(number, coefficients)
    use_torch_threads()
    _forward(
        x_RN.numpy(),
        values_of(v_0),
        spikes_TN.numpy(),
        v_T.numpy(),
        leak,
        gain,
        theta,
        RESETS.index(equation.reset),
        number(equation.v_reset),
        number(equation.v_rest),
        equation.strict,
        grid_numbers(equation, leak, v_0),
        block_size(1, v_0),
    )


def backward(
    g_TN: Tensor,
    q: Tensor,
    x_RN: Tensor,
    v_0: Tensor,
    spikes_TN: Tensor | None,
    dx_TN: Tensor,
    dv_0: Tensor,
    coefficients,
    equation: Equation,
    want_coefficients: bool,
) -> Tensor:
    """Fill `dx_TN` and `dv_0` (unless it is empty); returns d(leak, gain, v_threshold) [3], zeros unless wanted."""
    if x_RN.dtype in (torch.float16, torch.bfloat16):
        total = torch.zeros(3, dtype=v_0.dtype)
        for cut in _half_blocks(g_TN):
            scratch = torch.empty_like(g_TN[:, cut], dtype=torch.float32)
            total += backward(
                g_TN[:, cut].float(),
                q[cut],
                x_RN[:, cut].float(),
                v_0[cut],
                None if spikes_TN is None else spikes_TN[:, cut].float(),
                scratch,
                dv_0[cut],
                coefficients,
                equation,
                want_coefficients,
            )
            dx_TN[:, cut] = scratch
        return total
    number = number_type(v_0)
    leak, gain, theta = map(number, coefficients)
    form, detached = FORMS[equation.surrogate.name], equation.detach_reset
    # the default neuron works in the memory of dx, with v and q in buffers; the others hold u of all steps
    in_place = form.kernel == ATAN and equation.reset == "soft" and not want_coefficients
    block = block_size(2 if in_place else g_TN.shape[0], v_0)
    sums = np.zeros((-(-v_0.numel() // block), 3))
    use_torch_threads()
    _backward(
        g_TN.numpy(),
        values_of(q),
        x_RN.numpy(),
        values_of(v_0),
        (g_TN[:0] if spikes_TN is None else spikes_TN).numpy(),
        dx_TN.numpy(),
        dv_0.numpy(),
        sums,
        leak,
        gain,
        theta,
        RESETS.index(equation.reset),
        number(equation.v_reset),
        number(equation.v_rest),
        equation.strict,
        grid_numbers(equation, leak, v_0),
        number(0 if detached else 1),
        form.kernel,
        number(equation.surrogate.parameter),
        block,
        in_place,
        want_coefficients,
    )
    return torch.from_numpy(sums.sum(0)).to(v_0.dtype) if want_coefficients else v_0.new_zeros(3)


def values_of(v_N: Tensor) -> np.ndarray:
    """[N], or [1] for one repeated value."""
    return (v_N if v_N.stride(0) else v_N[:1]).numpy()


def number_type(v: Tensor):
    """The numpy scalar type of the compute dtype: a Python float would promote float32 arithmetic to float64."""
    return np.float64 if v.dtype == torch.float64 else np.float32


def grid_numbers(equation: Equation, leak: float, v: Tensor) -> tuple:
    """(1 / step, step, 2^-m, 1 - 2^-m as leak?, range in steps, NaN) of a grid in the compute dtype; 0 without one."""
    number = number_type(v)
    if equation.frac_bits is None:
        return (number(0),) * 6
    form, scale = cast(GridLeak, grid_leak(float(leak))), 2.0**equation.frac_bits
    return tuple(map(number, (scale, 1 / scale, 2.0**-form.shift, form.ties, 2.0 ** (GRID_DIGITS - 1), math.nan)))


def block_size(rows: int, v_0: Tensor) -> int:
    """Neurons per block that holds `rows` membranes: a multiple of 16, at least 64; small layers still fill 8 cores."""
    most = min(BLOCK_BYTES // (rows * v_0.element_size()), v_0.numel() // 32)
    return max(64, most // 16 * 16)


def _half_blocks(rows: Tensor) -> list[slice]:
    """Cut the neurons so that about `HALF_BLOCK` elements are converted at a time."""
    T, N = rows.shape
    width = max(64, HALF_BLOCK // T)
    return [slice(i, min(N, i + width)) for i in range(0, N, width)]


@numba.njit(cache=True, error_model="numpy")
def block_state(v_N, lo, hi):
    """A copy of v_N[lo:hi]; an array of one value stands for that value repeated."""
    v = np.empty(hi - lo, v_N.dtype)
    fill(v, v_N, lo)
    return v


@numba.njit(cache=True, error_model="numpy")
def fill(v, v_N, lo):
    """v <- v_N[lo : lo + v.size], or the one value of v_N repeated."""
    if v_N.size == 1:
        v[:] = v_N[0]
    else:
        v[:] = v_N[lo : lo + v.size]


@numba.njit(cache=True, error_model="numpy")
def charge_on_grid(v, x, gain, grid):
    """The membrane before the reset, `grid` being `grid_numbers`; NaN, which stays, once it leaves the range."""
    scale, step, inverse, ties, limit, nan = grid
    whole = np.floor(v * scale)
    kept = np.floor(whole * inverse)
    if ties != 0:
        kept = whole - kept
    u = kept + np.rint(gain * x * scale)
    return u * step if abs(u) < limit else nan


@numba.njit(cache=True, error_model="numpy")
def charge(v, x, leak, gain, v_rest, grid):
    """The membrane before the reset."""
    if grid[0] != 0:
        return charge_on_grid(v, x, gain, grid)
    return leak * v + gain * x if v_rest == 0 else v_rest + leak * (v - v_rest) + gain * x


@numba.njit(cache=True, error_model="numpy")
def fires(u, theta, strict):
    """1 where u reaches theta, else 0."""
    return type(u)(1) if u > theta or (u == theta and not strict) else type(u)(0)


@numba.njit(cache=True, error_model="numpy")
def after_reset(u, s, theta, reset, v_reset):
    """The membrane after the reset."""
    return u - theta * s if reset == SOFT else u + s * (v_reset - u) if reset == HARD else u


@numba.njit(cache=True, error_model="numpy")
def _advance(x, v, s, leak, gain, theta, reset, v_reset, v_rest, strict, grid):
    """One step: s <- spikes, v <- membrane after the reset."""
    for i in range(v.size):
        u = charge(v[i], x[i], leak, gain, v_rest, grid)
        fired = fires(u, theta, strict)
        s[i] = fired
        v[i] = after_reset(u, fired, theta, reset, v_reset)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(x_RN, v_0, spikes_TN, v_T, leak, gain, theta, reset, v_reset, v_rest, strict, grid, block):
    T, N = spikes_TN.shape
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        v = v_T[lo:hi]
        fill(v, v_0, lo)
        for t in range(T):
            x = x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi]
            _advance(x, v, spikes_TN[t, lo:hi], leak, gain, theta, reset, v_reset, v_rest, strict, grid)


@numba.njit(cache=True, error_model="numpy")
def _rebuild(x, v, u, s, given, leak, gain, theta, reset, v_reset, v_rest, strict, grid):
    """One step again: u <- membrane before the reset, v <- after it; resets where `s` fired if `given`."""
    if given:
        for i in range(v.size):
            u[i] = charge(v[i], x[i], leak, gain, v_rest, grid)
            v[i] = after_reset(u[i], s[i], theta, reset, v_reset)
    else:
        for i in range(v.size):
            charged = charge(v[i], x[i], leak, gain, v_rest, grid)
            u[i] = charged
            v[i] = after_reset(charged, fires(charged, theta, strict), theta, reset, v_reset)


@numba.njit(cache=True, error_model="numpy")
def atan_slope(u, theta, p):
    one, half, scale = type(u)(1), type(u)(0.5), type(u)(math.pi / 2) * p
    d = scale * (u - theta)
    return half * p / (one + d * d)


@numba.njit(cache=True, error_model="numpy")
def fill_slope(u, out, theta, kind, p):
    """out <- surrogate slope at u - theta; `kind` is `Form.kernel` of the surrogate."""
    one, half = u.dtype.type(1), u.dtype.type(0.5)
    if kind == ATAN:
        for i in range(u.size):
            out[i] = atan_slope(u[i], theta, p)
    elif kind == 1:
        for i in range(u.size):
            out[i] = max(one - abs(u[i] - theta) / p, one - one) / p
    elif kind == 2:
        for i in range(u.size):
            out[i] = one / p if abs(u[i] - theta) < half * p else one - one
    elif kind == 3:
        for i in range(u.size):
            out[i] = one / p if abs(u[i] - theta) <= half * p else one - one
    elif kind == 4:
        for i in range(u.size):
            e = one / (one + np.exp(-p * (u[i] - theta)))
            out[i] = p * e * (one - e)
    else:
        for i in range(u.size):
            d = one + p * abs(u[i] - theta)
            out[i] = one / (d * d)


@numba.njit(cache=True, error_model="numpy")
def to_membrane(g, slope, q, u, fired, theta, reset, v_reset, a):
    """D = dL/du of one neuron and step, from g = dL/ds and q = dL/dv."""
    one = type(u)(1)
    if reset == SOFT:
        return g * slope + q * (one - a * theta * slope)
    if reset == HARD:
        return g * slope + q * ((one - fired) + a * (v_reset - u) * slope)
    return g * slope + q


@numba.njit(cache=True, error_model="numpy")
def adjoint(u, s, given, slope, g, q, dx, leak, gain, theta, reset, v_reset, strict, a):
    """One step back: dx <- gain D, q <- leak D."""
    for i in range(u.size):
        fired = s[i] if given else fires(u[i], theta, strict)
        d = to_membrane(g[i], slope[i], q[i], u[i], fired, theta, reset, v_reset, a)
        dx[i], q[i] = gain * d, leak * d


@numba.njit(cache=True, error_model="numpy")
def _adjoint_soft_atan(u_dx, g, q, leak, gain, theta, a, p):
    """`_slope` and `adjoint` of the default neuron in one loop and in place: dL/dx takes the place of the membrane."""
    for i in range(u_dx.size):
        u = u_dx[i]
        slope = atan_slope(u, theta, p)
        d = to_membrane(g[i], slope, q[i], u, u, theta, SOFT, u, a)
        u_dx[i], q[i] = gain * d, leak * d


@numba.njit(cache=True, error_model="numpy")
def _one_step_soft_atan(x, v, g, q, dx, leak, gain, theta, v_rest, grid, a, p):
    """`_rebuild` and `_adjoint_soft_atan` of a single step in one loop; `q` is one value for all neurons."""
    for i in range(x.size):
        u = charge(v[i], x[i], leak, gain, v_rest, grid)
        dx[i] = gain * to_membrane(g[i], atan_slope(u, theta, p), q, u, u, theta, SOFT, u, a)


@numba.njit(cache=True, error_model="numpy")
def _add_sums(out_3, u, s, given, slope, g, q, v, x, theta, reset, v_reset, v_rest, strict, a):
    """Add the share of one step in d(leak, gain, theta), before `adjoint`; `v` is where the step starts."""
    d_leak = d_gain = d_theta = 0.0
    for i in range(u.size):
        fired = s[i] if given else fires(u[i], theta, strict)
        d = to_membrane(g[i], slope[i], q[i], u[i], fired, theta, reset, v_reset, a)
        d_leak += d * (v[i] - v_rest)
        d_gain += d * x[i]
        d_theta -= g[i] * slope[i]
        if reset == SOFT:
            d_theta += q[i] * (a * theta * slope[i] - fired)
        elif reset == HARD:
            d_theta -= q[i] * (a * (v_reset - u[i]) * slope[i])
    out_3[0] += d_leak
    out_3[1] += d_gain
    out_3[2] += d_theta


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _backward(
    g_TN, q_N, x_RN, v_0, spikes_TN, dx_TN, dv_0, sums,
    leak, gain, theta, reset, v_reset, v_rest, strict, grid, a, kind, p, block, in_place, want_coefficients,
):  # fmt: skip
    T, N = g_TN.shape
    given = spikes_TN.shape[0] > 0
    alone = in_place and T == 1 and v_0.size == N and q_N.size == 1 and dv_0.size == 0
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        if alone:
            x, g, dx = x_RN[0, lo:hi], g_TN[0, lo:hi], dx_TN[0, lo:hi]
            _one_step_soft_atan(x, v_0[lo:hi], g, q_N[0], dx, leak, gain, theta, v_rest, grid, a, p)
            continue
        n = hi - lo
        # v_all[t] is the membrane that step t starts from, kept only for the gradient of leak
        u_all = np.empty((0 if in_place else T, n), v_0.dtype)
        v_all = np.empty((T if want_coefficients else 0, n), v_0.dtype)
        v, slope = block_state(v_0, lo, hi), np.empty(n, v_0.dtype)
        for t in range(T):
            if want_coefficients:
                v_all[t] = v
            x, u = x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi], dx_TN[t, lo:hi] if in_place else u_all[t]
            s = spikes_TN[t, lo:hi] if given else u
            _rebuild(x, v, u, s, given, leak, gain, theta, reset, v_reset, v_rest, strict, grid)

        q = block_state(q_N, lo, hi)
        for t in range(T - 1, -1, -1):
            g, dx = g_TN[t, lo:hi], dx_TN[t, lo:hi]
            if in_place:
                _adjoint_soft_atan(dx, g, q, leak, gain, theta, a, p)
                continue
            u = u_all[t]
            s = spikes_TN[t, lo:hi] if given else u
            fill_slope(u, slope, theta, kind, p)
            if want_coefficients:
                x = x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi]
                _add_sums(sums[b], u, s, given, slope, g, q, v_all[t], x, theta, reset, v_reset, v_rest, strict, a)
            adjoint(u, s, given, slope, g, q, dx, leak, gain, theta, reset, v_reset, strict, a)
        if dv_0.size > 0:
            dv_0[lo:hi] = q
