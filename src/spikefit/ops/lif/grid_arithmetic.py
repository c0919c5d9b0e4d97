"""The leak of a membrane on a grid, and its inverse, in whole numbers that floating point holds exactly.

    leak 2^-m       w = floor(v / 2^m),       lost = v mod 2^m                  v = w 2^m + lost
    leak 1 - 2^-m   w = v - floor(v / 2^m),   lost = [v mod 2^m = 2^m - 1]      v from w = q (2^m - 1) + r, below

In the second form v = q 2^m + r becomes w = q (2^m - 1) + r, r = 0 .. 2^m - 1, so that only r = 2^m - 1 of q and r = 0
of q + 1 meet in one w: one bit tells them apart. Numbers have at most 23 digits, m < 23 in the second form, and every
step below is exact in float32: floor(w / (2^m - 1)) too, because no quotient of such numbers that is not whole lies
within half a unit in the last place of a whole one.

Source: ours; that a leak loses bits which can be kept is in MacKay et al. 2018, arXiv:1810.10999.
"""

import torch
from torch import Tensor

from spikefit.ops.lif.equation import GridLeak


def leaked(v: Tensor, form: GridLeak) -> Tensor:
    """w of whole numbers v, of the same shape and dtype."""
    q = torch.floor(v * 2.0**-form.shift)
    return v - q if form.ties else q


def lost(v: Tensor, form: GridLeak) -> Tensor:
    """What `leaked` forgets of v: the tie bit, or the last m digits, m <= 8; uint8."""
    digits = v - torch.floor(v * 2.0**-form.shift) * 2.0**form.shift
    return (digits == 2.0**form.shift - 1 if form.ties else digits).to(torch.uint8)


def unleaked(w: Tensor, lost: Tensor, form: GridLeak) -> Tensor:
    """v of w = leaked(v) and what was lost."""
    power = 2.0**form.shift
    if not form.ties:
        return w * power + lost.to(w.dtype)
    q = torch.floor(w / (power - 1))
    # without a tie v = 2^m q + r; with one r is 0, and v = 2^m (q - 1) + 2^m - 1
    return w + q - lost.to(w.dtype)
