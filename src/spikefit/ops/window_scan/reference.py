"""The meaning of the scan of windows, in plain torch. Shapes: P windows, B batch, N neurons (all trailing axes).

Arithmetic is float32 (float64 for float64 input); spikes take the dtype of the input, membranes stay in the compute
dtype. Simple on purpose: the kernels are tested against this file. The equations stand in `Equation`.
"""

from typing import cast

import torch
from torch import Tensor

from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif.reference import Fire, Scalar
from spikefit.ops.window_scan.equation import Equation
from spikefit.ops.window_scan.fusion import FUSIONS
from spikefit.ops.window_scan.links import Link


def window_scan(
    x_PBN: Tensor, given_PBN: Tensor | None, *, phi: Scalar, v_threshold: Scalar, equation: Equation
) -> tuple[Tensor, Tensor]:
    """Run all windows by plain autograd; returns (spikes [P, B, N], membranes [P, B, N])."""
    fuse, compute = FUSIONS[equation.fuse], compute_dtype(x_PBN.dtype)
    zeros_BN = torch.zeros_like(x_PBN[0], dtype=compute)
    spikes: list[Tensor] = []
    made: list[Tensor] = []
    for (a, c), x_BN in zip(equation.links.pairs, x_PBN.unbind(0), strict=True):
        r_BN = fuse(_read(a, given_PBN, made, zeros_BN), _read(c, given_PBN, made, zeros_BN), phi)
        u_BN = equation.leak * r_BN + x_BN.to(compute)
        s_BN = Fire.apply(u_BN - v_threshold, equation.surrogate, equation.strict)
        made.append(_after_reset(u_BN, s_BN.detach(), v_threshold, equation))
        spikes.append(s_BN.to(x_PBN.dtype))
    return torch.stack(spikes), torch.stack(made)


def _read(link: Link, given_PBN: Tensor | None, made: list[Tensor], zeros_BN: Tensor) -> Tensor:
    if link.source == "zeros":
        return zeros_BN
    return made[link.window] if link.source == "made" else cast(Tensor, given_PBN)[link.window]


def _after_reset(u: Tensor, s: Tensor, v_threshold: Scalar, equation: Equation) -> Tensor:
    """The membrane handed on; `s` carries no gradient."""
    if equation.reset == "soft":
        return u - v_threshold * s
    return u * (1 - s) if equation.reset == "hard" else u
