"""What goes into firing, as values that the backends share.

Letters of shapes: T time steps, M rows (batch times pixels, channels last), C channels, P bytes of C packed spikes,
R rows of a scale (T, or one for all steps), G rows of a gradient (M without a pool, fewer behind one).
"""

from typing import NamedTuple

from torch import Tensor


class Current(NamedTuple):
    """The terms of a current, added in this order:

        x_t = sum_k (z_k,t scale_k + shift_k)  +  extra_t  +  spikes_t

    Attributes:
        zs: [T, M, C] each, or [1, M, C] where every step is the same.
        scales, shifts: [R, C] each.
        extra: [T, M, C] or [1, M, C], or None.
        spikes: [T, M, P] packed, one bit each, or None.
    """

    zs: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    extra: Tensor | None
    spikes: Tensor | None


class Grid(NamedTuple):
    """How M rows lie as images, and the pool behind the neurons.

    Attributes:
        images: batch size B; M = B height width.
        height, width: pixels; one row of pixels for one space axis, one pixel for none.
        pool: "" for none, "max" or "avg"; windows are 2x2, or 1x2 where height is 1.
    """

    images: int
    height: int
    width: int
    pool: str

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of one window of the pool; (1, 1) without a pool."""
        return (1, 1) if not self.pool else (2 if self.height > 1 else 1, 2)

    @property
    def pooled_rows(self) -> int:
        """G: rows of the gradient that comes in behind the pool."""
        p, q = self.window
        return self.images * (self.height // p) * (self.width // q)
