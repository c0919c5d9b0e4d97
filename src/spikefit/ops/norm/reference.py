"""The meaning of channel normalisation, in plain torch, on views [T, M, C, S].

T time steps, M rows (batch, or batch and space when channels lie last), C channels, S the remaining contiguous axis.
Sums are float64, so statistics do not depend on the order of summation in float32; the affine map is z * scale + shift
in the compute dtype (float32, or float64 for float64 input), two roundings.
"""

import torch
from torch import Tensor


def sums(z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    """Per step and channel: (sum of z, sum of z^2), [T, C] float64."""
    steps = [z.double() for z in z_TMCS.unbind(0)]
    return torch.stack([z.sum((0, 2)) for z in steps]), torch.stack([(z * z).sum((0, 2)) for z in steps])


def affine(z_TMCS: Tensor, scale_RC: Tensor, shift_RC: Tensor, out_TMCS: Tensor) -> None:
    """out = z * scale + shift; `scale_RC` has T rows or one."""
    out_TMCS.copy_(z_TMCS.to(scale_RC.dtype) * _wide(scale_RC) + _wide(shift_RC))


def gradient_sums(g_TMCS: Tensor, z_TMCS: Tensor) -> tuple[Tensor, Tensor]:
    """Per step and channel: (sum of g, sum of g z), [T, C] float64."""
    steps = [(g.double(), z.double()) for g, z in zip(g_TMCS.unbind(0), z_TMCS.unbind(0), strict=True)]
    return torch.stack([g.sum((0, 2)) for g, _ in steps]), torch.stack([(g * z).sum((0, 2)) for g, z in steps])


def combine(g_TMCS: Tensor, z_TMCS: Tensor, a_RC: Tensor, b_RC: Tensor, c_RC: Tensor, out_TMCS: Tensor) -> None:
    """out = a g + b z + c."""
    g, z = g_TMCS.to(a_RC.dtype), z_TMCS.to(a_RC.dtype)
    out_TMCS.copy_(_wide(a_RC) * g + _wide(b_RC) * z + _wide(c_RC))


def _wide(v_RC: Tensor) -> Tensor:
    return v_RC[:, None, :, None]
