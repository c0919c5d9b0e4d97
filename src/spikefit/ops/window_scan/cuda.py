"""The scan of windows on CUDA: Triton, one program per block of neurons, the loop over windows unrolled inside.

Links are compiled in, so membranes of earlier windows stay in registers. The operations and their order are those of
`reference`, in float32 whatever the storage, without contraction to fused multiply-add, so that spikes agree bit for
bit. Backward rebuilds the membranes of a block, then goes back through its windows; each source collects the gradients
of the windows that read it. `TRITON_INTERPRET=1`, set before this file is imported, runs the kernels on CPU tensors.
"""

# ruff: noqa: RUF005  (Triton reads no starred tuples)
import math

import triton
import triton.language as tl
from torch import Tensor

from spikefit.ops.lif.cuda import fire, on, slope_of
from spikefit.ops.surrogate import FORMS
from spikefit.ops.window_scan import sine
from spikefit.ops.window_scan.equation import Equation

BLOCK = 256

S0, S1, S2, S3 = (tl.constexpr(c) for c in sine.S)
C0, C1, C2, C3 = (tl.constexpr(c) for c in sine.C)
PER_PI, ROUNDER = tl.constexpr(sine.PER_PI), tl.constexpr(sine.ROUNDER)
PI_HIGH, PI_MIDDLE, PI_LOW = (tl.constexpr(c) for c in (sine.PI_HIGH, sine.PI_MIDDLE, sine.PI_LOW))


def forward(
    x_RN: Tensor, given_PN: Tensor | None, spikes_PN: Tensor, m_PN: Tensor, phi: float, v_threshold: float,
    equation: Equation,
) -> None:  # fmt: skip
    """Fill `spikes_PN`, and the membranes `m_PN` unless it is empty.

    `x_RN` has P rows, or one row that every window reads; all but it and the spikes are float32.
    """
    P, N = spikes_PN.shape
    with on(x_RN.device):
        _forward_kernel[(triton.cdiv(N, BLOCK),)](
            x_RN,
            m_PN if given_PN is None else given_PN,
            spikes_PN,
            m_PN,
            phi * (math.pi / 2),
            equation.leak,
            v_threshold,
            N,
            **_variant(x_RN, P, equation),
            MEMBRANES=len(m_PN) > 0,
            enable_fp_fusion=False,
        )


def backward(
    g_PN: Tensor, q_PN: Tensor | None, x_RN: Tensor, given_PN: Tensor | None, dx_PN: Tensor, dgiven_PN: Tensor,
    phi: float, v_threshold: float, equation: Equation,
) -> None:  # fmt: skip
    """Fill `dx_PN`, and `dgiven_PN` unless it is empty; `g_PN`, `q_PN` are dL/ds and dL/dm (None for zeros)."""
    P, N = g_PN.shape
    with on(x_RN.device):
        _backward_kernel[(triton.cdiv(N, BLOCK),)](
            g_PN,
            g_PN if q_PN is None else q_PN,
            x_RN,
            dgiven_PN if given_PN is None else given_PN,
            dx_PN,
            dgiven_PN,
            phi * (math.pi / 2),
            equation.leak,
            v_threshold,
            equation.surrogate.parameter,
            N,
            **_variant(x_RN, P, equation),
            SLOPE=FORMS[equation.surrogate.name].kernel,
            MEMBRANES=q_PN is not None,
            GIVEN=len(dgiven_PN) > 0,
            enable_fp_fusion=False,
        )


def _variant(x_RN: Tensor, windows: int, equation: Equation) -> dict[str, object]:
    """The choices that are compiled in, common to both kernels."""
    return {
        "P": windows,
        "LINKS": tuple(equation.links.codes),
        "REPEATED": x_RN.shape[0] < windows,
        "FUSE": equation.fuse,
        "RESET": equation.reset,
        "STRICT": equation.strict,
        "BLOCK": BLOCK,
    }


@triton.jit
def _reduced(y):
    """(r, (-1)^n) with y = n pi + r."""
    n = (y * PER_PI + ROUNDER) - ROUNDER
    r = ((y - n * PI_HIGH) - n * PI_MIDDLE) - n * PI_LOW
    odd = n - 2.0 * ((n * 0.5 + ROUNDER) - ROUNDER)
    return r, 1.0 - 2.0 * (odd * odd)


@triton.jit
def _sine(r, sign):
    z = r * r
    p = ((S3 * z + S2) * z + S1) * z + S0
    return sign * (r + r * z * p)


@triton.jit
def _cosine(r, sign):
    z = r * r
    p = ((C3 * z + C2) * z + C1) * z + C0
    return sign * ((1.0 - 0.5 * z) + z * z * p)


@triton.jit
def _source(CODE: tl.constexpr, given_ptr, made, n, rows, here):
    """The block of neurons that a link reads; CODE is `Link.code`."""
    if CODE > 0:
        v = tl.load(given_ptr + (n + (CODE - 1) * rows), mask=here, other=0.0)
    elif CODE < 0:
        v = made[-CODE - 1]
    else:
        v = tl.zeros_like(n).to(tl.float32)
    return v


@triton.jit
def _fuse(a, c, h, FUSE: tl.constexpr):
    """What the window starts from."""
    if FUSE == "omega":
        r_a, sign_a = _reduced(h * a)
        r_c, sign_c = _reduced(h * c)
        r = 2.0 * (_sine(r_a, sign_a) * _cosine(r_c, sign_c))
    elif FUSE == "a":
        r = a
    elif FUSE == "c":
        r = c
    elif FUSE == "sum":
        r = a + c
    elif FUSE == "mean":
        r = 0.5 * (a + c)
    elif FUSE == "relu":
        t = a + c
        r = tl.where(t <= 0.0, 0.0, t)
    else:
        r = tl.zeros_like(a)
    return r


@triton.jit
def _fuse_back(a, c, d, h, FUSE: tl.constexpr):
    """d times the slope of the fusion, in A and in C."""
    if FUSE == "omega":
        r_a, sign_a = _reduced(h * a)
        r_c, sign_c = _reduced(h * c)
        e = 2.0 * h * d
        da = e * (_cosine(r_a, sign_a) * _cosine(r_c, sign_c))
        dc = -e * (_sine(r_a, sign_a) * _sine(r_c, sign_c))
    elif FUSE == "a":
        da, dc = d, tl.zeros_like(d)
    elif FUSE == "c":
        da, dc = tl.zeros_like(d), d
    elif FUSE == "sum":
        da, dc = d, d
    elif FUSE == "mean":
        da, dc = 0.5 * d, 0.5 * d
    elif FUSE == "relu":
        da = tl.where(a + c <= 0.0, 0.0, d)
        dc = da
    else:
        da, dc = tl.zeros_like(d), tl.zeros_like(d)
    return da, dc


@triton.jit
def _hand_on(u, s, theta, RESET: tl.constexpr):
    """The membrane after the reset."""
    if RESET == "soft":
        m = u - theta * s
    elif RESET == "hard":
        m = u * (1.0 - s)
    else:
        m = u
    return m


@triton.jit
def _forward_kernel(
    x_ptr, given_ptr, s_ptr, m_ptr, h, leak, theta, N,
    P: tl.constexpr, LINKS: tl.constexpr, REPEATED: tl.constexpr, FUSE: tl.constexpr, RESET: tl.constexpr,
    STRICT: tl.constexpr, BLOCK: tl.constexpr, MEMBRANES: tl.constexpr,
):  # fmt: skip
    # int64: one sequence can hold more than 2**31 elements
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.full([], 1, tl.int64) * N
    here = n < N
    made = ()
    for p in tl.static_range(P):
        a = _source(LINKS[2 * p], given_ptr, made, n, rows, here)
        c = _source(LINKS[2 * p + 1], given_ptr, made, n, rows, here)
        x = tl.load(x_ptr + (n if REPEATED else n + p * rows), mask=here, other=0.0).to(tl.float32)
        u = leak * _fuse(a, c, h, FUSE) + x
        s = fire(u, theta, STRICT)
        m = _hand_on(u, s, theta, RESET)
        tl.store(s_ptr + (n + p * rows), s.to(s_ptr.dtype.element_ty), mask=here)
        if MEMBRANES:
            tl.store(m_ptr + (n + p * rows), m, mask=here)
        made = made + (m,)  # type: ignore[assignment]


@triton.jit
def _backward_kernel(
    g_ptr, q_ptr, x_ptr, given_ptr, dx_ptr, dgiven_ptr, h, leak, theta, parameter, N,
    P: tl.constexpr, LINKS: tl.constexpr, REPEATED: tl.constexpr, FUSE: tl.constexpr, RESET: tl.constexpr,
    STRICT: tl.constexpr, BLOCK: tl.constexpr, SLOPE: tl.constexpr, MEMBRANES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.full([], 1, tl.int64) * N
    here = n < N
    charged, made = (), ()
    for p in tl.static_range(P):
        a = _source(LINKS[2 * p], given_ptr, made, n, rows, here)
        c = _source(LINKS[2 * p + 1], given_ptr, made, n, rows, here)
        x = tl.load(x_ptr + (n if REPEATED else n + p * rows), mask=here, other=0.0).to(tl.float32)
        u = leak * _fuse(a, c, h, FUSE) + x
        charged = charged + (u,)  # type: ignore[assignment]
        made = made + (_hand_on(u, fire(u, theta, STRICT), theta, RESET),)  # type: ignore[assignment]

    # gradients of the sources, from the last window to the first
    da_all, dc_all = (), ()
    for i in tl.static_range(P):
        at, u = n + (P - 1 - i) * rows, charged[P - 1 - i]
        if MEMBRANES:
            dm = tl.load(q_ptr + at, mask=here, other=0.0)
        else:
            dm = tl.zeros_like(u)
        dm = _collect(dm, i - P, LINKS, da_all, dc_all, i, P)
        if RESET == "hard":
            dm = dm * (1.0 - fire(u, theta, STRICT))
        d = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32) * slope_of(u - theta, parameter, SLOPE) + dm
        tl.store(dx_ptr + at, d.to(dx_ptr.dtype.element_ty), mask=here)
        a = _source(LINKS[2 * (P - 1 - i)], given_ptr, made, n, rows, here)
        c = _source(LINKS[2 * (P - 1 - i) + 1], given_ptr, made, n, rows, here)
        da, dc = _fuse_back(a, c, leak * d, h, FUSE)
        da_all, dc_all = da_all + (da,), dc_all + (dc,)  # type: ignore[assignment]

    if GIVEN:
        for k in tl.static_range(P):
            total = _collect(tl.zeros([BLOCK], tl.float32), k + 1, LINKS, da_all, dc_all, P, P)
            tl.store(dgiven_ptr + (n + k * rows), total, mask=here)


@triton.jit
def _collect(
    total, CODE: tl.constexpr, LINKS: tl.constexpr, da_all, dc_all, LAST: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """`total` plus the gradients of all sources that read the tensor CODE, among the LAST windows."""
    for j in tl.static_range(LAST):
        if LINKS[2 * (P - 1 - j)] == CODE:
            total += da_all[j]
        if LINKS[2 * (P - 1 - j) + 1] == CODE:
            total += dc_all[j]
    return total
