"""The one door to channel normalisation: statistics, affine map and their exact gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from spikefit.errors import ShapeError
from spikefit.ops import dispatch
from spikefit.ops.custom_op import custom_op
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.norm import reference


class Moments(NamedTuple):
    """Mean and biased variance, [T, C] (one row per step) or [1, C] (over the sequence), float32 or float64.

    `elements` is the number of values behind each entry.
    """

    mean: Tensor
    var: Tensor
    elements: int


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
        ShapeError: not [T, B, C, ...], another number of channels than `weight`, or not floating point.
        BackendError: the backend asked for cannot run this call.

    Source: Ioffe, Szegedy 2015, arXiv:1502.03167.
    """
    _check(z, weight)
    if weight.ndim != 1 or bias.shape != weight.shape:
        raise ShapeError(
            f"norm: expected weight and bias as [C={z.shape[2]}], got {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    x, mean, var = _channel_norm(z, weight, bias, eps, per_step, _choose(z, backend))
    compute = compute_dtype(z.dtype)
    return x, Moments(mean.detach().to(compute), var.detach().to(compute), z.numel() // mean.numel())


def affine(z: Tensor, scale: Tensor, shift: Tensor, *, backend: dispatch.Backend = "auto") -> Tensor:
    """x = z * scale + shift per channel, in the compute dtype, stored in the dtype of `z`; differentiable.

    Args:
        z: [T, B, C, ...].
        scale, shift: [C] or, for values of each step, [T, C].
        backend: "auto", "reference" or "numba" (CPU).

    Raises:
        ShapeError: not [T, B, C, ...], another number of channels than `scale`, or not floating point.
        BackendError: the backend asked for cannot run this call.
    """
    _check(z, scale)
    return _affine(z, scale.view(-1, z.shape[2]), shift.view(-1, z.shape[2]), _choose(z, backend))


def gradient_sums(g: Tensor, z: Tensor, *, backend: dispatch.Backend = "auto") -> tuple[Tensor, Tensor]:
    """Per step and channel (sum of g, sum of g z), [T, C] float64, of two sequences [T, B, C, ...]; no gradient."""
    return _kernels(_choose(z, backend)).gradient_sums(_in_order_of(g, z), _view(z))


def combine(g: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor, *, backend: dispatch.Backend = "auto") -> Tensor:
    """a g + b z + c per channel; a, b, c are [C] or [T, C] in the compute dtype, the result like `z`; no gradient."""
    rows = _view(z)
    out = torch.empty_like(rows)
    _kernels(_choose(z, backend)).combine(_in_order_of(g, z), rows, a, b, c, out)
    return _like(out, z)


def moments(z: Tensor, *, per_step: bool = False, backend: dispatch.Backend = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a sequence [T, B, C, ...] per channel, [T, C] or [1, C] float64; no gradient."""
    return _moments(z, per_step, _choose(z, backend))


def scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The affine map of a norm, float64 [R, C]: x = z scale + shift."""
    scale = weight.double() * torch.rsqrt(var + eps)
    return scale, bias.double() - mean * scale


class NormGradient(NamedTuple):
    """dz = a g + b z + c and the gradients of weight and bias, all float64, [R, C]."""

    a: Tensor
    b: Tensor
    c: Tensor
    d_weight: Tensor
    d_bias: Tensor


def norm_gradient(
    sum_g: Tensor,
    sum_gz: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    count: int,
    running: tuple[Tensor, Tensor] | None = None,
) -> NormGradient:
    """The gradient of a norm from its two sums, [R, C] float64; `count` values stand behind each entry.

    dz = weight r (g - dbias / count - xh dweight / count),   r = 1 / sqrt(var + eps),   xh = (z - mean) r

    With `running` = (m_r, w_r) it is that of `renorm`: the first factor r, and mean and r in dweight, are those of w_r.
    """
    inverse = torch.rsqrt(var + eps)
    d_normal = (sum_gz - mean * sum_g) * inverse
    outer, d_weight = inverse, d_normal
    if running is not None:
        outer = torch.rsqrt(running[1].double() + eps).expand_as(inverse)
        d_weight = (sum_gz - running[0].double() * sum_g) * outer
    a = weight.double() * outer
    b = -a * inverse * d_normal / count
    return NormGradient(a, b, -a * sum_g / count - b * mean, d_weight, sum_g)


def _check(z: Tensor, weight: Tensor) -> None:
    if z.ndim < 3 or z.shape[2] != weight.shape[-1]:
        raise ShapeError(
            f"norm: expected [T, B, C={weight.shape[-1]}, ...], got {tuple(z.shape)}. "
            "Make the norm for the channels of what comes before it."
        )
    if not z.is_floating_point():
        raise ShapeError(f"norm: expected floating point input, got {z.dtype}; call x.float() first.")


def _choose(z: Tensor, backend: str) -> str:
    no_triton = "channel normalisation has no Triton kernel; on a GPU use backend='reference'."
    # `use_backend("triton")` is a wish for a whole model, in which the neurons have kernels and norms run in torch
    if dispatch.check_backend(backend) == "auto" and dispatch.resolve(backend) == "triton":
        return "reference"
    return dispatch.choose(backend, triton=no_triton, numba=dispatch.numba_refusal(z))


def _kernels(backend: str):
    if backend == "numba":
        from spikefit.ops.norm import cpu

        return cpu
    return reference


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


def _empty(z: Tensor) -> Tensor:
    """An output in the shape and, for contiguous and channels-last steps, the memory order of `z`."""
    if z.ndim > 3 and z.movedim(2, -1).is_contiguous():
        return torch.empty_like(z.movedim(2, -1), memory_format=torch.contiguous_format).movedim(-1, 2)
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@custom_op("spikefit::channel_norm")
def _channel_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, per_step: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, mean, var); the moments are float64, [T, C] or [1, C]."""
    rows, compute, kernels = _view(z), compute_dtype(z.dtype), _kernels(backend)
    out = torch.empty_like(rows)
    if _in_one_call(backend, per_step or z.shape[0] == 1, z, weight, bias):
        return _like(out, z), *kernels.normalise(rows, weight, bias, eps, out)
    mean, var = _moments_on(z, per_step, backend)
    scale, shift = scale_and_shift(weight, bias, mean, var, eps)
    kernels.affine(rows, scale.to(compute), shift.to(compute), out)
    return _like(out, z), mean, var


def _in_one_call(backend: str, each_step: bool, *tensors: Tensor) -> bool:
    """Whether one call of numba does it all; one step at a time, small tensors between calls cost more than they do."""
    return backend == "numba" and each_step and all(t.dtype == torch.float32 for t in tensors)


def _moments_on(z: Tensor, per_step: bool, backend: str) -> tuple[Tensor, Tensor]:
    rows = _view(z)
    # var = E[z^2] - E[z]^2 cancels where the mean is large: float64 sums have digits to spare for float32 values, and
    # float64 values are taken from the first one of their channel
    first = rows[: None if per_step else 1, :1, :, :1] if z.dtype == torch.float64 else None
    total, squares = _kernels(backend).sums(rows if first is None else rows - first)
    if not per_step:
        total, squares = total.sum(0, keepdim=True), squares.sum(0, keepdim=True)
    count = z.numel() // total.numel()
    mean = total / count
    var = (squares / count - mean * mean).clamp(min=0)
    return mean if first is None else mean + first[:, 0, :, 0], var


@custom_op("spikefit::moments")
def _moments(z: Tensor, per_step: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _moments_on(z, per_step, backend)


@_moments.register_fake
def _(z, per_step, backend):
    return tuple(z.new_empty((z.shape[0] if per_step else 1, z.shape[2]), dtype=torch.float64) for _ in range(2))


@_channel_norm.register_fake
def _(z, weight, bias, eps, per_step, backend):
    moments = [z.new_empty((z.shape[0] if per_step else 1, z.shape[2]), dtype=torch.float64) for _ in range(2)]
    return _empty(z), *moments


@custom_op("spikefit::channel_norm_backward")
def _channel_norm_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dweight, dbias); of `renorm` where running statistics are given."""
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    kernels, rows, compute = _kernels(backend), _view(z), compute_dtype(z.dtype)
    g_rows, out = _in_order_of(g, z), torch.empty_like(rows)
    if running is None and _in_one_call(backend, mean.shape[0] == z.shape[0], g, z, weight):
        d_weight, d_bias = kernels.gradient(g_rows, rows, weight, mean, var, eps, out)
        return _like(out, z), d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(weight.dtype)
    sum_g, sum_gz = kernels.gradient_sums(g_rows, rows)
    if mean.shape[0] == 1:
        sum_g, sum_gz = sum_g.sum(0, keepdim=True), sum_gz.sum(0, keepdim=True)
    d = norm_gradient(sum_g, sum_gz, weight, mean, var, eps, z.numel() // mean.numel(), running)
    kernels.combine(g_rows, rows, d.a.to(compute), d.b.to(compute), d.c.to(compute), out)
    return _like(out, z), d.d_weight.sum(0).to(weight.dtype), d.d_bias.sum(0).to(weight.dtype)


@_channel_norm_backward.register_fake
def _(g, z, weight, mean, var, running_mean, running_var, eps, backend):
    return _empty(z), torch.empty_like(weight), torch.empty_like(weight)


def _save_norm(ctx, inputs, output) -> None:
    z, weight, _, eps, _, backend = inputs
    ctx.save_for_backward(z, weight, *output[1:])
    ctx.eps, ctx.backend = eps, backend


def _norm_gradient(ctx, g, _mean, _var):
    dz, d_weight, d_bias = _channel_norm_backward(g, *ctx.saved_tensors, None, None, ctx.eps, ctx.backend)
    return dz, d_weight, d_bias, None, None, None


_channel_norm.register_autograd(_norm_gradient, setup_context=_save_norm)


@custom_op("spikefit::affine")
def _affine(z: Tensor, scale_RC: Tensor, shift_RC: Tensor, backend: str) -> Tensor:
    rows, compute = _view(z), compute_dtype(z.dtype)
    out = torch.empty_like(rows)
    _kernels(backend).affine(rows, scale_RC.to(compute), shift_RC.to(compute), out)
    return _like(out, z)


@_affine.register_fake
def _(z, scale_RC, shift_RC, backend):
    return _empty(z)


@custom_op("spikefit::affine_backward")
def _affine_backward(g: Tensor, z: Tensor, scale_RC: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dscale, dshift)."""
    kernels, compute = _kernels(backend), compute_dtype(z.dtype)
    g_rows = _in_order_of(g, z)
    out = torch.empty_like(g_rows)
    kernels.affine(g_rows, scale_RC.to(compute), torch.zeros_like(scale_RC, dtype=compute), out)
    d_shift, d_scale = kernels.gradient_sums(g_rows, _view(z))
    if scale_RC.shape[0] == 1:
        d_shift, d_scale = d_shift.sum(0, keepdim=True), d_scale.sum(0, keepdim=True)
    return _like(out, z), d_scale.to(scale_RC.dtype), d_shift.to(scale_RC.dtype)


@_affine_backward.register_fake
def _(g, z, scale_RC, backend):
    return _empty(z), torch.empty_like(scale_RC), torch.empty_like(scale_RC)


def _save_affine(ctx, inputs, output) -> None:
    z, scale_RC, _, backend = inputs
    ctx.save_for_backward(z, scale_RC)
    ctx.backend = backend


def _affine_gradient(ctx, g):
    return *_affine_backward(g, *ctx.saved_tensors, ctx.backend), None


_affine.register_autograd(_affine_gradient, setup_context=_save_affine)


def _in_order_of(g: Tensor, z: Tensor) -> Tensor:
    """The view of `g` in the memory order of `z`; copies only if they differ."""
    if z.ndim > 3 and z.movedim(2, -1).is_contiguous():
        last = g.movedim(2, -1).contiguous()
        return last.view(z.shape[0], -1, z.shape[2], 1)
    return g.contiguous().view(*z.shape[:3], -1)
