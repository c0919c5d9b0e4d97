"""Weight operations over a sequence: convolutions and linear maps, always one time step per call.

The forward of a weight is the same whatever is trained or kept: step t reads [b, ...] rows of one time step. So a
sequence fed in one call, step by step, or recomputed piece by piece gives the same bits. The backward, which only has
to agree to rounding, runs on the folded batch [T * B, ...] in one call.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError

Weight = nn.Conv1d | nn.Conv2d | nn.Linear


def apply_weight(module: Weight, x: Tensor, *, chunk: int | None = None) -> Tensor:
    """Apply a convolution or linear map to every step of a sequence.

        z_t = W * i_t + bias

    Args:
        module: nn.Conv1d, nn.Conv2d or nn.Linear (or the standardised forms of this file).
        x: [T, B, C, ...] for convolutions, [T, B, ..., C] for linear maps.
        chunk: batch rows per call; None for all rows of a step.

    Returns:
        z: [T, B, C_out, ...]; 2-d convolutions return channels-last steps.

    Raises:
        ShapeError: another rank or number of channels than the module expects.
    """
    _check(module, x)
    weight, bias = module.weight, module.bias
    if isinstance(module, StandardizedConv2d | StandardizedLinear):
        weight = module.standardized()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    geometry = None
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise OptionError(f"apply_weight: give {type(module).__name__} a numeric zero padding.")
        stride: tuple[int, ...] = module.stride
        if set(module.kernel_size) == {1} and set(module.padding) == {0} and max(stride) > 1:
            # oneDNN writes out of bounds in the weight gradient of strided 1x1 convolutions (seen in torch 2.13 on CPU)
            x = x[..., :: stride[0]] if len(stride) == 1 else x[..., :: stride[0], :: stride[1]]
            stride = (1,) * len(stride)
        geometry = (stride, module.padding, module.dilation, module.groups)
    return _Stepwise.apply(x, weight, bias, geometry, chunk)


def _check(module: Weight, x: Tensor) -> None:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        if x.ndim < 3 or x.shape[-1] != module.in_features:
            raise ShapeError(
                f"{name}: expected x as [T, B, {module.in_features}], got {tuple(x.shape)}. "
                "Time comes first: encoding.repeat(x, timesteps=T) adds it."
            )
        return
    space = "H, W" if isinstance(module, nn.Conv2d) else "L"
    rank = 5 if isinstance(module, nn.Conv2d) else 4
    if x.ndim != rank or x.shape[2] != module.in_channels:
        raise ShapeError(
            f"{name}: expected x as [T, B, {module.in_channels}, {space}], got {tuple(x.shape)}. "
            "A static input needs a time axis: encoding.repeat(x, timesteps=T)."
        )


class _Stepwise(torch.autograd.Function):
    """Forward one step (and `chunk` rows) at a time, backward on the folded batch; keeps the input and the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, chunk):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        T, B = x.shape[:2]
        rows = B if chunk is None else min(chunk, B)
        z = None
        for t in range(T):
            for b in range(0, B, rows):
                piece = _call(_dense(x[t, b : b + rows]), weight, bias, geometry)
                if z is None:
                    if piece.shape[0] == T * B:
                        return piece.unflatten(0, (T, B))
                    z = _empty(piece, T, B)
                z[t, b : b + rows] = piece
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        want_x, want_w, want_b = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.has_bias and ctx.needs_input_grad[2],
        )
        if ctx.geometry is None:
            rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            dx = (g_rows @ weight).view(x.shape) if want_x else None
            dw = g_rows.mT @ rows if want_w else None
            return dx, dw, g_rows.sum(0) if want_b else None, None, None
        stride, padding, dilation, groups = ctx.geometry
        dx, dw, db = torch.ops.aten.convolution_backward(
            _dense(g.flatten(0, 1)),
            _dense(x.flatten(0, 1)),
            weight,
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [want_x, want_w, want_b],
        )
        return dx.unflatten(0, x.shape[:2]) if want_x else None, dw, db, None, None


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, geometry) -> Tensor:
    if geometry is None:
        return F.linear(x, weight, bias)
    convolve = F.conv2d if weight.ndim == 4 else F.conv1d
    return convolve(x, weight, bias, *geometry)


def _dense(x: Tensor) -> Tensor:
    """Images in channels-last, where float32 convolutions are faster; anything else contiguous."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _empty(piece: Tensor, T: int, B: int) -> Tensor:
    """[T, B, ...] in the memory order of `piece`."""
    shape = (T * B, *piece.shape[1:])
    order = torch.channels_last if piece.ndim == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=order).unflatten(0, (T, B))


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose weight has mean 0 and variance 1 / fan_in per output channel, times a learnable gain.

        W' = gain (W - mean(W)) / sqrt(fan_in var(W) + eps)

    Used with `norm="ws"`, where no statistics of activations exist.

    Source: Qiao et al. 2019, arXiv:1903.10520; scaling of Brock et al. 2021, arXiv:2101.08692.
    """

    def __init__(self, *args, eps: float = 1e-4, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def standardized(self) -> Tensor:
        """W', shape of `weight`."""
        return _standardize(self.weight, self.gain, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedLinear(nn.Linear):
    """Linear map with the standardised weight of `StandardizedConv2d`."""

    def __init__(self, *args, eps: float = 1e-4, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(self.out_features))

    def standardized(self) -> Tensor:
        """W', shape of `weight`."""
        return _standardize(self.weight, self.gain, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.standardized(), self.bias)


def _standardize(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    axes = tuple(range(1, weight.ndim))
    fan_in = math.prod(weight.shape[1:])
    var, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
    scale = gain.view(-1, *[1] * len(axes)) * torch.rsqrt(fan_in * var + eps)
    return (weight - mean) * scale
