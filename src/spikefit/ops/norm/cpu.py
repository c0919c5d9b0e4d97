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
    _, M, C, _ = z_TMCS.shape
    first, second = [], []
    use_torch_threads()
    squares = g_TMCS is z_TMCS
    for g, z, _ in _steps(g_TMCS, z_TMCS):
        z = z.to(compute_dtype(z.dtype))
        g = z if squares else g.to(z.dtype)
        blocks = -(-M // _rows(z))
        partial = np.zeros((2, z.shape[0], blocks, C))
        _gradient_sums(g.numpy(), z.numpy(), partial, _rows(z))
        first.append(torch.from_numpy(partial[0].sum(1)))
        second.append(torch.from_numpy(partial[1].sum(1)))
    return torch.cat(first), torch.cat(second)


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
