"""Firing on CPU: numba, parallel over blocks of neurons. See `layout` for the letters and `reference` for the meaning.

A block holds the membranes of all its steps in the cache, so nothing as large as the layer is made. Operations and
their order are those of norm, sum and LIF run one after the other, so spikes agree with theirs bit for bit; fastmath is
off.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.fire.layout import Current, Grid
from spikefit.ops.lif.cpu import (
    ATAN,
    HARD,
    SOFT,
    after_reset,
    atan_slope,
    block_state,
    charge,
    fill_slope,
    fires,
    grid_numbers,
    number_type,
    to_membrane,
)
from spikefit.ops.lif.equation import RESETS, Equation
from spikefit.ops.packbits.cpu import GATHER, table
from spikefit.ops.surrogate import FORMS
from spikefit.ops.threads import use_torch_threads

# Bytes of membrane that one block holds in backward; with its rows of scratch it fits a 1 MiB second-level cache.
BLOCK_BYTES = 256 * 1024
# Neurons per block in forward, which holds one membrane.
BLOCK_NEURONS = 8192
# Neurons over which the default backward repeats its scales, and steps after which it moves its sums to float64.
SEGMENT, FLUSH = 512, 8

NO_POOL, MAX_POOL, AVERAGE_POOL = range(3)
POOLS = {"": NO_POOL, "max": MAX_POOL, "avg": AVERAGE_POOL}


def forward(
    current: Current, v_0: Tensor | None, bits_TMP: Tensor, v_T: Tensor, coefficients, equation: Equation
) -> None:
    """Fill `bits_TMP` and the last membrane `v_T` [M, C]."""
    number = number_type(v_T)
    use_torch_threads()
    _forward(  # type: ignore[call-arg]
        *_terms(current),
        _state(v_0, v_T),
        bits_TMP.flatten(1).numpy(),
        v_T.view(-1).numpy(),
        *map(number, coefficients),
        RESETS.index(equation.reset),
        number(equation.v_reset),
        number(equation.v_rest),
        equation.strict,
        grid_numbers(equation, coefficients[0], v_T),
        v_T.shape[1],
        max(1, BLOCK_NEURONS // v_T.shape[1]),
        table(v_T.dtype, 1).view(v_T.numpy().dtype),
    )


def backward(
    g_TGC: Tensor,
    q: Tensor | None,
    current: Current,
    v_0: Tensor | None,
    bits_TMP: Tensor,
    grid: Grid,
    coefficients,
    equation: Equation,
    *,
    write: list[Tensor] | None = None,
    dx_TMC: Tensor | None = None,
    dv_0: Tensor | None = None,
    want_coefficients: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sums [1 + K, R, C] float64, d(leak, gain, v_threshold) [3]); fills the other results that are given.

    Args:
        write: per branch k a tensor [3, R, C] (a, b, c): z_k <- a dL/dx + b z_k + c. None computes the sums instead.
        dx_TMC: to be filled with dL/dx, or None.
        dv_0: [M, C] to be filled, or None.
    """
    T, M, _ = bits_TMP.shape
    C, z = current.zs[0].shape[2], current.zs[0]
    number, numpy_type = number_type(z), z[:0].numpy().dtype
    p, q_columns = grid.window
    strips = grid.images * -(-grid.height // p)
    rows = max(1, BLOCK_BYTES // (T * z.element_size() * C))
    jobs = strips if grid.pool else -(-M // rows)
    R = max(scale.shape[0] for scale in current.scales)
    sums = np.zeros((jobs, 1 + len(current.zs), R, C) if write is None else (jobs, 1, 1, 1))
    sums_3 = np.zeros((jobs, 3))
    none = np.zeros((0, 0), numpy_type)
    abc = [np.zeros((0, 0, 0), numpy_type)] if write is None else [w.numpy() for w in write]
    alone = len(current.zs) == 1 and current.extra is None and current.spikes is None and R == 1
    usual = equation.reset == "soft" and FORMS[equation.surrogate.name].kernel == ATAN
    default = alone and usual and z.shape[0] == T and dx_TMC is None and not want_coefficients
    use_torch_threads()
    _backward(  # type: ignore[call-arg]
        g_TGC.view(T, -1).numpy(),
        _state(q, z),
        *_terms(current),
        _state(v_0, z),
        bits_TMP.flatten(1).numpy(),
        (abc[0], abc[-1]),
        none if dx_TMC is None else dx_TMC.flatten(1).numpy(),
        none[0:0].reshape(-1) if dv_0 is None else dv_0.view(-1).numpy(),
        sums,
        sums_3,
        *map(number, coefficients),
        RESETS.index(equation.reset),
        number(equation.v_reset),
        number(equation.v_rest),
        grid_numbers(equation, coefficients[0], z),
        number(0 if equation.detach_reset else 1),
        FORMS[equation.surrogate.name].kernel,
        number(equation.surrogate.parameter),
        POOLS[grid.pool],
        (grid.height, grid.width, p, q_columns),
        (jobs, M, rows),
        want_coefficients,
        default,
        C,
        table(z.dtype, 1).view(numpy_type),
    )
    return torch.from_numpy(sums.sum(0)), torch.from_numpy(sums_3.sum(0))


def _terms(current: Current) -> tuple:
    """(zs, scales, shifts, number of branches, extra, spikes), as the kernels take them; a missing term is empty."""
    z = current.zs[0]
    nothing = z[:0, 0].numpy()
    pairs = [
        tuple((t if keep else t.flatten(1)).numpy() for t in (tensors[0], tensors[-1]))
        for tensors, keep in ((current.zs, False), (current.scales, True), (current.shifts, True))
    ]
    extra = nothing if current.extra is None else current.extra.flatten(1).numpy()
    spikes = np.zeros((0, 0), np.uint8) if current.spikes is None else current.spikes.flatten(1).numpy()
    return *pairs, len(current.zs), extra, spikes


def _state(v: Tensor | None, like: Tensor) -> np.ndarray:
    """[M C], or one zero that stands for all."""
    return like.new_zeros(1).numpy() if v is None else v.reshape(-1).numpy()


@numba.njit(cache=True, error_model="numpy")
def _tile(tiles, rows, K, t):
    """tiles[k] <- the row of step t, repeated over the rows of a block."""
    for k in range(K):
        row = rows[k][t if rows[k].shape[0] > 1 else 0]
        for first in range(0, tiles.shape[1], row.size):
            tiles[k, first : first + row.size] = row


@numba.njit(cache=True, error_model="numpy")
def _spread(bytes_n, out, lut, C):
    """out <- the spikes of packed rows, 0 or 1."""
    if C % 8 == 0:
        for j in range(bytes_n.size):
            byte = bytes_n[j]
            for k in range(8):
                out[8 * j + k] = lut[byte, k]
        return
    P = (C + 7) // 8
    for r in range(out.size // C):
        for c in range(C):
            out[r * C + c] = lut[bytes_n[r * P + c // 8], c % 8]


@numba.njit(cache=True, error_model="numpy")
def _gather(fired, bytes_n, C):
    """bytes_n <- the packed rows of `fired`, uint8 of 0 or 1."""
    if C % 8 == 0:
        words = fired.view(np.uint64)
        for j in range(words.size):
            bytes_n[j] = (words[j] * GATHER) >> np.uint64(56)
        return
    P = (C + 7) // 8
    for r in range(fired.size // C):
        for p in range(P):
            byte = 0
            for k in range(min(8, C - 8 * p)):
                byte |= int(fired[r * C + 8 * p + k]) << k
            bytes_n[r * P + p] = byte


@numba.njit(cache=True, error_model="numpy")
def _sum_terms(x, zs, scale, shift, K, extra, spikes, s, lut, t, lo, hi, C):
    """x <- the current of rows lo .. hi at step t; `s` is scratch."""
    a, b, P = lo * C, hi * C, (C + 7) // 8
    for k in range(K):
        z = zs[k][t if zs[k].shape[0] > 1 else 0, a:b]
        if k == 0:
            for i in range(x.size):
                x[i] = z[i] * scale[0, i] + shift[0, i]
        else:
            for i in range(x.size):
                x[i] += z[i] * scale[k, i] + shift[k, i]
    if extra.shape[0] > 0:
        e = extra[t if extra.shape[0] > 1 else 0, a:b]
        for i in range(x.size):
            x[i] += e[i]
    if spikes.shape[0] > 0:
        _spread(spikes[t if spikes.shape[0] > 1 else 0, lo * P : hi * P], s, lut, C)
        for i in range(x.size):
            x[i] += s[i]


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _forward(
    zs, scales, shifts, K, extra, spikes, v_0, bits, v_T, leak, gain, theta, reset, v_reset, v_rest, strict,
    grid, C, rows, lut,
):  # fmt: skip
    T, M, P = bits.shape[0], v_T.size // C, (C + 7) // 8
    for job in prange((M + rows - 1) // rows):
        lo, hi = job * rows, min(M, (job + 1) * rows)
        n = (hi - lo) * C
        v, fired = block_state(v_0, lo * C, hi * C), np.empty(n, np.uint8)
        x, s = np.empty(n, v_T.dtype), np.empty(n, v_T.dtype)
        scale, shift = np.empty((K, n), v_T.dtype), np.empty((K, n), v_T.dtype)
        for t in range(T):
            if t == 0 or scales[0].shape[0] > 1 or scales[1].shape[0] > 1:
                _tile(scale, scales, K, t)
                _tile(shift, shifts, K, t)
            _sum_terms(x, zs, scale, shift, K, extra, spikes, s, lut, t, lo, hi, C)
            for i in range(n):
                u = charge(v[i], x[i], leak, gain, v_rest, grid)
                f = fires(u, theta, strict)
                fired[i] = np.uint8(f)
                v[i] = after_reset(u, f, theta, reset, v_reset)
            _gather(fired, bits[t, lo * P : hi * P], C)
        v_T[lo * C : hi * C] = v


@numba.njit(cache=True, error_model="numpy")
def _winners(b0, b1, b2, b3):
    """Of four bytes of spikes the bits of the first that fired, or of the first place where none did."""
    full = np.uint8(255)
    return b0 | (full ^ (b1 | b2 | b3)), b1 & ~b0, b2 & ~(b0 | b1), b3 & ~(b0 | b1 | b2)


@numba.njit(cache=True, error_model="numpy")
def _unpool_max(g_n, bytes_n, out, lut, width, C, p):
    """Send the gradient of every window to its first spike in row-major order, or to its first place if it is empty."""
    P, columns, none = (C + 7) // 8, width // 2, np.uint8(0)
    if C % 8 == 0 and width % 2 == 0:
        # axes instead of sums of indices, which the compiler turns into vector instructions
        g_JP8, bits = g_n.reshape(columns, P, 8), bytes_n.reshape(p, columns, 2, P)
        out_8 = out.reshape(p, columns, 2, P, 8)
        for j in range(columns):
            for o in range(P):
                b2, b3 = (bits[1, j, 0, o], bits[1, j, 1, o]) if p == 2 else (none, none)
                w0, w1, w2, w3 = _winners(bits[0, j, 0, o], bits[0, j, 1, o], b2, b3)
                for k in range(8):
                    out_8[0, j, 0, o, k] = g_JP8[j, o, k] * lut[w0, k]
                for k in range(8):
                    out_8[0, j, 1, o, k] = g_JP8[j, o, k] * lut[w1, k]
                if p == 2:
                    for k in range(8):
                        out_8[1, j, 0, o, k] = g_JP8[j, o, k] * lut[w2, k]
                    for k in range(8):
                        out_8[1, j, 1, o, k] = g_JP8[j, o, k] * lut[w3, k]
        return
    for j in range(columns):
        for c in range(C):
            left = 2 * j * P + c // 8
            below = left + width * P
            b2, b3 = (bytes_n[below], bytes_n[below + P]) if p == 2 else (none, none)
            w0, w1, w2, w3 = _winners(bytes_n[left], bytes_n[left + P], b2, b3)
            g, at, k = g_n[j * C + c], 2 * j * C + c, c % 8
            out[at] = g * lut[w0, k]
            out[at + C] = g * lut[w1, k]
            if p == 2:
                out[at + width * C] = g * lut[w2, k]
                out[at + width * C + C] = g * lut[w3, k]


@numba.njit(cache=True, error_model="numpy")
def _unpool_average(g_n, out, width, C, p):
    """Share the gradient of every window out evenly."""
    share = g_n.dtype.type(1 / (2 * p))
    for r in range(p):
        for j in range(width // 2 * 2):
            for c in range(C):
                out[(r * width + j) * C + c] = g_n[(j // 2) * C + c] * share


@numba.njit(cache=True, error_model="numpy")
def _outer_gradient(g_t, bytes_n, out, n, pool, strip, image, rows, shape, lo, C, lut):
    """dL/ds of the n neurons of a block that starts at row `lo`: a part of `g_t`, or `out` filled from it."""
    height, width, p, _ = shape
    if pool == NO_POOL:
        return g_t[lo * C : lo * C + n]
    columns = width // 2
    if rows < p or width % 2 > 0:
        out[:] = 0  # rows and columns that fill no window have no gradient
    if rows < p or columns == 0:
        return out
    first = (image * (height // p) + strip) * columns * C
    g_n = g_t[first : first + columns * C]
    if pool == MAX_POOL:
        _unpool_max(g_n, bytes_n, out, lut, width, C, p)
    else:
        _unpool_average(g_n, out, width, C, p)
    return out


@numba.njit(cache=True, error_model="numpy")
def _add_coefficients(out_3, u, s, slope, g, q, v, x, theta, reset, v_reset, v_rest, a):
    """Add the share of one step in d(leak, gain, theta); `v` is where the step starts."""
    d_leak = d_gain = d_theta = 0.0
    for i in range(u.size):
        d = to_membrane(g[i], slope[i], q[i], u[i], s[i], theta, reset, v_reset, a)
        d_leak += d * (v[i] - v_rest)
        d_gain += d * x[i]
        d_theta -= g[i] * slope[i]
        if reset == SOFT:
            d_theta += q[i] * (a * theta * slope[i] - s[i])
        elif reset == HARD:
            d_theta -= q[i] * (a * (v_reset - u[i]) * slope[i])
    out_3[0] += d_leak
    out_3[1] += d_gain
    out_3[2] += d_theta


@numba.njit(cache=True, error_model="numpy")
def _block_backward(
    g, q_N, zs, scales, shifts, K, extra, spikes, v_0, bits, abc, dx_out, dv_0, sums, sums_3,
    leak, gain, theta, reset, v_reset, v_rest, grid, a, kind, parameter, pool, shape, strip, image, lo, hi,
    want_3, C, lut,
):  # fmt: skip
    """Rows lo .. hi: rebuild the membranes with the spikes that were, walk back, add to the sums or write."""
    T, n, P, dtype, writing = bits.shape[0], (hi - lo) * C, (C + 7) // 8, g.dtype, abc[0].size > 0
    u_all, v_all = np.empty((T, n), dtype), np.empty((T if want_3 else 0, n), dtype)
    x, s, slope = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    room, dx = np.empty(n, dtype), np.empty(n, dtype)
    scale, shift = np.empty((K, n), dtype), np.empty((K, n), dtype)
    stepwise = scales[0].shape[0] > 1 or scales[1].shape[0] > 1
    v = block_state(v_0, lo * C, hi * C)
    for t in range(T):
        if t == 0 or stepwise:
            _tile(scale, scales, K, t)
            _tile(shift, shifts, K, t)
        _sum_terms(x, zs, scale, shift, K, extra, spikes, s, lut, t, lo, hi, C)
        _spread(bits[t, lo * P : hi * P], s, lut, C)
        u = u_all[t]
        if want_3:
            v_all[t] = v
        for i in range(n):
            u[i] = charge(v[i], x[i], leak, gain, v_rest, grid)
            v[i] = after_reset(u[i], s[i], theta, reset, v_reset)

    q = block_state(q_N, lo * C, hi * C)
    # a, b and c of the branches, or their running sums
    tiles = np.empty((3 * K if writing else 0, n), dtype)
    total = np.zeros((0 if writing else 1 + K, n))
    repeated = np.zeros((K, n), dtype)
    for t in range(T - 1, -1, -1):
        u = u_all[t]
        _spread(bits[t, lo * P : hi * P], s, lut, C)
        d_s = _outer_gradient(
            g[t], bits[t, lo * P : hi * P], room, n, pool, strip, image, (hi - lo) // shape[1], shape, lo, C, lut
        )
        fill_slope(u, slope, theta, kind, parameter)
        if want_3:
            if stepwise:
                _tile(scale, scales, K, t)
                _tile(shift, shifts, K, t)
            _sum_terms(x, zs, scale, shift, K, extra, spikes, dx, lut, t, lo, hi, C)
            _add_coefficients(sums_3, u, s, slope, d_s, q, v_all[t], x, theta, reset, v_reset, v_rest, a)
        for i in range(n):
            d = to_membrane(d_s[i], slope[i], q[i], u[i], s[i], theta, reset, v_reset, a)
            dx[i], q[i] = gain * d, leak * d
        if dx_out.size > 0:
            dx_out[t, lo * C : hi * C] = dx
        if not writing:
            for k in range(K):
                z = zs[k][t if zs[k].shape[0] > 1 else 0, lo * C : hi * C]
                for i in range(n):
                    total[1 + k, i] += np.float64(dx[i]) * np.float64(z[i])
            for i in range(n):
                total[0, i] += dx[i]
            if sums.shape[1] > 1:
                _reduce(total, sums[:, t], C)
                total[:] = 0
            continue
        for k in range(K):
            if t == T - 1 or abc[k].shape[1] > 1:
                for j in range(3):
                    row = abc[k][j, t if abc[k].shape[1] > 1 else 0]
                    for first in range(0, n, C):
                        tiles[3 * k + j, first : first + C] = row
            p0, p1, p2 = tiles[3 * k], tiles[3 * k + 1], tiles[3 * k + 2]
            if zs[k].shape[0] > 1 or T == 1:
                z = zs[k][t, lo * C : hi * C]
                for i in range(n):
                    z[i] = p0[i] * dx[i] + p1[i] * z[i] + p2[i]
            else:
                for i in range(n):
                    repeated[k, i] += dx[i]
                if t == 0:
                    z = zs[k][0, lo * C : hi * C]
                    for i in range(n):
                        z[i] = p0[i] * repeated[k, i] + p1[i] * z[i] + p2[i]
    if not writing and sums.shape[1] == 1:
        _reduce(total, sums[:, 0], C)
    if dv_0.size > 0:
        dv_0[lo * C : hi * C] = q


@numba.njit(cache=True, error_model="numpy")
def _repeat(row, width):
    """The row repeated up to a width."""
    out = np.empty(width, row.dtype)
    for first in range(0, width, row.size):
        out[first : first + row.size] = row
    return out


@numba.njit(cache=True, error_model="numpy")
def _charge_segment(z, scale, shift, v, s, u_out, leak, gain, theta, v_rest, grid):
    for i in range(z.size):
        u = charge(v[i], z[i] * scale[i] + shift[i], leak, gain, v_rest, grid)
        u_out[i] = u
        v[i] = after_reset(u, s[i], theta, SOFT, u)


@numba.njit(cache=True, error_model="numpy")
def _write_segment(g, u, q, z, p0, p1, p2, leak, gain, theta, a, parameter):
    """z <- p0 dL/dx + p1 z + p2, q <- leak D."""
    for i in range(z.size):
        slope = atan_slope(u[i], theta, parameter)
        d = to_membrane(g[i], slope, q[i], u[i], u[i], theta, SOFT, u[i], a)
        z[i], q[i] = p0[i] * (gain * d) + p1[i] * z[i] + p2[i], leak * d


@numba.njit(cache=True, error_model="numpy")
def _sum_segment(g, u, q, z, sum_x, sum_xz, leak, gain, theta, a, parameter):
    """Add dL/dx and dL/dx z, q <- leak D."""
    for i in range(z.size):
        slope = atan_slope(u[i], theta, parameter)
        d = to_membrane(g[i], slope, q[i], u[i], u[i], theta, SOFT, u[i], a)
        dx, q[i] = gain * d, leak * d
        sum_x[i] += dx
        sum_xz[i] += dx * z[i]


@numba.njit(cache=True, error_model="numpy")
def _default_backward(
    g, q_N, z, scale, shift, v_0, bits, abc, dv_0, sums, leak, gain, theta, v_rest, grid, a, parameter,
    pool, shape, strip, image, lo, hi, C, lut,
):  # fmt: skip
    """`_block_backward` of one branch into soft-reset neurons with the arctangent, in two loops.

    Sums run in the dtype of z over `FLUSH` steps and in float64 from there on.
    """
    T, n, P, dtype, writing = bits.shape[0], (hi - lo) * C, (C + 7) // 8, g.dtype, abc.size > 0
    # scales repeated to a width that stays in the first-level cache
    width = C * max(1, SEGMENT // C)
    scale_W, shift_W = _repeat(scale[0], width), _repeat(shift[0], width)
    u_all, s, room = np.empty((T, n), dtype), np.empty(n, dtype), np.empty(n if pool != NO_POOL else 0, dtype)
    v = block_state(v_0, lo * C, hi * C)
    for t in range(T):
        _spread(bits[t, lo * P : hi * P], s, lut, C)
        z_n, u_n = z[t, lo * C : hi * C], u_all[t]
        for i in range(0, n, width):
            end = min(n, i + width)
            _charge_segment(
                z_n[i:end], scale_W, shift_W, v[i:end], s[i:end], u_n[i:end], leak, gain, theta, v_rest, grid
            )

    q = block_state(q_N, lo * C, hi * C)
    rows_W = [_repeat(abc[k, 0], width) if writing else np.zeros(width, dtype) for k in range(3)]
    p0, p1, p2 = rows_W[0], rows_W[1], rows_W[2]
    for t in range(T - 1, -1, -1):
        z_n, u_n = z[t, lo * C : hi * C], u_all[t]
        g_n = _outer_gradient(
            g[t], bits[t, lo * P : hi * P], room, n, pool, strip, image, (hi - lo) // shape[1], shape, lo, C, lut
        )
        for i in range(0, n, width):
            end = min(n, i + width)
            g_i, u_i, q_i, z_i = g_n[i:end], u_n[i:end], q[i:end], z_n[i:end]
            if writing:
                _write_segment(g_i, u_i, q_i, z_i, p0, p1, p2, leak, gain, theta, a, parameter)
            else:
                _sum_segment(g_i, u_i, q_i, z_i, p0, p1, leak, gain, theta, a, parameter)
        if not writing and t % FLUSH == 0:
            for j in range(width):
                sums[0, 0, j % C] += p0[j]
                sums[1, 0, j % C] += p1[j]
            p0[:], p1[:] = 0, 0
    if dv_0.size > 0:
        dv_0[lo * C : hi * C] = q


@numba.njit(cache=True, error_model="numpy")
def _reduce(total, out_KC, C):
    """Add the columns of a block, channel by channel."""
    for k in range(total.shape[0]):
        for first in range(0, total.shape[1], C):
            for c in range(C):
                out_KC[k, c] += total[k, first + c]


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _backward(
    g, q_N, zs, scales, shifts, K, extra, spikes, v_0, bits, abc, dx_out, dv_0, sums, sums_3,
    leak, gain, theta, reset, v_reset, v_rest, grid, a, kind, parameter, pool, shape, blocks, want_3, default, C, lut,
):  # fmt: skip
    height, width, p, _ = shape
    jobs, M, rows = blocks
    strips = (height + p - 1) // p
    for job in prange(jobs):
        image, strip = job // strips, job % strips
        if pool == NO_POOL:
            lo, hi = job * rows, min(M, (job + 1) * rows)
        else:
            # a strip: the rows of pixels that one row of windows reads
            lo = (image * height + strip * p) * width
            hi = lo + min(p, height - strip * p) * width
        if default:
            _default_backward(
                g, q_N, zs[0], scales[0], shifts[0], v_0, bits, abc[0], dv_0, sums[job], leak, gain, theta, v_rest,
                grid, a, parameter, pool, shape, strip, image, lo, hi, C, lut,
            )  # fmt: skip
            continue
        _block_backward(
            g, q_N, zs, scales, shifts, K, extra, spikes, v_0, bits, abc, dx_out, dv_0, sums[job], sums_3[job],
            leak, gain, theta, reset, v_reset, v_rest, grid, a, kind, parameter, pool, shape, strip, image, lo, hi,
            want_3, C, lut,
        )  # fmt: skip
