"""Windows of a map: where they lie, cutting them out, and putting a map together again.

Maps are [B, H, W, C], windows [P, B, h, w, C] for p = 1..P.

Source: Yao et al., "Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency", ACML 2023
(PMLR 222, pp. 1558-1573); two windows as halves of the rows, and the gradient of the union, are ours.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError, check_choice

KINDS: tuple[str, ...] = ("tile", "dilated")
COUNTS: tuple[int, ...] = (1, 2, 4)
CONDENSES: tuple[str, ...] = ("or", "mean")
OR_GRADIENTS: tuple[str, ...] = ("ste", "release")


class Windows(NamedTuple):
    """Where the windows of a map lie.

    Attributes:
        size: (H, W) of the map.
        side: (h, w) of every window.
        offsets: (row, column) of the first pixel of each, in their order.
    """

    size: tuple[int, int]
    side: tuple[int, int]
    offsets: tuple[tuple[int, int], ...]

    @property
    def overlap(self) -> bool:
        """Whether a pixel lies in more than one window."""
        return len(self.offsets) * self.side[0] * self.side[1] > self.size[0] * self.size[1]

    def cover(self) -> Tensor:
        """How many windows each pixel lies in, [H, W] int64."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        for row, column in self.offsets:
            counts[row : row + self.side[0], column : column + self.side[1]] += 1
        return counts


def windows_of(kind: str, count: int, size: tuple[int, int]) -> Windows:
    """The windows of a map.

        count 4   tile      h = H/2,  w = W/2    from (0, 0) (0, W/2) (H/2, 0) (H/2, W/2)
                  dilated   h = 3H/4, w = 3W/4   from (0, 0) (0, W/4) (H/4, 0) (H/4, W/4)
        count 2   halves of the rows, or 3/4 of them from rows 0 and H/4; all columns
        count 1   the whole map

    Args:
        kind: "tile" covers every pixel once, "dilated" the middle of the map up to four times.
        count: 1, 2 or 4.
        size: (H, W).

    Raises:
        OptionError: an unknown kind or count.
        ShapeError: sides that do not divide.
    """
    check_windows("windows_of", kind, count)
    (H, W), parts = size, 2 if kind == "tile" else 4
    cut = {"H": H} if count == 2 else {"H": H, "W": W} if count == 4 else {}
    if any(side % parts for side in cut.values()):
        other = " or kind='tile', which needs multiples of 2" if kind == "dilated" else ""
        raise ShapeError(
            f"windows: {count} {kind} windows need {' and '.join(cut)} as multiples of {parts}, got a map of {H}x{W}; "
            f"pad or resize the images, or use windows=1{other}."
        )
    step, share = (2, 1) if kind == "tile" else (4, 3)
    rows, columns = (0, H // step), (0, W // step)
    if count == 1:
        return Windows(size, size, ((0, 0),))
    h, w = H * share // parts, W * share // parts
    if count == 2:
        return Windows(size, (h, W), tuple((row, 0) for row in rows))
    return Windows(size, (h, w), tuple((row, column) for row in rows for column in columns))


def check_windows(who: str, kind: str, count: int) -> None:
    """Raise OptionError unless there is such a kind and number of windows."""
    check_choice(who, "kind", kind, KINDS)
    if isinstance(count, bool):  # True is equal to 1
        raise OptionError(f"{who}: windows must be one of {', '.join(map(str, COUNTS))}, got {count!r}.")
    check_choice(who, "windows", count, COUNTS)


def cut(x_BHWC: Tensor, windows: Windows) -> Tensor:
    """The windows of a map, [P, B, h, w, C]."""
    # torch.compile makes symbols of sides, which a function of our own cannot take
    return pieces(x_BHWC, windows) if torch.compiler.is_compiling() else _Cut.apply(x_BHWC, windows)


def put_back(parts_PBhwC: Tensor, windows: Windows) -> Tensor:
    """The sum of the windows in their places, [B, H, W, C]; the adjoint of `cut`."""
    return _padded(parts_PBhwC, windows) if torch.compiler.is_compiling() else _PutBack.apply(parts_PBhwC, windows)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, windows):
        ctx.windows = windows
        return pieces(x, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return summed(g, ctx.windows), None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, windows):
        ctx.windows = windows
        return summed(parts, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return pieces(g, ctx.windows), None


def pieces(x: Tensor, windows: Windows) -> Tensor:
    """`cut` without a graph."""
    h, w = windows.side
    return torch.stack([x[:, row : row + h, column : column + w] for row, column in windows.offsets])


def summed(parts: Tensor, windows: Windows) -> Tensor:
    """`put_back` without a graph."""
    (h, w), shape = windows.side, (parts.shape[1], *windows.size, parts.shape[-1])
    made = parts.new_zeros(shape) if windows.overlap else parts.new_empty(shape)
    for part, (row, column) in zip(parts, windows.offsets, strict=True):
        place = made[:, row : row + h, column : column + w]
        if windows.overlap:
            place += part
        else:
            place.copy_(part)
    return made


def _padded(parts: Tensor, windows: Windows) -> Tensor:
    """`put_back` for torch.compile, which loses the graph of what is written into a new tensor."""
    (H, W), (h, w) = windows.size, windows.side
    places = [(0, 0, column, W - column - w, row, H - row - h) for row, column in windows.offsets]
    made = [F.pad(part, place) for part, place in zip(parts.unbind(0), places, strict=True)]
    return reduce(torch.add, made)


def recompose(parts_PBhwC: Tensor, windows: Windows, mode: str = "mean", *, or_grad: str = "ste") -> Tensor:
    """One map of windows that may overlap.

        R = sum of the windows in their places / number of windows that cover the pixel
        "mean": R         "or": 1 where R > 0, else 0

    Args:
        parts_PBhwC: windows [P, B, h, w, C]; spikes for "or".
        windows: where they lie.
        mode: "mean" or "or".
        or_grad: gradient of "or": "ste" passes that of the mean, "release" does so only where R stayed 0.

    Returns:
        [B, H, W, C].

    Raises:
        OptionError: an unknown mode or gradient.
        ShapeError: windows of another number or side.
    """
    check_choice("recompose", "mode", mode, CONDENSES)
    check_choice("recompose", "or_grad", or_grad, OR_GRADIENTS)
    expected = (len(windows.offsets), *windows.side)
    if parts_PBhwC.ndim != 5 or (parts_PBhwC.shape[0], *parts_PBhwC.shape[2:4]) != expected:
        raise ShapeError(
            f"recompose: expected windows [{expected[0]}, B, {expected[1]}, {expected[2]}, C], got "
            f"{tuple(parts_PBhwC.shape)}; pass the windows that cut made with the same places."
        )
    made = put_back(parts_PBhwC, windows)
    if windows.overlap:
        # halves and quarters, exact in every dtype
        made = made / windows.cover().to(made).unsqueeze(-1)
    return made if mode == "mean" else _Union.apply(made, or_grad == "ste")


class _Union(torch.autograd.Function):
    """1 where the mean over the covering windows is above 0."""

    @staticmethod
    def forward(ctx, mean, straight):
        fired = mean > 0
        ctx.straight = straight
        if not straight:
            ctx.save_for_backward(fired)
        return fired.to(mean.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.straight:
            return g, None
        (fired,) = ctx.saved_tensors
        return g.masked_fill(fired, 0), None
