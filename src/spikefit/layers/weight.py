"""Weight operations over a sequence: convolutions and linear maps, always one time step per call.

The forward of a weight is the same whatever is trained or kept: step t reads [b, ...] rows of one time step. So a
sequence fed in one call, step by step, or recomputed piece by piece gives the same bits. The backward, which only has
to agree to rounding, runs on the folded batch [T * B, ...] in one call.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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
    check_input(module, x)
    weight, bias = parameters_of(module, x.device.type)
    return _Stepwise.apply(x.to(weight.dtype) if autocasting(x.device.type) else x, weight, bias, map_of(module), chunk)


class Map(NamedTuple):
    """A weight without its numbers: a linear map, or a convolution of given geometry.

    `thin` is the stride along each space axis that is applied to the input before the convolution sees it.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    thin: tuple[int, ...] = ()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows [N, C, ...] -> [N, C_out, ...]."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        convolve = F.conv2d if self.kind == "conv2d" else F.conv1d
        return convolve(_dense(self._thinned(x)), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def prepared(self, weight: Tensor) -> Tensor:
        """The weight in the memory order in which a convolution would copy it, call by call."""
        return _dense(weight) if self.kind != "linear" else weight

    def gradient(
        self, x: Tensor, g: Tensor, weight: Tensor, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias) of rows [N, C, ...] for g = dL/dz; those not wanted are None."""
        if self.kind == "linear":
            x_rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            dx = (g_rows @ weight).view(x.shape) if wants[0] else None
            return dx, g_rows.mT @ x_rows if wants[1] else None, g_rows.sum(0) if wants[2] else None
        thinned = self._thinned(x)
        dx, dw, db = torch.ops.aten.convolution_backward(
            _dense(g),
            _dense(thinned),
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            list(wants),
        )
        if wants[0] and self.thin:
            full = torch.zeros_like(x, dtype=dx.dtype)
            self._thinned(full).copy_(dx)
            dx = full
        return dx if wants[0] else None, dw if wants[1] else None, db if wants[2] else None

    def _thinned(self, x: Tensor) -> Tensor:
        return x[(..., *(slice(None, None, step) for step in self.thin))] if self.thin else x  # type: ignore[index]


def map_of(module: Weight) -> Map:
    """The map of a module."""
    if isinstance(module, nn.Linear):
        return Map("linear")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise OptionError(f"apply_weight: give {type(module).__name__} a numeric zero padding.")
    kind = "conv2d" if isinstance(module, nn.Conv2d) else "conv1d"
    stride, thin = tuple(module.stride), tuple[int, ...]()
    if set(module.kernel_size) == {1} and set(module.padding) == {0} and max(stride) > 1:
        # oneDNN writes out of bounds in the weight gradient of strided 1x1 convolutions (seen in torch 2.13 on CPU)
        stride, thin = (1,) * len(stride), stride
    return Map(kind, stride, tuple(module.padding), tuple(module.dilation), module.groups, thin)


def parameters_of(module: Weight, device: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) as the map takes them: standardised, and cast where autocast asks for it."""
    weight, bias = module.weight, module.bias
    if isinstance(module, StandardizedConv2d | StandardizedLinear):
        weight = module.standardized()
    if autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias


def autocasting(device: str) -> bool:
    """Whether weights run in the dtype of autocast now."""
    return torch.is_autocast_enabled(device)


def check_input(module: Weight, x: Tensor) -> None:
    """Raise ShapeError unless `x` is a sequence that the module takes."""
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
    def forward(ctx, x, weight, bias, map_, chunk):
        ctx.save_for_backward(x, weight)
        ctx.map, ctx.has_bias = map_, bias is not None
        return stepwise(x.__getitem__, x.shape[0], map_, weight, bias, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        wants = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
        dx, dw, db = ctx.map.gradient(x.flatten(0, 1), g.flatten(0, 1), weight, wants)
        return None if dx is None else dx.unflatten(0, x.shape[:2]), dw, db, None, None


def stepwise(
    step: Callable[[int], Tensor], timesteps: int, map_: Map, weight: Tensor, bias: Tensor | None, chunk: int | None
) -> Tensor:
    """z [T, B, ...] of the inputs step(t) [B, ...], `chunk` rows of one step per call: the one forward of a weight."""
    z, weight = None, map_.prepared(weight)
    for t in range(timesteps):
        x = step(t)
        rows = x.shape[0] if chunk is None else min(chunk, x.shape[0])
        for b in range(0, x.shape[0], rows):
            piece = map_(x[b : b + rows], weight, bias)
            if z is None:
                if piece.shape[0] == timesteps * x.shape[0]:
                    return piece.unflatten(0, (timesteps, -1))
                z = _empty(piece, timesteps, x.shape[0])
            z[t, b : b + rows] = piece
    assert z is not None, "a sequence has at least one step"
    return z


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
