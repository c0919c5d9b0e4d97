"""The meaning of channel normalisation, in plain torch, on views [T, M, C, S].

T time steps, M rows (batch, or batch and space when channels lie last), C channels, S the remaining contiguous axis.
Sums are float64, so statistics do not depend on the order of summation in float32; the affine map is z * scale + shift
in the compute dtype (float32, or float64 for float64 input), two roundings.
"""

import torch
from torch import Tensor


def sums(z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    """Per step and channel: (sum of z, sum of z^2), [T, C] float64."""
    rows = [_sums_of(z, z) for z in z_TMCS.unbind(0)]
    return torch.stack([first for first, _ in rows]), torch.stack([second for _, second in rows])


def affine(z_TMCS: Tensor, scale_RC: Tensor, shift_RC: Tensor, out_TMCS: Tensor) -> None:
    """out = z * scale + shift; `scale_RC` has T rows or one."""
    if z_TMCS.dtype == scale_RC.dtype:
        torch.mul(z_TMCS, _wide(scale_RC), out=out_TMCS).add_(_wide(shift_RC))
        return
    scale, shift = _per_step(scale_RC, len(z_TMCS)), _per_step(shift_RC, len(z_TMCS))
    for t, z in enumerate(z_TMCS.unbind(0)):
        out_TMCS[t] = z.to(scale_RC.dtype) * scale[t] + shift[t]


def gradient_sums(g_TMCS: Tensor, z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    """Per step and channel: (sum of g, sum of g z), [T, C] float64."""
    rows = [_sums_of(g, z) for g, z in zip(g_TMCS.unbind(0), z_TMCS.unbind(0), strict=True)]
    return torch.stack([first for first, _ in rows]), torch.stack([second for _, second in rows])


def combine(g_TMCS: Tensor, z_TMCS: Tensor, a_RC: Tensor, b_RC: Tensor, c_RC: Tensor, out_TMCS: Tensor) -> None:
    """out = a g + b z + c."""
    T = len(g_TMCS)
    a, b, c = (_per_step(v, T) for v in (a_RC, b_RC, c_RC))
    for t in range(T):
        out_TMCS[t] = a[t] * g_TMCS[t].to(a_RC.dtype) + b[t] * z_TMCS[t].to(a_RC.dtype) + c[t]


def _sums_of(g_MCS: Tensor, z_MCS: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of g, sum of g z) per channel; float64 copies of one step, never of the sequence."""
    g = g_MCS.double()
    return g.sum((0, 2)), (g * z_MCS.double()).sum((0, 2))


def _per_step(v_RC: Tensor, steps: int) -> Tensor:
    """[T, 1, C, 1]; one row stands for all steps."""
    return _wide(v_RC).expand(steps, -1, -1, -1)


def _wide(v_RC: Tensor) -> Tensor:
    return v_RC[:, None, :, None]
