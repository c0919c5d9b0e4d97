"""Channel normalisation on CPU: numba, one pass over memory per function. See `reference` for shapes and meaning.

Rows are cut into fixed blocks whose partial sums are added in order, so a result does not depend on the thread count.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.dtype import compute_dtype
from spikefit.ops.threads import use_torch_threads

# Elements per block of rows: large enough to hide the start of a block, small enough to share out evenly.
BLOCK_ELEMENTS = 1 << 15


def sums(z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    return gradient_sums(z_TMCS, z_TMCS)


def affine(z_TMCS: Tensor, scale_RC: Tensor, shift_RC: Tensor, out_TMCS: Tensor) -> None:
    use_torch_threads()
    for z, out, cut in _steps(z_TMCS, out_TMCS):
        scale, shift = (v[cut if v.shape[0] > 1 else slice(0, 1)].numpy() for v in (scale_RC, shift_RC))
        result = out if out.dtype == scale_RC.dtype else torch.empty_like(out, dtype=scale_RC.dtype)
        _affine(z.to(scale_RC.dtype).numpy(), scale, shift, result.numpy(), _rows(z))
        if result is not out:
            out.copy_(result)


def gradient_sums(g_TMCS: Tensor, z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    pieces = []
    use_torch_threads()
    squares = g_TMCS is z_TMCS
    for g, z, _ in _steps(g_TMCS, z_TMCS):
        z = z.to(compute_dtype(z.dtype))
        g = z if squares else g.to(z.dtype)
        pieces.append(_totals(g.numpy(), z.numpy(), _rows(z)))
    first, second = torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1))
    return first, second


def normalise(z_TMCS: Tensor, weight: Tensor, bias: Tensor, eps: float, out_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    """out = norm(z) with statistics of each step, in one call; (mean, var), [T, C] float64. All float32."""
    use_torch_threads()
    numbers = weight.detach().numpy(), bias.detach().numpy(), eps
    mean, var = _normalise(z_TMCS.detach().numpy(), *numbers, out_TMCS.numpy(), _rows(z_TMCS))
    return torch.from_numpy(mean), torch.from_numpy(var)


def gradient(
    g_TMCS: Tensor, z_TMCS: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, out_TMCS: Tensor
) -> tuple[Tensor, Tensor]:
    """out = dz of `normalise` for g = dL/dx, in one call; (dweight, dbias) of each step, [T, C] float64."""
    use_torch_threads()
    g, z, w, m, v = (tensor.detach().numpy() for tensor in (g_TMCS, z_TMCS, weight, mean, var))
    d_bias, d_weight = torch.from_numpy(_gradient(g, z, w, m, v, eps, out_TMCS.numpy(), _rows(z_TMCS)))
    return d_weight, d_bias


def combine(g_TMCS: Tensor, z_TMCS: Tensor, a_RC: Tensor, b_RC: Tensor, c_RC: Tensor, out_TMCS: Tensor) -> None:
    use_torch_threads()
    for g, z, out, cut in _steps(g_TMCS, z_TMCS, out_TMCS):
        a, b, c = (v[cut if v.shape[0] > 1 else slice(0, 1)].numpy() for v in (a_RC, b_RC, c_RC))
        result = out if out.dtype == a_RC.dtype else torch.empty_like(out, dtype=a_RC.dtype)
        _combine(g.to(a_RC.dtype).numpy(), z.to(a_RC.dtype).numpy(), a, b, c, result.numpy(), _rows(z))
        if result is not out:
            out.copy_(result)


def _steps(*tensors: Tensor):
    """All steps at once; one at a time in half precision, so that a float32 copy of a sequence never exists."""
    T = tensors[0].shape[0]
    width = 1 if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors) else T
    for t in range(0, T, width):
        cut = slice(t, t + width)
        yield (*(x[cut] for x in tensors), cut)


def _rows(z_TMCS: Tensor) -> int:
    """Rows per block; depends on the shape of one step only, so pieces of a sequence sum alike."""
    return max(1, BLOCK_ELEMENTS // (z_TMCS.shape[2] * z_TMCS.shape[3]))


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _affine(z, scale, shift, out, rows):
    T, M, C, S = z.shape
    blocks = (M + rows - 1) // rows
    for job in prange(T * blocks):
        t, b = job // blocks, job % blocks
        r = t if scale.shape[0] > 1 else 0
        for m in range(b * rows, min(M, (b + 1) * rows)):
            if S == 1:
                for c in range(C):
                    out[t, m, c, 0] = z[t, m, c, 0] * scale[r, c] + shift[r, c]
            else:
                for c in range(C):
                    p, q = scale[r, c], shift[r, c]
                    for i in range(S):
                        out[t, m, c, i] = z[t, m, c, i] * p + q


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _combine(g, z, a_RC, b_RC, c_RC, out, rows):
    T, M, C, S = z.shape
    blocks = (M + rows - 1) // rows
    for job in prange(T * blocks):
        t, block = job // blocks, job % blocks
        r = t if a_RC.shape[0] > 1 else 0
        for m in range(block * rows, min(M, (block + 1) * rows)):
            if S == 1:
                for c in range(C):
                    out[t, m, c, 0] = a_RC[r, c] * g[t, m, c, 0] + b_RC[r, c] * z[t, m, c, 0] + c_RC[r, c]
            else:
                for c in range(C):
                    p, q, o = a_RC[r, c], b_RC[r, c], c_RC[r, c]
                    for i in range(S):
                        out[t, m, c, i] = p * g[t, m, c, i] + q * z[t, m, c, i] + o


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _gradient_sums(g, z, partial, rows):
    T, M, C, S = z.shape
    blocks = partial.shape[2]
    for job in prange(T * blocks):
        t, b = job // blocks, job % blocks
        first, second = partial[0, t, b], partial[1, t, b]
        for m in range(b * rows, min(M, (b + 1) * rows)):
            if S == 1:
                for c in range(C):
                    gd = np.float64(g[t, m, c, 0])
                    first[c] += gd
                    second[c] += gd * np.float64(z[t, m, c, 0])
            else:
                # four running sums, so that additions of one row do not wait for each other
                for c in range(C):
                    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = 0.0
                    whole = S // 4 * 4
                    for i in range(0, whole, 4):
                        g0, g1 = np.float64(g[t, m, c, i]), np.float64(g[t, m, c, i + 1])
                        g2, g3 = np.float64(g[t, m, c, i + 2]), np.float64(g[t, m, c, i + 3])
                        s0, s1, s2, s3 = s0 + g0, s1 + g1, s2 + g2, s3 + g3
                        q0, q1 = q0 + g0 * z[t, m, c, i], q1 + g1 * z[t, m, c, i + 1]
                        q2, q3 = q2 + g2 * z[t, m, c, i + 2], q3 + g3 * z[t, m, c, i + 3]
                    for i in range(whole, S):
                        gd = np.float64(g[t, m, c, i])
                        s0 += gd
                        q0 += gd * z[t, m, c, i]
                    first[c] += s0 + s1 + s2 + s3
                    second[c] += q0 + q1 + q2 + q3


@numba.njit(cache=True, error_model="numpy")
def _totals(g, z, rows):
    """(sum of g, sum of g z) of each step and channel, [2, T, C]; blocks of rows are added in order."""
    T, M, C, _ = z.shape
    partial = np.zeros((2, T, (M + rows - 1) // rows, C))
    _gradient_sums(g, z, partial, rows)
    total = np.zeros((2, T, C))
    for b in range(partial.shape[2]):
        total += partial[:, :, b]
    return total


@numba.njit(cache=True, error_model="numpy")
def _normalise(z, weight, bias, eps, out, rows):
    """Float64 in the order of `op.scale_and_shift`, which other paths use: the bits agree."""
    T, M, C, S = z.shape
    mean, var = _totals(z, z, rows) / (M * S)
    scale, shift = np.empty((T, C), z.dtype), np.empty((T, C), z.dtype)
    for t in range(T):
        for c in range(C):
            m = mean[t, c]
            v = var[t, c] - m * m
            var[t, c] = v = 0.0 if v < 0 else v
            factor = np.float64(weight[c]) * (1 / np.sqrt(v + eps))
            scale[t, c], shift[t, c] = factor, np.float64(bias[c]) - m * factor
    _affine(z, scale, shift, out, rows)
    return mean, var


@numba.njit(cache=True, error_model="numpy")
def _gradient(g, z, weight, mean, var, eps, out, rows):
    """Float64 in the order of `op.norm_gradient`; returns (dbias, dweight) of each step."""
    T, M, C, S = z.shape
    total = _totals(g, z, rows)
    a_TC, b_TC, c_TC = np.empty((T, C), z.dtype), np.empty((T, C), z.dtype), np.empty((T, C), z.dtype)
    for t in range(T):
        for c in range(C):
            inverse = 1 / np.sqrt(var[t, c] + eps)
            d_bias = total[0, t, c]
            total[1, t, c] = d_normal = (total[1, t, c] - mean[t, c] * d_bias) * inverse
            a = np.float64(weight[c]) * inverse
            b = -a * inverse * d_normal / (M * S)
            a_TC[t, c], b_TC[t, c], c_TC[t, c] = a, b, -a * d_bias / (M * S) - b * mean[t, c]
    _combine(g, z, a_TC, b_TC, c_TC, out, rows)
    return total
