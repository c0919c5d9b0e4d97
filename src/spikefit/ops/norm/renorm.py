"""Normalisation with running statistics, and the gradient of normalisation with those of the input."""

import torch
from torch import Tensor

from spikefit.ops import dispatch
from spikefit.ops.custom_op import custom_op
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.norm.op import _channel_norm_backward, _check, _choose, _empty, _kernels, _like, _view


def renorm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    *,
    eps: float = 1e-5,
    backend: dispatch.Backend = "auto",
) -> Tensor:
    """Normalise with given statistics (m_r, w_r) and go backward as with those of the input (m, w).

        xh = (z - m) / sqrt(w + eps),   p = sqrt((w + eps) / (w_r + eps)),   o = (m - m_r) / sqrt(w_r + eps)
        x = weight (xh p + o) + bias  =  weight (z - m_r) / sqrt(w_r + eps) + bias
        dz = weight p / sqrt(w + eps) (g - mean g - xh mean(g xh)),   dweight = sum g (xh p + o),   dbias = sum g

    xh is differentiated; p and o are constants of backward. Kept for it are `z` and vectors.

    Args:
        z: [T, B, C, ...], as in `channel_norm`.
        weight, bias: [C].
        moments: m and w of `z`, as `moments` returns them, [T, C] or [1, C].
        running: m_r and w_r, [C]; no gradient.
        eps: added to w and w_r.
        backend: "auto", "reference" or "numba" (CPU).

    Returns:
        x with shape, dtype and memory order of `z`, bit for bit `affine` with `running_map`.

    Raises:
        ShapeError: not [T, B, C, ...], another number of channels than `weight`, or not floating point.
        BackendError: the backend asked for cannot run this call.

    Source: Zhu et al., ICLR 2024, "Online stabilization of spiking neural networks".
    """
    _check(z, weight)
    return _renorm(z, weight, bias, *moments, *running, eps, _choose(z, backend))


def running_map(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(scale, shift) [C] of a norm with given statistics, in the dtype of its operands."""
    scale = weight * torch.rsqrt(var + eps)
    return scale, bias - mean * scale


@custom_op("spikefit::renorm")
def _renorm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    scale, shift = running_map(weight, bias, running_mean, running_var, eps)
    rows, compute = _view(z), compute_dtype(z.dtype)
    out = torch.empty_like(rows)
    _kernels(backend).affine(rows, scale.to(compute).view(1, -1), shift.to(compute).view(1, -1), out)
    return _like(out, z)


@_renorm.register_fake
def _(z, weight, bias, mean, var, running_mean, running_var, eps, backend):
    return _empty(z)


def _save(ctx, inputs, output) -> None:
    z, weight, _, *statistics, eps, backend = inputs
    ctx.save_for_backward(z, weight, *statistics)
    ctx.eps, ctx.backend = eps, backend


def _gradient(ctx, g):
    gradients = _channel_norm_backward(g, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return *gradients, None, None, None, None, None, None


_renorm.register_autograd(_gradient, setup_context=_save)
