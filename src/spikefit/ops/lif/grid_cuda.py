"""Membranes on a grid on CUDA: Triton, forward with what the leak loses, and backward that undoes it; see `reference`.

One program per block of neurons, the loop over time inside; backward needs no scratch, since the membrane comes back as
it goes. Numbers are whole in units of the grid, and exact; see `grid_arithmetic`.
"""

import triton
import triton.language as tl
from torch import Tensor

from spikefit.ops.lif.cuda import WIDE_LAYER, charge, fire, grid_variant, on, round_on_grid, slope_of
from spikefit.ops.lif.equation import Equation
from spikefit.ops.surrogate import FORMS


def forward(
    x_TN: Tensor, v_0: Tensor, spikes_TN: Tensor, v_T: Tensor, lost_TN: Tensor, coefficients, equation: Equation
) -> None:
    """Fill `spikes_TN`, `v_T` and `lost_TN`."""
    T, N = spikes_TN.shape
    _, gain, theta = map(float, coefficients)
    with on(v_0.device):
        _forward_kernel[_programs(N)](
            x_TN, v_0, spikes_TN, v_T, lost_TN, gain, theta, T, N,
            STRICT=equation.strict, **grid_variant(coefficients, equation), BLOCK=_block(N), num_warps=4,
            enable_fp_fusion=False,
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
    """Fill `dx_TN`, `dv_0` and `v_0`."""
    T, N = g_TN.shape
    with on(v_T.device):
        _backward_kernel[_programs(N)](
            g_TN, q, x_TN, v_T, spikes_TN, lost_TN, dx_TN, dv_0, v_0, *map(float, coefficients),
            equation.surrogate.parameter, T, N, T * N,
            ATTACHED=not equation.detach_reset, SLOPE=FORMS[equation.surrogate.name].kernel,
            **grid_variant(coefficients, equation), BLOCK=_block(N), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _block(N: int) -> int:
    return 1024 if N >= WIDE_LAYER else 128


def _programs(N: int) -> tuple[int]:
    return (triton.cdiv(N, _block(N)),)


@triton.jit
def _forward_kernel(
    x_ptr, v_0_ptr, s_ptr, v_T_ptr, lost_ptr, gain, theta, T, N,
    STRICT: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, TIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # int64: one sequence can hold more than 2**31 elements
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, here = at, at < N
    v = tl.load(v_0_ptr + n, mask=here, other=0.0)
    for _ in range(T):
        whole = tl.floor(v * SCALE)
        lost = whole - tl.floor(whole * (1.0 / POWER)) * POWER
        if TIES:
            lost = tl.where(lost == POWER - 1.0, 1.0, 0.0)
        tl.store(lost_ptr + at, lost.to(tl.int32).to(tl.uint8), mask=here)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        u = charge(v, x, 0.0, gain, 0.0, False, SCALE, POWER, TIES)
        s = fire(u, theta, STRICT)
        v = u - theta * s
        tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=here)
        at += N
    tl.store(v_T_ptr + n, v, mask=here)


@triton.jit
def _backward_kernel(
    g_ptr, q_ptr, x_ptr, v_T_ptr, s_ptr, lost_ptr, dx_ptr, dv_0_ptr, v_0_ptr, leak, gain, theta, p, T, N, end,
    ATTACHED: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at, here = n + end, n < N
    v = tl.load(v_T_ptr + n, mask=here, other=0.0)
    q = tl.load(q_ptr + n, mask=here, other=0.0)
    for _ in range(T):
        at -= N
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + at, mask=here, other=0.0).to(tl.float32)
        lost = tl.load(lost_ptr + at, mask=here, other=0).to(tl.float32)
        u = v + theta * s
        kept = u * SCALE - round_on_grid(x, gain, SCALE)
        if TIES:
            # the quotient of plain division on a GPU may be one off in its last place
            v = kept + tl.floor(tl.div_rn(kept, tl.full([BLOCK], POWER - 1.0, tl.float32))) - lost
        else:
            v = kept * POWER + lost
        v = v * (1.0 / SCALE)
        slope = slope_of(u - theta, p, SLOPE)
        d = g * slope + q
        if ATTACHED:
            d = g * slope + q * (1.0 - theta * slope)
        tl.store(dx_ptr + at, (gain * d).to(dx_ptr.dtype.element_ty), mask=here)
        q = leak * d
    tl.store(dv_0_ptr + n, q, mask=here)
    tl.store(v_0_ptr + n, v, mask=here)
