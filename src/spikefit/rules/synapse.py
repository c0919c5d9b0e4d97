"""Functions whose value is that of a part of a unit and whose gradient is that of a rule.

    z = W i + b           forward
    di = W^T g            backward, the same step
    dW = g a^T            with the trace a in the place of the input i
    db = c g              with the trace c in the place of 1

The weight is applied once; what is kept for backward is the trace, not the input. No gradient flows into a trace.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.layers.weight import Map, stepwise

# The trace of a number: a float, or 0-d where the leak is learned.
Factor = float | Tensor


def traced_map(
    x: Tensor, trace: Tensor, c: Factor, weight: Tensor, bias: Tensor | None, map_: Map, chunk: int | None = None
) -> Tensor:
    """Apply a linear map or convolution to one step; its weight gradient reads `trace` instead of `x`.

        z = W * x + bias;   dx = W^T g,   dW = sum over B and places of g trace^T,   dbias = c sum g

    Args:
        x: [1, B, C, ...], in the dtype of `weight`.
        trace: shape of `x`; kept in its own dtype, and cast to that of `weight` in backward.
        c: trace of the bias.
        weight, bias: as the map takes them; standardised or cast before.
        map_: linear, conv1d or conv2d.
        chunk: batch rows per call in forward, as in `apply_weight`.

    Returns:
        z [1, B, C_out, ...], bit for bit that of `apply_weight`.
    """
    return _TracedMap.apply(x, trace, c, weight, bias, map_, chunk)


class _TracedMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trace, c, weight, bias, map_, chunk):
        ctx.save_for_backward(trace, weight)
        ctx.map, ctx.c, ctx.has_bias = map_, c, bias is not None
        return stepwise(x.__getitem__, x.shape[0], map_, weight, bias, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        trace, weight = ctx.saved_tensors
        want_x, want_weight, want_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        # the gradient of the input reads the weight alone, so the trace can stand in the place of the input
        rows = trace.flatten(0, 1).to(weight.dtype)
        dx, dw, db = ctx.map.gradient(rows, g.flatten(0, 1), weight, (want_x, want_weight, ctx.has_bias and want_bias))
        dx = None if dx is None else dx.unflatten(0, trace.shape[:2])
        return dx, None, None, dw, None if db is None else db * ctx.c, None, None


def traced_affine(x: Tensor, weight: Tensor, bias: Tensor, trace: Tensor, c: Factor) -> Tensor:
    """`x` itself, the output of a norm, with the gradients of the norm's weight and bias by their traces.

        dweight = sum over B and places of g trace,   dbias = c sum g

    Args:
        x: weight xh + bias, computed without a gradient to `weight` and `bias`, [1, B, C, ...].
        weight, bias: [C].
        trace: trace of xh, shape of `x`.
        c: trace of 1.
    """
    return _TracedAffine.apply(x, weight, bias, trace, c)


class _TracedAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, trace, c):
        ctx.save_for_backward(trace)
        ctx.c, ctx.dtype = c, weight.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (trace,) = ctx.saved_tensors
        axes = [axis for axis in range(g.ndim) if axis != 2]
        wide = g.to(ctx.dtype)
        d_weight = (wide * trace.to(ctx.dtype)).sum(axes) if ctx.needs_input_grad[1] else None
        return g, d_weight, wide.sum(axes) * ctx.c if ctx.needs_input_grad[2] else None, None, None


def traced_leak(x: Tensor, leak: Tensor, gain: Factor, f: Tensor, h: Tensor | None) -> Tensor:
    """`x` itself, the current of neurons that learn their leak, with the gradients of leak and gain.

        u = leak v + gain x;   dleak = sum g f / gain,   dgain = sum g h / gain

    Args:
        x: current of the neurons, [1, B, ...]; they take leak and gain without a gradient.
        leak, gain: 0-d; a fixed gain is a number.
        f: how u depends on the leak, [B, ...].
        h: how u depends on the gain, [B, ...]; None for a fixed one.
    """
    return _TracedLeak.apply(x, leak, gain, f, h)


class _TracedLeak(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, leak, gain, f, h):
        ctx.save_for_backward(f, h)
        ctx.gain, ctx.dtype = gain.detach() if isinstance(gain, Tensor) else gain, leak.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        f, h = ctx.saved_tensors
        d = g[0].to(f.dtype) / ctx.gain
        d_leak = (d * f).sum().to(ctx.dtype) if ctx.needs_input_grad[1] else None
        d_gain = (d * h).sum().to(ctx.dtype) if h is not None and ctx.needs_input_grad[2] else None
        return g, d_leak, d_gain, None, None


def traced_state(v: Tensor, leak: Tensor, f: Tensor) -> Tensor:
    """`v` itself, the membrane that a step starts from, with the gradient of a leak that earlier steps have used.

        dleak = sum g f

    Args:
        v: [B, ...], without a gradient of its own.
        leak: 0-d; the neuron itself gives it the gradient of this step.
        f: how v depends on the leak, [B, ...].
    """
    return _TracedState.apply(v, leak, f)


class _TracedState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, leak, f):
        ctx.save_for_backward(f)
        ctx.dtype = leak.dtype
        return v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        return None, (g.to(f.dtype) * f).sum().to(ctx.dtype), None


def weighted(z: Tensor, c: Factor) -> Tensor:
    """`z` itself; its gradient comes back times `c`."""
    return _Weighted.apply(z, c)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, c):
        ctx.c = c
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.c, None
