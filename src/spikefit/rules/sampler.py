"""Which steps of a sequence call backward."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spikefit.errors import OptionError, StrategyError


class Sampler(Protocol):
    """Chooses steps, anew for every batch.

    Attributes:
        least: steps of the shortest sequence that it can choose from.
    """

    @property
    def least(self) -> int: ...

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """Numbers of the chosen steps among 0 .. T - 1, in order; at least one.

        Args:
            timesteps: T.
            generator: source of random numbers, on the CPU; None takes torch's global one.
        """


@dataclass(frozen=True)
class AllSteps:
    """Every step."""

    @property
    def least(self) -> int:
        return 1

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        return tuple(range(timesteps))


@dataclass(frozen=True)
class RandomK:
    """K different steps, every set of K equally likely (SLTT-K).

    Args:
        k: K, at least 1; a sequence must have as many steps.

    Raises:
        OptionError: k below 1; in `draw`, above T.

    Source: Meng et al. 2023, arXiv:2302.14311.
    """

    k: int

    def __post_init__(self) -> None:
        check_whole("RandomK", "k", self.k)

    @property
    def least(self) -> int:
        return self.k

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        if self.k > timesteps:
            raise OptionError(
                f"RandomK: expected k of at most T = {timesteps}, the steps of the sequence, got {self.k}; take a "
                "smaller k, or AllSteps()."
            )
        return tuple(sorted(torch.randperm(timesteps, generator=generator)[: self.k].tolist()))


@dataclass(frozen=True)
class EveryK:
    """Every k-th step: offset, offset + k, offset + 2k, ...

    Args:
        k: distance of chosen steps, at least 1.
        offset: first chosen step, 0 <= offset < k; "random" draws it for every batch.

    Raises:
        OptionError: k or offset out of range; in `draw`, an offset behind the last step.
    """

    k: int
    offset: int | str = "random"

    def __post_init__(self) -> None:
        check_whole("EveryK", "k", self.k)
        known = isinstance(self.offset, int) and not isinstance(self.offset, bool) and 0 <= self.offset < self.k
        if self.offset != "random" and not known:
            raise OptionError(
                f"EveryK: offset must be 'random' or a whole number of at least 0 and below k={self.k}, got "
                f"{self.offset!r}."
            )

    @property
    def least(self) -> int:
        return self.offset + 1 if isinstance(self.offset, int) else 1

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        if isinstance(self.offset, int):
            first = self.offset
        else:
            first = int(torch.randint(min(self.k, timesteps), (), generator=generator))
        if first >= timesteps:
            raise OptionError(
                f"EveryK: expected an offset below T = {timesteps}, the steps of the sequence, got {first}; take a "
                "smaller one, or 'random'."
            )
        return tuple(range(first, timesteps, self.k))


@dataclass(frozen=True)
class GivenSteps:
    """The steps given, in every batch.

    Args:
        steps: numbers of steps from 0, each once and in order; at least one.

    Raises:
        OptionError: other steps; in `draw`, a step behind the last one.
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in self.steps)
        if not self.steps or not whole or list(self.steps) != sorted(set(self.steps)):
            raise OptionError(
                f"GivenSteps: expected numbers of steps from 0, each once and in order, got {self.steps!r}."
            )

    @property
    def least(self) -> int:
        return self.steps[-1] + 1

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        if self.steps[-1] >= timesteps:
            raise OptionError(
                f"GivenSteps: expected steps below T = {timesteps}, the steps of the sequence, got {self.steps[-1]}."
            )
        return tuple(self.steps)


@dataclass(frozen=True)
class TopActivity:
    """The share `p` of the steps with the most spikes.

    A rule that frees each step before the next runs cannot know which will be active; with `look_ahead` the sequence
    runs once more in front of it, without a graph, which costs a second forward and no memory.

    Args:
        p: share of the steps, 0 < p <= 1; ceil(p T) steps are taken, of equal ones the earlier.
        look_ahead: count the spikes in a pass of its own.

    Raises:
        OptionError: p or look_ahead out of range.
        StrategyError: in `draw`, which sees no spikes.

    Source: skipping of steps by activity: Singh et al. 2022 (Skipper), doi:10.1109/MICRO56248.2022.00047.
    """

    p: float
    look_ahead: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not 0 < self.p <= 1:
            raise OptionError(f"TopActivity: p must lie in (0, 1], got {self.p!r}.")
        if not isinstance(self.look_ahead, bool):
            raise OptionError(f"TopActivity: look_ahead must be True or False, got {self.look_ahead!r}.")

    @property
    def least(self) -> int:
        return 1

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        raise StrategyError(
            "TopActivity: it ranks the steps of a whole sequence by activity, and a rule that frees each step before "
            "the next runs cannot know them in advance; use look_ahead=True, or RandomK or EveryK."
        )

    def most_active(self, activity: Tensor) -> tuple[int, ...]:
        """Numbers of the chosen steps, in order, of the spikes of every step, [T]."""
        count = math.ceil(self.p * len(activity))
        return tuple(sorted(activity.argsort(descending=True, stable=True)[:count].tolist()))


def check_whole(who: str, name: str, value: object) -> None:
    """Raise OptionError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{who}: {name} must be a whole number of at least 1, got {value!r}.")
