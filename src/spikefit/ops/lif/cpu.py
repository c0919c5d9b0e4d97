"""The LIF sequence on CPU: numba, parallel over blocks of neurons, the loop over time inside.

A block is as many neurons as keep their T membranes in the cache, so the membrane of all steps never exists for a whole
layer. Half precision is converted block by block. The operations and their order are those of `reference`; fastmath is
off, so that spikes agree bit for bit.
"""

import math

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.lif.equation import RESETS, Equation
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads

# Bytes of membrane that one block holds in backward; half of a common 512 KiB second-level cache.
BLOCK_BYTES = 128 * 1024
# Elements converted at a time from and to half precision.
HALF_BLOCK = 1 << 20

NONE, SOFT, HARD = (RESETS.index(name) for name in ("none", "soft", "hard"))


def forward(x_RN: Tensor, v_0: Tensor, spikes_TN: Tensor, v_T: Tensor, coefficients, equation: Equation) -> None:
    """Fill `spikes_TN` and `v_T`; `x_RN` has T rows, or one row that every step reads."""
    if x_RN.dtype in (torch.float16, torch.bfloat16):
        for cut in _half_blocks(spikes_TN):
            scratch = torch.empty_like(spikes_TN[:, cut], dtype=torch.float32)
            forward(x_RN[:, cut].float(), v_0[cut], scratch, v_T[cut], coefficients, equation)
            spikes_TN[:, cut] = scratch
        return
    number = _number(v_0)
    leak, gain, theta = map(number, coefficients)
    use_torch_threads()
    _forward(
        x_RN.numpy(),
        v_0.numpy(),
        spikes_TN.numpy(),
        v_T.numpy(),
        leak,
        gain,
        theta,
        RESETS.index(equation.reset),
        number(equation.v_reset),
        number(equation.v_rest),
        equation.strict,
        _block(spikes_TN.shape[0], v_0.element_size()),
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
    """Fill `dx_TN` and `dv_0`; returns d(leak, gain, v_threshold) [3], zeros unless wanted."""
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
    number = _number(v_0)
    leak, gain, theta = map(number, coefficients)
    block = _block(g_TN.shape[0], v_0.element_size())
    sums = np.zeros((-(-v_0.numel() // block), 3))
    use_torch_threads()
    _backward(
        g_TN.numpy(),
        q.numpy(),
        x_RN.numpy(),
        v_0.numpy(),
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
        number(0 if equation.detach_reset else 1),
        FORMS[equation.surrogate.name].kernel,
        number(equation.surrogate.parameter),
        block,
        want_coefficients,
    )
    return torch.from_numpy(sums.sum(0)).to(v_0.dtype)


def _number(v: Tensor):
    """The numpy scalar type of the compute dtype: a Python float would promote float32 arithmetic to float64."""
    return np.float64 if v.dtype == torch.float64 else np.float32


def _block(T: int, element_size: int) -> int:
    """Neurons per block: a multiple of 16, at least 64, at most 2048."""
    return max(64, min(2048, BLOCK_BYTES // (T * element_size) // 16 * 16))


def _half_blocks(rows: Tensor) -> list[slice]:
    """Cut the neurons so that about `HALF_BLOCK` elements are converted at a time."""
    T, N = rows.shape
    width = max(64, HALF_BLOCK // T)
    return [slice(i, min(N, i + width)) for i in range(0, N, width)]


@numba.njit(cache=True, error_model="numpy")
def _charge(v, x, u, leak, gain, v_rest):
    """u <- membrane before the reset; `u` may be `v`."""
    if v_rest == 0:
        for i in range(u.size):
            u[i] = leak * v[i] + gain * x[i]
    else:
        for i in range(u.size):
            u[i] = v_rest + leak * (v[i] - v_rest) + gain * x[i]


@numba.njit(cache=True, error_model="numpy")
def _fire(u, s, theta, strict):
    """s <- 1 where u reaches theta, else 0."""
    one, zero = u.dtype.type(1), u.dtype.type(0)
    if strict:
        for i in range(u.size):
            s[i] = one if u[i] > theta else zero
    else:
        for i in range(u.size):
            s[i] = one if u[i] >= theta else zero


@numba.njit(cache=True, error_model="numpy")
def _reset(u, s, v, theta, reset, v_reset):
    """v <- membrane after the reset; `v` may be `u`."""
    if reset == SOFT:
        for i in range(v.size):
            v[i] = u[i] - theta * s[i]
    elif reset == HARD:
        for i in range(v.size):
            v[i] = u[i] + s[i] * (v_reset - u[i])
    else:
        for i in range(v.size):
            v[i] = u[i]


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(x_RN, v_0, spikes_TN, v_T, leak, gain, theta, reset, v_reset, v_rest, strict, block):
    T, N = spikes_TN.shape
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        v = v_0[lo:hi].copy()
        for t in range(T):
            s = spikes_TN[t, lo:hi]
            _charge(v, x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi], v, leak, gain, v_rest)
            _fire(v, s, theta, strict)
            _reset(v, s, v, theta, reset, v_reset)
        v_T[lo:hi] = v


@numba.njit(cache=True, error_model="numpy")
def _slope(u, out, theta, kind, p):
    """out <- surrogate slope at u - theta; `kind` is `Form.kernel` of the surrogate."""
    one, half = u.dtype.type(1), u.dtype.type(0.5)
    if kind == 0:
        scale = u.dtype.type(math.pi / 2) * p
        for i in range(u.size):
            d = scale * (u[i] - theta)
            out[i] = half * p / (one + d * d)
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


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _backward(
    g_TN, q_N, x_RN, v_0, spikes_TN, dx_TN, dv_0, sums,
    leak, gain, theta, reset, v_reset, v_rest, strict, a, kind, p, block, want_coefficients,
):  # fmt: skip
    T, N = g_TN.shape
    given, one = spikes_TN.shape[0] > 0, v_0.dtype.type(1)
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        n = hi - lo
        u_all = np.empty((T, n), v_0.dtype)
        v, s, slope = v_0[lo:hi].copy(), np.empty(n, v_0.dtype), np.empty(n, v_0.dtype)
        for t in range(T):
            _charge(v, x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi], u_all[t], leak, gain, v_rest)
            if given:
                s[:] = spikes_TN[t, lo:hi]
            else:
                _fire(u_all[t], s, theta, strict)
            _reset(u_all[t], s, v, theta, reset, v_reset)

        q = q_N[lo:hi].copy()
        for t in range(T - 1, -1, -1):
            u, g, dx = u_all[t], g_TN[t, lo:hi], dx_TN[t, lo:hi]
            _slope(u, slope, theta, kind, p)
            if given:
                s[:] = spikes_TN[t, lo:hi]
            else:
                _fire(u, s, theta, strict)
            if want_coefficients:
                for i in range(n):
                    if reset == SOFT:
                        c = -s[i] + a * theta * slope[i]
                    elif reset == HARD:
                        c = -a * (v_reset - u[i]) * slope[i]
                    else:
                        c = one - one
                    sums[b, 2] += -g[i] * slope[i] + q[i] * c
            if reset == SOFT:
                for i in range(n):
                    q[i] = g[i] * slope[i] + q[i] * (one - a * theta * slope[i])
            elif reset == HARD:
                for i in range(n):
                    q[i] = g[i] * slope[i] + q[i] * ((one - s[i]) + a * (v_reset - u[i]) * slope[i])
            else:
                for i in range(n):
                    q[i] = g[i] * slope[i] + q[i]
            if want_coefficients:
                if t == 0:
                    v[:] = v_0[lo:hi]
                else:
                    if given:
                        s[:] = spikes_TN[t - 1, lo:hi]
                    else:
                        _fire(u_all[t - 1], s, theta, strict)
                    _reset(u_all[t - 1], s, v, theta, reset, v_reset)
                x = x_RN[t if x_RN.shape[0] > 1 else 0, lo:hi]
                for i in range(n):
                    sums[b, 0] += q[i] * (v[i] - v_rest)
                    sums[b, 1] += q[i] * x[i]
            for i in range(n):
                dx[i] = gain * q[i]
                q[i] = leak * q[i]
        dv_0[lo:hi] = q
