"""Membranes on a grid on CPU: numba, forward with what the leak loses, and backward that undoes it; see `reference`.

Blocks as in `cpu`. Numbers are whole in units of the grid, and exact, so that spikes and membranes are those of the
reference bit for bit; see `grid_arithmetic`.
"""

import numba
import numpy as np
from numba import prange
from torch import Tensor

from spikefit.ops.lif.cpu import (
    SOFT,
    adjoint,
    after_reset,
    block_size,
    block_state,
    charge_on_grid,
    fill_slope,
    fires,
    grid_numbers,
    number_type,
    values_of,
)
from spikefit.ops.lif.equation import Equation
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads


def forward(
    x_TN: Tensor, v_0: Tensor, spikes_TN: Tensor, v_T: Tensor, lost_TN: Tensor, coefficients, equation: Equation
) -> None:
    """Fill `spikes_TN`, `v_T` and `lost_TN`; float32 or float64."""
    number = number_type(v_0)
    _, gain, theta = map(number, coefficients)
    grid = grid_numbers(equation, coefficients[0], v_0)
    use_torch_threads()
    _forward(
        x_TN.numpy(), values_of(v_0), spikes_TN.numpy(), v_T.numpy(), lost_TN.numpy(), gain, theta, equation.strict,
        grid, block_size(1, v_0),
    )  # fmt: skip


def backward(
    g_TN: Tensor,
    q: Tensor,
    x_TN: Tensor,
    v_T: Tensor,
    spikes_TN: Tensor,
    lost_TN: Tensor,
    dx_TN: Tensor,
    dv_0: Tensor,
    v_0: Tensor,
    coefficients,
    equation: Equation,
) -> None:
    """Fill `dx_TN`, `dv_0` and `v_0`; float32 or float64."""
    number = number_type(v_T)
    leak, gain, theta = map(number, coefficients)
    use_torch_threads()
    _backward(
        g_TN.numpy(), values_of(q), x_TN.numpy(), values_of(v_T), spikes_TN.numpy(), lost_TN.numpy(), dx_TN.numpy(),
        dv_0.numpy(), v_0.numpy(), leak, gain, theta, equation.strict, grid_numbers(equation, coefficients[0], v_T),
        number(0 if equation.detach_reset else 1), FORMS[equation.surrogate.name].kernel,
        number(equation.surrogate.parameter), block_size(4, v_T),
    )  # fmt: skip


@numba.njit(cache=True, error_model="numpy")
def _advance(x, v, s, lost, gain, theta, strict, grid):
    """One step: s <- spikes, v <- membrane after the reset, lost <- what the leak forgets of v."""
    scale, inverse, ties = grid[0], grid[2], grid[3]
    power = type(inverse)(1) / inverse
    last = power - type(inverse)(1)
    for i in range(v.size):
        whole = np.floor(v[i] * scale)
        digits = whole - np.floor(whole * inverse) * power
        lost[i] = np.uint8(digits == last) if ties != 0 else np.uint8(digits)
        u = charge_on_grid(v[i], x[i], gain, grid)
        fired = fires(u, theta, strict)
        s[i] = fired
        v[i] = after_reset(u, fired, theta, SOFT, u)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(x_TN, v_0, spikes_TN, v_T, lost_TN, gain, theta, strict, grid, block):
    T, N = spikes_TN.shape
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        v = block_state(v_0, lo, hi)
        for t in range(T):
            _advance(x_TN[t, lo:hi], v, spikes_TN[t, lo:hi], lost_TN[t, lo:hi], gain, theta, strict, grid)
        v_T[lo:hi] = v


@numba.njit(cache=True, error_model="numpy")
def _undo(x, v, u, s, lost, gain, theta, grid):
    """One step undone: u <- membrane before the reset, v <- membrane before the step."""
    scale, step, inverse, ties = grid[0], grid[1], grid[2], grid[3]
    power = type(inverse)(1) / inverse
    last = power - type(inverse)(1)
    for i in range(v.size):
        charged = v[i] + theta * s[i]
        kept = charged * scale - np.rint(gain * x[i] * scale)
        digits = type(scale)(lost[i])
        v[i] = (kept + np.floor(kept / last) - digits if ties != 0 else kept * power + digits) * step
        u[i] = charged


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _backward(
    g_TN, q_N, x_TN, v_T, spikes_TN, lost_TN, dx_TN, dv_0, v_0, leak, gain, theta, strict, grid, a, kind, p, block,
):  # fmt: skip
    T, N = g_TN.shape
    for b in prange((N + block - 1) // block):
        lo, hi = b * block, min(N, (b + 1) * block)
        v, q = block_state(v_T, lo, hi), block_state(q_N, lo, hi)
        u, slope = np.empty_like(v), np.empty_like(v)
        for t in range(T - 1, -1, -1):
            s = spikes_TN[t, lo:hi]
            _undo(x_TN[t, lo:hi], v, u, s, lost_TN[t, lo:hi], gain, theta, grid)
            fill_slope(u, slope, theta, kind, p)
            adjoint(u, s, True, slope, g_TN[t, lo:hi], q, dx_TN[t, lo:hi], leak, gain, theta, SOFT, u[0], strict, a)
        dv_0[lo:hi], v_0[lo:hi] = q, v
