"""The one door to channel normalisation: statistics, affine map and their exact gradient."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.errors import ShapeError
from spikefit.ops import dispatch
from spikefit.ops.norm import reference


class Moments(NamedTuple):
    """Mean and biased variance, [T, C] (one row per step) or [1, C] (over the sequence), float32 or float64.

    `count` is the number of elements behind each entry.
    """

    mean: Tensor
    var: Tensor
    count: int


def channel_norm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    per_step: bool = False,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Moments]:
    """Normalise a sequence with its own statistics, as batch norm does in training.

        mean, var over (T, B, space), or over (B, space) of each step if `per_step`
        xh = (z - mean) / sqrt(var + eps)       x = weight xh + bias
        dbias = sum dx,  dweight = sum dx xh,  dz = weight / sqrt(var + eps) (dx - dbias / M - xh dweight / M)

    Between forward and backward `z` is kept, and vectors of C entries.

    Args:
        z: [T, B, C, ...], float32, float64, float16 or bfloat16; contiguous or channels-last within a step.
        weight, bias: [C].
        eps: added to the variance.
        per_step: statistics of each step apart.
        backend: "auto", "reference" or "numba" (CPU).

    Returns:
        (x, moments): x with shape, dtype and memory order of `z`. The moments carry no gradient.

    Raises:
        ShapeError: not [T, B, C, ...], or another number of channels than `weight`.

    Source: Ioffe, Szegedy 2015, arXiv:1502.03167.
    """
    _check(z, weight)
    x, mean, var = _ChannelNorm.apply(z, weight, bias, eps, per_step, _choose(z, backend))
    return x, Moments(mean, var, z.numel() // z.shape[2] // mean.shape[0])


def affine(z: Tensor, scale: Tensor, shift: Tensor, *, backend: dispatch.Backend = "auto") -> Tensor:
    """x = z * scale + shift per channel, in the compute dtype, stored in the dtype of `z`; differentiable.

    Args:
        z: [T, B, C, ...].
        scale, shift: [C] or, for values of each step, [T, C].
        backend: "auto", "reference" or "numba" (CPU).

    Raises:
        ShapeError: not [T, B, C, ...], or another number of channels than `scale`.
    """
    _check(z, scale)
    return _Affine.apply(z, scale.view(-1, z.shape[2]), shift.view(-1, z.shape[2]), _choose(z, backend))  # type: ignore[no-any-return]


def _check(z: Tensor, weight: Tensor) -> None:
    if z.ndim < 3 or z.shape[2] != weight.shape[-1]:
        raise ShapeError(f"norm: expected [T, B, C={weight.shape[-1]}, ...], got {tuple(z.shape)}.")


def _choose(z: Tensor, backend: str) -> str:
    no_triton = "channel normalisation has no Triton kernel; on a GPU use backend='reference'."
    if dispatch.resolve(backend) == "triton":
        return "reference"
    return dispatch.choose(backend, triton=no_triton, numba=dispatch.numba_refusal(z))


def _kernels(backend: str):
    if backend == "numba":
        from spikefit.ops.norm import cpu

        return cpu
    return reference


def _compute(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _view(z: Tensor) -> Tensor:
    """[T, B, C, ...] -> [T, M, C, S] without a copy for contiguous and channels-last steps."""
    T, _, C = z.shape[:3]
    if z.ndim == 3:
        return z.contiguous().unsqueeze(-1)
    last = z.movedim(2, -1)
    if last.is_contiguous():
        return last.reshape(T, -1, C, 1)
    return z.contiguous().flatten(3)


def _like(out_TMCS: Tensor, z: Tensor) -> Tensor:
    """Back to the shape of `z`, in the order `_view` found."""
    if z.ndim > 3 and z.movedim(2, -1).is_contiguous():
        return out_TMCS.view(z.movedim(2, -1).shape).movedim(-1, 2)
    return out_TMCS.view(z.shape)


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, bias, eps: float, per_step: bool, backend: str):  # type: ignore[override]
        kernels, rows = _kernels(backend), _view(z)
        total, squares = kernels.sums(rows)
        if not per_step:
            total, squares = total.sum(0, keepdim=True), squares.sum(0, keepdim=True)
        count = z.numel() // z.shape[2] // total.shape[0]
        mean = total / count
        var = (squares / count - mean * mean).clamp(min=0)
        inverse = torch.rsqrt(var + eps)
        scale = weight.double() * inverse
        compute = _compute(z)
        out = torch.empty_like(rows)
        kernels.affine(rows, scale.to(compute), (bias.double() - mean * scale).to(compute), out)
        ctx.save_for_backward(z, weight, mean, inverse)
        ctx.backend, ctx.count = backend, count
        mean, var = mean.to(compute), var.to(compute)
        ctx.mark_non_differentiable(mean, var)
        return _like(out, z), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _mean, _var):  # type: ignore[override]
        z, weight, mean, inverse = ctx.saved_tensors
        kernels, rows = _kernels(ctx.backend), _view(z)
        g_rows = _in_order_of(g, z)
        sum_g, sum_gz = kernels.gradient_sums(g_rows, rows)
        if mean.shape[0] == 1:
            sum_g, sum_gz = sum_g.sum(0, keepdim=True), sum_gz.sum(0, keepdim=True)
        d_bias, d_weight = sum_g, (sum_gz - mean * sum_g) * inverse
        compute, a = _compute(z), weight.double() * inverse
        b = -a * inverse * d_weight / ctx.count
        c = -a * d_bias / ctx.count - b * mean
        dz = None
        if ctx.needs_input_grad[0]:
            out = torch.empty_like(rows)
            kernels.combine(g_rows, rows, a.to(compute), b.to(compute), c.to(compute), out)
            dz = _like(out, z)
        return dz, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(weight.dtype), None, None, None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, scale_RC, shift_RC, backend: str):  # type: ignore[override]
        rows, compute = _view(z), _compute(z)
        out = torch.empty_like(rows)
        _kernels(backend).affine(rows, scale_RC.to(compute), shift_RC.to(compute), out)
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else z.new_empty(0), scale_RC)
        ctx.backend = backend
        return _like(out, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        z, scale_RC = ctx.saved_tensors
        kernels, compute = _kernels(ctx.backend), _compute(g)
        g_rows = _in_order_of(g, z) if z.numel() else _view(g)
        dz = d_scale = d_shift = None
        if ctx.needs_input_grad[0]:
            out = torch.empty_like(g_rows)
            kernels.affine(g_rows, scale_RC.to(compute), torch.zeros_like(scale_RC, dtype=compute), out)
            dz = _like(out, z if z.numel() else g)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_shift, d_scale = kernels.gradient_sums(g_rows, _view(z) if z.numel() else g_rows)
            if scale_RC.shape[0] == 1:
                d_shift, d_scale = d_shift.sum(0, keepdim=True), d_scale.sum(0, keepdim=True)
            d_shift = d_shift.to(scale_RC.dtype)
            d_scale = d_scale.to(scale_RC.dtype) if z.numel() else None
        return dz, d_scale, d_shift, None


def _in_order_of(g: Tensor, z: Tensor) -> Tensor:
    """The view of `g` in the memory order of `z`; copies only if they differ."""
    if z.ndim > 3 and z.movedim(2, -1).is_contiguous():
        last = g.movedim(2, -1).contiguous()
        return last.view(z.shape[0], -1, z.shape[2], 1)
    return g.contiguous().view(*z.shape[:3], -1)
