"""Statistics of a sequence that may come in pieces: what its values are normalised by, and what its steps sum up to.

A norm whose running statistics move once per sequence has to know where one ends: with its call, or, within
`SequenceStatistics.open`, with all calls of the block.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spikefit.errors import StrategyError
from spikefit.ops.norm import Moments

if TYPE_CHECKING:
    from spikefit.layers.norm import OnlineRenorm


class Sums(NamedTuple):
    """Sums over steps, from which mean and variance of all their values follow.

        mean = origin + shifts / values,   var = squares / values - (shifts / values)^2

    Attributes:
        origin: mean of the first step, [C] float64; sums from there on do not cancel where the mean is large.
        shifts: sum of n_t (m_t - origin), n_t the values of a step.
        squares: sum of n_t (w_t + (m_t - origin)^2).
        values: how many there are behind each entry.
    """

    origin: Tensor
    shifts: Tensor
    squares: Tensor
    values: int

    @staticmethod
    def of(moments: Moments, repeats: int = 1, before: "Sums | None" = None) -> "Sums":
        """The sums of `before` and of further steps, each of which stands for `repeats` equal ones."""
        if before is None:
            origin = moments.mean[0].double()
            before = Sums(origin, torch.zeros_like(origin), torch.zeros_like(origin), 0)
        origin, shifts, squares, values = before
        number = moments.elements * repeats
        # step by step, so that a sequence in pieces has the same bits
        for mean, var in zip(moments.mean.double(), moments.var.double(), strict=True):
            shift = mean - origin
            shifts = shifts + number * shift
            squares = squares + number * (var + shift * shift)
            values += number
        return Sums(origin, shifts, squares, values)

    @property
    def mean(self) -> Tensor:
        """Of all values, [C] float64."""
        return self.origin + self.shifts / self.values

    @property
    def var(self) -> Tensor:
        """Of all values, biased, [C] float64."""
        return (self.squares / self.values - (self.shifts / self.values).square()).clamp(min=0)

    @property
    def unbiased(self) -> Tensor:
        """`var` as an estimate, as torch keeps it in running statistics."""
        return self.var * (self.values / max(self.values - 1, 1))


class Start(NamedTuple):
    """Running statistics at the start of a sequence.

    Attributes:
        mean, var: [C].
        unset: whether there are none yet, 0-d bool: then those of the sequence itself take their place. A tensor,
            because reading it would stop a GPU. None for statistics that are known to be there.
    """

    mean: Tensor
    var: Tensor
    unset: Tensor | None = None

    def settled(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """(mean, var), [C], or those of the sequence that `sums` are of."""
        if self.unset is None:
            return self.mean, self.var
        found = zip((sums.mean, sums.unbiased), (self.mean, self.var), strict=True)
        mean, var = (torch.where(self.unset, now.to(kept.dtype), kept) for now, kept in found)
        return mean, var


class SequenceStatistics:
    """What norms with running statistics hold of a sequence while it runs step by step.

    Args:
        starts: running statistics at its start; those of other norms are read where they first run.

    Attributes:
        sums: of the steps so far.
        opening: norms that take the statistics of every step, because they have no running ones yet.
    """

    def __init__(self, starts: "dict[OnlineRenorm, Start] | None" = None) -> None:
        self.starts: dict[OnlineRenorm, Start] = {} if starts is None else starts
        self.sums: dict[OnlineRenorm, Sums] = {}
        self.opening: frozenset[OnlineRenorm] = frozenset()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within the block, calls of norms are steps of this sequence."""
        global _open_when_traced
        token = _open.set(self)
        _open_when_traced += 1
        try:
            yield
        finally:
            _open_when_traced -= 1
            _open.reset(token)

    @contextlib.contextmanager
    def first_pass(self, norms: "Iterable[OnlineRenorm]") -> Iterator[None]:
        """Within the block `norms` run on the statistics of every step; their sums are the start of the sequence."""
        self.opening = frozenset(norms)
        try:
            with self.open():
                yield
        finally:
            self.opening = frozenset()
        for norm, sums in self.sums.items():
            like = norm.running_mean.dtype
            self.starts[norm] = Start(sums.mean.to(like), sums.unbiased.to(like))
        self.sums = {}

    def add(self, norm: "OnlineRenorm", moments: Moments, repeats: int) -> None:
        """Steps of `norm`."""
        self.sums[norm] = Sums.of(moments, repeats, self.sums.get(norm))

    def move(self) -> None:
        """Move the running statistics of all norms by this sequence, once."""
        for norm, sums in self.sums.items():
            norm.move(self.starts[norm], sums)
        self.sums = {}


_open: contextvars.ContextVar[SequenceStatistics | None] = contextvars.ContextVar("spikefit_statistics", default=None)
# The same for torch.compile, which cannot read context variables but traces again when a global has changed.
_open_when_traced = 0


def statistics_now() -> SequenceStatistics | None:
    """The sequence that calls of norms belong to; None where each call is one.

    Raises:
        StrategyError: in a compiled function within a sequence.
    """
    if not torch.compiler.is_compiling():
        return _open.get()
    if _open_when_traced:
        raise StrategyError(
            "OnlineRenorm: expected a model that runs step by step in Python, got one inside torch.compile, in which "
            "a norm cannot see where a sequence ends; give the rule the model itself, or use norm='step_bn'."
        )
    return None
