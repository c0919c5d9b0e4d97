"""Spikes without a memory: a threshold, with a window of slope one in the place of its derivative.

    s = 1 if v >= 1/2 else 0        backward: ds/dv = 1 if 0 <= v <= 1 else 0

The rule is the same in training and in evaluation. The window is the derivative of clamp(v, 0, 1), the smooth twin.

Source: Hu et al. 2024, arXiv:2405.16466 (the spikes between stages and inside their branches).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEVEL = 0.5


def fire(v: Tensor) -> Tensor:
    """Spikes in {0, 1} of the analog value `v`, shape and dtype of `v`; a NaN gives none. Keeps `v` for backward."""
    return _Fire.apply(v)


def spikes(v: Tensor) -> Tensor:
    """The same as bool, without a gradient."""
    return v >= LEVEL


def window(v: Tensor) -> Tensor:
    """Where the slope is 1, as bool."""
    return (v >= 0) & (v <= 1)


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return spikes(v).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return within(window(v), g)


def within(inside: Tensor, g: Tensor) -> Tensor:
    """`g` where the window is open, 0 elsewhere."""
    # a product with bools would make a copy that no prediction of memory sees, and torch.where takes twice the time
    return inside.to(g.dtype).mul_(g)
