"""The additive coupling of two streams, and its inverse: what makes a block run backwards.

    y = a x + [f],   x = (y - [f]) / a

`f` is what a sub-network makes of the other stream, a the gain (1 unless one is given), and [f] is f rounded to the
grid of 2^-g. With a = 1 and streams on the grid, sum and difference are exact as long as streams stay below
`largest(g)`, so x comes back to the bit. Rounding passes the gradient straight through.

Source: Dinh et al. 2015, arXiv:1410.8516 (additive coupling); the grid is ours.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefit.errors import OptionError, RangeError
from spikefit.ops.values import has_values

# Grids that are allowed: coarser ones lose what the streams say, finer ones leave no range in float32.
COARSEST, FINEST = 4, 20


def check_stream_grid(who: str, grid: int | None, option: str = "stream_grid") -> None:
    """Raise OptionError unless `grid`, the value of `option`, is None or a number of digits that streams can have."""
    whole = isinstance(grid, int) and not isinstance(grid, bool)
    if grid is not None and not (whole and COARSEST <= grid <= FINEST):
        raise OptionError(
            f"{who}: {option} is the number of binary digits behind the point, {COARSEST} to {FINEST}, such as 14, or "
            f"None for none, got {grid!r}."
        )


def largest(grid: int, dtype: torch.dtype = torch.float32) -> float:
    """Below this, multiples of 2^-grid are exact in `dtype`: 2^(24 - grid) in float32."""
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return 2.0 ** (digits - grid)


def on_grid(f: Tensor, grid: int | None) -> Tensor:
    """`f` rounded to multiples of 2^-grid, the gradient unchanged; `f` itself without a grid."""
    return f if grid is None else _OnGrid.apply(f, grid)


def couple(x: Tensor, f: Tensor, *, grid: int | None = None, gain: Tensor | None = None) -> Tensor:
    """y = a x + [f] in the dtype of the stream `x`; `gain` broadcasts against it, None for 1."""
    f = on_grid(f.to(x.dtype), grid)
    return x + f if gain is None else gain * x + f


def uncouple(y: Tensor, f: Tensor, *, grid: int | None = None, gain: Tensor | None = None) -> Tensor:
    """x = (y - [f]) / a, from what `couple` gave."""
    x = y - on_grid(f.to(y.dtype), grid)
    return x if gain is None else x / gain


def check_range(who: str, streams: Tensor, grid: int | None, option: str = "stream_grid") -> None:
    """Raise RangeError if a stream has left the range in which its grid, the value of `option`, is exact."""
    if grid is None or not has_values(streams):
        return
    limit, found = largest(grid, streams.dtype), float(streams.detach().abs().amax())
    if not found < limit:
        coarser = "" if grid <= COARSEST else f" Use a coarser grid, such as {option}={max(COARSEST, grid - 4)}, or"
        raise RangeError(
            f"{who}: a stream reached {found:.6g}, and on a grid of 2^-{grid} sums are exact below {limit:g} only."
            f"{coarser or ' Use'} a smaller learning rate, or strategy='bptt' with {option}=None."
        )


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, grid):
        # + 0 makes -0 a 0: a difference of equal numbers gives no -0 back
        return torch.round(f * 2.0**grid).mul_(2.0**-grid).add_(0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g, None
