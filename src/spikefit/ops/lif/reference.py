"""The meaning of the LIF sequence, in plain torch. Shapes: T time steps, B batch, N neurons (all trailing axes).

Arithmetic is float32 (float64 for float64 input); spikes take the dtype of the input, membranes stay in the compute
dtype. Simple on purpose: the kernels are tested against this file.

Source: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948; the equations stand in `Equation`.
"""

from typing import cast

import torch
from torch import Tensor

from spikefit.errors import RangeError
from spikefit.ops.lif.equation import GRID_DIGITS, Equation, GridLeak, grid_leak
from spikefit.ops.lif.grid_arithmetic import leaked, lost, unleaked
from spikefit.ops.surrogate import Surrogate
from spikefit.ops.values import has_values

Scalar = float | Tensor


class Fire(torch.autograd.Function):
    """s = [d >= 0] (or d > 0 when strict) with the slope of the surrogate in backward."""

    @staticmethod
    def forward(ctx, d: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        ctx.save_for_backward(d)
        ctx.surrogate = surrogate
        return (d > 0 if strict else d >= 0).to(d.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        (d,) = ctx.saved_tensors
        return g * ctx.surrogate.slope(d), None, None


def charge(x: Tensor, v: Tensor, leak: Scalar, gain: Scalar, equation: Equation) -> Tensor:
    """u = v_rest + leak (v - v_rest) + gain x, in the dtype of v."""
    x = x.to(v.dtype)
    if equation.frac_bits is not None:
        return _charge_on_grid(x, v, leak, gain, equation.frac_bits)
    if equation.v_rest == 0:
        return leak * v + gain * x
    return equation.v_rest + leak * (v - equation.v_rest) + gain * x


class StraightThrough(torch.autograd.Function):
    """`rounded`, with the gradient of `exact`."""

    @staticmethod
    def forward(ctx, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None


def _charge_on_grid(x: Tensor, v: Tensor, leak: Scalar, gain: Scalar, frac_bits: int) -> Tensor:
    """u = `leaked`(v) + round(gain x) on the grid of 2^-frac_bits; the gradient is that without rounding.

    Sums of numbers on the grid are exact as long as they have at most 24 digits, which is checked.
    """
    unit, form = 2.0**-frac_bits, cast(GridLeak, grid_leak(float(leak)))
    kept = StraightThrough.apply(leak * v, leaked(torch.floor(v.detach() / unit), form) * unit)
    u = kept + StraightThrough.apply(gain * x, rounded(gain * x.detach(), frac_bits))
    check_range(u.detach(), frac_bits)
    return u


def rounded(x: Tensor, frac_bits: int) -> Tensor:
    """The nearest multiple of 2^-frac_bits, half to even."""
    return torch.round(x * 2.0**frac_bits) * 2.0**-frac_bits


def check_range(u: Tensor, frac_bits: int) -> None:
    """Raise RangeError unless the membranes `u` have few enough digits for exact sums."""
    limit = 2.0 ** (GRID_DIGITS - 1 - frac_bits)
    if not has_values(u):
        return
    largest = float(u.abs().amax())
    if not largest < limit:
        raise RangeError(
            f"lif: expected membranes below {limit:g}, what a grid of 2^-{frac_bits} holds exactly, got {largest:g}; "
            "lower frac_bits, or normalise the input."
        )


def after_reset(u: Tensor, s: Tensor, v_threshold: Scalar, equation: Equation) -> Tensor:
    """The membrane after the reset; `s` in the dtype of `u`, already detached if the reset carries no gradient."""
    if equation.reset == "soft":
        return u - v_threshold * s
    if equation.reset == "hard":
        return u + s * (equation.v_reset - u)
    return u


def fire(u: Tensor, v_threshold: Scalar, equation: Equation) -> Tensor:
    """s = [u >= theta], differentiable through the surrogate."""
    return Fire.apply(u - v_threshold, equation.surrogate, equation.strict)


def lif(
    x_TBN: Tensor, v_BN: Tensor, *, leak: Scalar, gain: Scalar, v_threshold: Scalar, equation: Equation
) -> tuple[Tensor, Tensor]:
    """Run T steps by plain autograd; returns (spikes [T, B, N], last membrane [B, N])."""
    spikes = []
    for x_BN in x_TBN.unbind(0):
        u_BN = charge(x_BN, v_BN, leak, gain, equation)
        s_BN = fire(u_BN, v_threshold, equation)
        v_BN = after_reset(u_BN, s_BN.detach() if equation.detach_reset else s_BN, v_threshold, equation)
        spikes.append(s_BN.to(x_TBN.dtype))
    return torch.stack(spikes), v_BN


def follow(
    x_TBN: Tensor,
    v_BN: Tensor,
    spikes_TBN: Tensor,
    *,
    leak: Scalar,
    gain: Scalar,
    v_threshold: Scalar,
    equation: Equation,
) -> Tensor:
    """The membrane [B, N] after T steps whose spikes are given instead of thresholded."""
    for x_BN, s_BN in zip(x_TBN.unbind(0), spikes_TBN.unbind(0), strict=True):
        u_BN = charge(x_BN, v_BN, leak, gain, equation)
        v_BN = after_reset(u_BN, s_BN.to(u_BN.dtype), v_threshold, equation)
    return v_BN


def undo(
    x_BN: Tensor, v_BN: Tensor, s_BN: Tensor, *, leak: Scalar, gain: Scalar, v_threshold: Scalar, equation: Equation
) -> Tensor:
    """The membrane [B, N] before a step with a soft reset, from the one after it; on a grid `undo_on_grid`.

        u = v' + theta s,   v = (u - gain x - (1 - leak) v_rest) / leak

    Rounding grows by 1/leak.
    """
    u_BN = v_BN + v_threshold * s_BN.to(v_BN.dtype)
    return (u_BN - gain * x_BN.to(v_BN.dtype) - equation.v_rest) / leak + equation.v_rest


def undo_on_grid(
    x_BN: Tensor,
    v_BN: Tensor,
    s_BN: Tensor,
    lost_BN: Tensor,
    *,
    leak: float,
    gain: float,
    v_threshold: float,
    equation: Equation,
) -> tuple[Tensor, Tensor]:
    """(u, membrane before the step) [B, N] to the bit, from the membrane after it and what the leak lost."""
    f, form = cast(int, equation.frac_bits), cast(GridLeak, grid_leak(leak))
    u_BN = v_BN + v_threshold * s_BN.to(v_BN.dtype)
    kept_BN = (u_BN - rounded(gain * x_BN.to(v_BN.dtype), f)) * 2.0**f
    return u_BN, unleaked(kept_BN, lost_BN, form) * 2.0**-f


def lif_on_grid(
    x_TBN: Tensor, v_BN: Tensor, *, leak: float, gain: float, v_threshold: float, equation: Equation
) -> tuple[Tensor, Tensor, Tensor]:
    """Run T steps without a graph; returns (spikes [T, B, N], last membrane [B, N], what the leak lost [T, B, N])."""
    f, form = cast(int, equation.frac_bits), cast(GridLeak, grid_leak(leak))
    spikes, digits = [], []
    for x_BN in x_TBN.unbind(0):
        digits.append(lost(torch.floor(v_BN * 2.0**f), form))
        u_BN = charge(x_BN, v_BN, leak, gain, equation)
        s_BN = fire(u_BN, v_threshold, equation)
        v_BN = after_reset(u_BN, s_BN, v_threshold, equation)
        spikes.append(s_BN.to(x_TBN.dtype))
    return torch.stack(spikes), v_BN, torch.stack(digits)


def lif_on_grid_backward(
    g_TBN: Tensor,
    q_BN: Tensor,
    x_TBN: Tensor,
    v_T: Tensor,
    spikes_TBN: Tensor,
    lost_TBN: Tensor,
    *,
    leak: float,
    gain: float,
    v_threshold: float,
    equation: Equation,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of a soft reset (`lif_backward`) while the steps are undone from the last membrane on.

    Returns (dx [T, B, N], dv_0 [B, N], v_0 [B, N]); no membrane but the one at hand exists.
    """
    a, theta, options = 0.0 if equation.detach_reset else 1.0, v_threshold, {"leak": leak, "gain": gain}
    dx, q_BN, v_BN = torch.empty_like(x_TBN), q_BN.to(v_T.dtype), v_T
    for t in reversed(range(len(x_TBN))):
        u_BN, v_BN = undo_on_grid(
            x_TBN[t], v_BN, spikes_TBN[t], lost_TBN[t], **options, v_threshold=theta, equation=equation
        )
        slope = equation.surrogate.slope(u_BN - theta)
        du_BN = g_TBN[t].to(v_T.dtype) * slope + q_BN * (1 - a * theta * slope)
        dx[t] = (gain * du_BN).to(dx.dtype)
        q_BN = leak * du_BN
    return dx, q_BN, v_BN


def lif_backward(
    g_TBN: Tensor,
    q_BN: Tensor,
    x_TBN: Tensor,
    v_0: Tensor,
    spikes_TBN: Tensor | None,
    *,
    leak: Scalar,
    gain: Scalar,
    v_threshold: Scalar,
    equation: Equation,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint, written out; returns (dx [T, B, N], dv_0 [B, N], d(leak, gain, v_threshold) [3]).

    With g_t = dL/ds_t, q_t = dL/dv_t, S_t = surrogate slope at u_t - theta, and a = 0 if the reset is detached, else 1:

        soft  D_t = g S + q (1 - a theta S)                       d theta: -g S + q (-s + a theta S)
        hard  D_t = g S + q ((1 - s) + a (v_reset - u) S)         d theta: -g S - q a (v_reset - u) S
        none  D_t = g S + q                                       d theta: -g S
        dx_t = gain D_t,  q_{t-1} = leak D_t,  d leak = sum D_t (v_{t-1} - v_rest),  d gain = sum D_t x_t

    `spikes_TBN`, if given, replaces the threshold when the membrane is rebuilt, so a rounding difference in x cannot
    flip a spike.
    """
    a = 0.0 if equation.detach_reset else 1.0
    theta, v_BN, before, u_all, s_all = v_threshold, v_0, [], [], []
    for t, x_BN in enumerate(x_TBN.unbind(0)):
        before.append(v_BN)
        u_BN = charge(x_BN, v_BN, leak, gain, equation)
        given = None if spikes_TBN is None else spikes_TBN[t].to(u_BN.dtype)
        s_BN = fire(u_BN, theta, equation) if given is None else given
        v_BN = after_reset(u_BN, s_BN, theta, equation)
        u_all.append(u_BN)
        s_all.append(s_BN)

    dx, q_BN = torch.empty_like(x_TBN), q_BN.to(v_0.dtype)
    d_leak = d_gain = d_theta = torch.zeros((), dtype=v_0.dtype, device=v_0.device)
    for t in reversed(range(len(u_all))):
        u_BN, s_BN, g_BN = u_all[t], s_all[t], g_TBN[t].to(v_0.dtype)
        slope = equation.surrogate.slope(u_BN - theta)
        if equation.reset == "soft":
            du_BN, c_BN = g_BN * slope + q_BN * (1 - a * theta * slope), -s_BN + a * theta * slope
        elif equation.reset == "hard":
            jump = a * (equation.v_reset - u_BN) * slope
            du_BN, c_BN = g_BN * slope + q_BN * ((1 - s_BN) + jump), -jump
        else:
            du_BN, c_BN = g_BN * slope + q_BN, torch.zeros_like(u_BN)
        d_leak = d_leak + (du_BN * (before[t] - equation.v_rest)).sum()
        d_gain = d_gain + (du_BN * x_TBN[t].to(v_0.dtype)).sum()
        d_theta = d_theta + (-g_BN * slope + q_BN * c_BN).sum()
        dx[t] = (gain * du_BN).to(dx.dtype)
        q_BN = leak * du_BN
    return dx, q_BN, torch.stack([d_leak, d_gain, d_theta])
