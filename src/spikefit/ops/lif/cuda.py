"""The LIF sequence on CUDA: Triton, one program per block of neurons, the loop over time inside.

The operations and their order are those of `reference`, in float32 whatever the storage, without contraction to fused
multiply-add, so that spikes agree bit for bit. Backward walks a block forward, writing the membrane before each step to
a scratch of its own, then back; a bounded number of programs share out the blocks, so the scratch stays in the cache
and the membrane of all steps never exists for a whole layer. `TRITON_INTERPRET=1`, set before this file is imported,
runs the kernels on CPU tensors.
"""

import contextlib
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikefit.ops.lif.equation import Equation, GridLeak, grid_leak
from spikefit.ops.surrogate import FORMS

# Bytes of membrane that all programs of backward hold together, unless one program per multiprocessor needs more.
SCRATCH_BYTES = 32 * 2**20
# Neurons from which a layer fills the device with wide blocks.
WIDE_LAYER = 2**19


def forward(x_RN: Tensor, v_0: Tensor, spikes_TN: Tensor, v_T: Tensor, coefficients, equation: Equation) -> None:
    """Fill `spikes_TN` and `v_T`; `x_RN` has T rows, or one row that every step reads.

    `coefficients` are three numbers, or a tensor (leak, gain, v_threshold) that the kernel reads on the device.
    """
    T, N = spikes_TN.shape
    block = 1024 if N >= WIDE_LAYER else 128
    with on(v_0.device):
        _forward_kernel[(triton.cdiv(N, block),)](
            x_RN,
            v_0,
            spikes_TN,
            v_T,
            *_coefficients(coefficients, v_0),
            equation.v_reset,
            equation.v_rest,
            T,
            N,
            **_variant(x_RN, T, coefficients, equation),
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
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
    T, N = g_TN.shape
    block = 1024 if N >= WIDE_LAYER else 128
    blocks = triton.cdiv(N, block)
    programs = min(blocks, _programs(v_0.device, T * block * 4))
    scratch = v_0.new_empty(programs * T * block)
    sums = v_0.new_zeros(blocks if want_coefficients else 0, 3)
    with on(v_0.device):
        _backward_kernel[(programs,)](
            g_TN,
            q,
            x_RN,
            v_0,
            g_TN if spikes_TN is None else spikes_TN,
            dx_TN,
            dv_0,
            scratch,
            sums,
            *_coefficients(coefficients, v_0),
            equation.v_reset,
            equation.v_rest,
            equation.surrogate.parameter,
            T,
            N,
            T * N,
            **_variant(x_RN, T, coefficients, equation),
            ATTACHED=not equation.detach_reset,
            SLOPE=FORMS[equation.surrogate.name].kernel,
            GIVEN=spikes_TN is not None,
            STATE=dv_0.numel() > 0,
            WANT=want_coefficients,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return sums.sum(0, dtype=torch.float64).to(v_0.dtype)


def _coefficients(coefficients, v_0: Tensor) -> tuple:
    """(learned tensor, leak, gain, v_threshold); the kernel uses the first or the other three."""
    if isinstance(coefficients, Tensor):
        return coefficients, 0.0, 0.0, 0.0
    return v_0, *map(float, coefficients)


def _variant(x_RN: Tensor, T: int, coefficients, equation: Equation) -> dict[str, object]:
    """The choices that are compiled in, common to both kernels."""
    return {
        "REPEATED": x_RN.shape[0] < T,
        "LEARNED": isinstance(coefficients, Tensor),
        "RESET": equation.reset,
        "RESTING": equation.v_rest != 0,
        "STRICT": equation.strict,
        **grid_variant(coefficients, equation),
    }


def grid_variant(coefficients, equation: Equation) -> dict[str, object]:
    """The grid as compiled-in choices: 1 / its step (0 for none), 2^m, and whether the leak is 1 - 2^-m."""
    if equation.frac_bits is None:
        return {"SCALE": 0.0, "POWER": 1.0, "TIES": False}
    form = cast(GridLeak, grid_leak(float(coefficients[0])))
    return {"SCALE": 2.0**equation.frac_bits, "POWER": 2.0**form.shift, "TIES": form.ties}


def _programs(device: torch.device, scratch_bytes: int) -> int:
    """How many programs run backward, each with a scratch of so many bytes."""
    if device.type != "cuda":
        return 2  # the interpreter runs one after the other; two, so that blocks are shared out there too
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(processors, min(8 * processors, SCRATCH_BYTES // scratch_bytes))


def on(device: torch.device):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def round_on_grid(x, gain, SCALE: tl.constexpr):
    """gain x in steps of the grid, half to even."""
    scaled = gain * x * SCALE
    low = tl.floor(scaled)
    rest = scaled - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), low + 1.0, low)


@triton.jit
def charge(
    v, x, leak, gain, v_rest, RESTING: tl.constexpr, SCALE: tl.constexpr, POWER: tl.constexpr, TIES: tl.constexpr
):  # fmt: skip
    """Membrane before the reset; on a grid (SCALE > 0) NaN, which stays, once it leaves the range."""
    if SCALE > 0:
        whole = tl.floor(v * SCALE)
        kept = tl.floor(whole * (1.0 / POWER))
        if TIES:
            kept = whole - kept
        u = kept + round_on_grid(x, gain, SCALE)
        u = tl.where(tl.abs(u) < 8388608.0, u * (1.0 / SCALE), float("nan"))  # 2^23
    elif RESTING:
        u = v_rest + leak * (v - v_rest) + gain * x
    else:
        u = leak * v + gain * x
    return u


@triton.jit
def fire(u, theta, STRICT: tl.constexpr):
    """1 where u reaches theta, else 0."""
    if STRICT:
        s = tl.where(u > theta, 1.0, 0.0)
    else:
        s = tl.where(u >= theta, 1.0, 0.0)
    return s


@triton.jit
def reset_of(u, s, theta, v_reset, RESET: tl.constexpr):
    """Membrane after the reset."""
    if RESET == "soft":
        v = u - theta * s
    elif RESET == "hard":
        v = u + s * (v_reset - u)
    else:
        v = u
    return v


@triton.jit
def slope_of(d, p, SLOPE: tl.constexpr):
    """Surrogate slope at d = u - theta; SLOPE is `Form.kernel` of the surrogate. NaN stays NaN where torch keeps it."""
    if SLOPE == 0:
        e = 1.5707963267948966 * p * d  # pi / 2
        slope = 0.5 * p / (1.0 + e * e)
    elif SLOPE == 1:
        e = 1.0 - tl.abs(d) / p
        slope = tl.where(e < 0.0, 0.0, e) / p
    elif SLOPE == 2:
        slope = tl.where(tl.abs(d) < 0.5 * p, 1.0, 0.0) / p
    elif SLOPE == 3:
        slope = tl.where(tl.abs(d) <= 0.5 * p, 1.0, 0.0) / p
    elif SLOPE == 4:
        e = 1.0 / (1.0 + tl.exp(-p * d))
        slope = p * e * (1.0 - e)
    else:
        e = 1.0 + p * tl.abs(d)
        slope = 1.0 / (e * e)
    return slope


@triton.jit
def _forward_kernel(
    x_ptr, v_0_ptr, s_ptr, v_T_ptr, learned_ptr, leak, gain, theta, v_reset, v_rest, T, N,
    REPEATED: tl.constexpr, LEARNED: tl.constexpr, RESET: tl.constexpr, RESTING: tl.constexpr, STRICT: tl.constexpr,
    SCALE: tl.constexpr, POWER: tl.constexpr, TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if LEARNED:
        leak, gain, theta = tl.load(learned_ptr), tl.load(learned_ptr + 1), tl.load(learned_ptr + 2)
    # int64: one sequence can hold more than 2**31 elements
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = n < N
    v = tl.load(v_0_ptr + n, mask=here, other=0.0)
    at = n
    for _ in range(T):
        x = tl.load(x_ptr + (n if REPEATED else at), mask=here, other=0.0).to(tl.float32)
        u = charge(v, x, leak, gain, v_rest, RESTING, SCALE, POWER, TIES)
        s = fire(u, theta, STRICT)
        v = reset_of(u, s, theta, v_reset, RESET)
        tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=here)
        at += N
    tl.store(v_T_ptr + n, v, mask=here)


@triton.jit
def _backward_kernel(
    g_ptr, q_ptr, x_ptr, v_0_ptr, s_ptr, dx_ptr, dv_0_ptr, scratch_ptr, sums_ptr,
    learned_ptr, leak, gain, theta, v_reset, v_rest, p, T, N, end,
    REPEATED: tl.constexpr, LEARNED: tl.constexpr, RESET: tl.constexpr, RESTING: tl.constexpr, STRICT: tl.constexpr,
    SCALE: tl.constexpr, POWER: tl.constexpr, TIES: tl.constexpr,
    ATTACHED: tl.constexpr, SLOPE: tl.constexpr, GIVEN: tl.constexpr, STATE: tl.constexpr, WANT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if LEARNED:
        leak, gain, theta = tl.load(learned_ptr), tl.load(learned_ptr + 1), tl.load(learned_ptr + 2)
    program, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    for first in range(program * BLOCK, N, tl.num_programs(0) * BLOCK):
        n = first + lane
        here = n < N
        at, kept = n, program * T * BLOCK + lane

        v = tl.load(v_0_ptr + n, mask=here, other=0.0)
        for _ in range(T):
            tl.store(scratch_ptr + kept, v)
            x = tl.load(x_ptr + (n if REPEATED else at), mask=here, other=0.0).to(tl.float32)
            u = charge(v, x, leak, gain, v_rest, RESTING, SCALE, POWER, TIES)
            if GIVEN:
                s = tl.load(s_ptr + at, mask=here, other=0.0).to(tl.float32)
            else:
                s = fire(u, theta, STRICT)
            v = reset_of(u, s, theta, v_reset, RESET)
            at += N
            kept += BLOCK
        tl.debug_barrier()  # a thread may read what another one of this program has written

        at = n + end
        q = tl.load(q_ptr + n, mask=here, other=0.0)
        d_leak, d_gain, d_theta = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q)
        for _ in range(T):
            at -= N
            kept -= BLOCK
            v = tl.load(scratch_ptr + kept)
            x = tl.load(x_ptr + (n if REPEATED else at), mask=here, other=0.0).to(tl.float32)
            g = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32)
            u = charge(v, x, leak, gain, v_rest, RESTING, SCALE, POWER, TIES)
            if GIVEN:
                s = tl.load(s_ptr + at, mask=here, other=0.0).to(tl.float32)
            else:
                s = fire(u, theta, STRICT)
            slope = slope_of(u - theta, p, SLOPE)
            # keep: dv_t / du_t;  c: dv_t / d theta
            if RESET == "soft":
                keep, c = tl.full([BLOCK], 1.0, tl.float32), -s
                if ATTACHED:
                    keep, c = 1.0 - theta * slope, theta * slope - s
            elif RESET == "hard":
                keep, c = 1.0 - s, tl.zeros_like(s)
                if ATTACHED:
                    jump = (v_reset - u) * slope
                    keep, c = keep + jump, -jump
            else:
                keep, c = tl.full([BLOCK], 1.0, tl.float32), tl.zeros_like(s)
            d = g * slope + q * keep
            if WANT:
                d_theta += q * c - g * slope
                d_leak += d * (v - v_rest)
                d_gain += d * x
            tl.store(dx_ptr + at, (gain * d).to(dx_ptr.dtype.element_ty), mask=here)
            q = leak * d
        if STATE:
            tl.store(dv_0_ptr + n, q, mask=here)
        if WANT:
            row = sums_ptr + (first // BLOCK) * 3
            tl.store(row, tl.sum(d_leak))
            tl.store(row + 1, tl.sum(d_gain))
            tl.store(row + 2, tl.sum(d_theta))
        tl.debug_barrier()  # the next block writes to the scratch that this one has read
