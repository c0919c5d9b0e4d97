"""Which steps of a sequence call backward."""

from dataclasses import dataclass
from typing import Protocol

import torch

from spikefit.errors import OptionError, StrategyError


class Sampler(Protocol):
    """Chooses steps, anew for every batch."""

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """Numbers of the chosen steps among 0 .. T - 1, in order; at least one.

        Args:
            timesteps: T.
            generator: source of random numbers, on the CPU; None takes torch's global one.
        """


@dataclass(frozen=True)
class AllSteps:
    """Every step."""

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
class TopActivity:
    """The share `p` of the steps with the most spikes; for strategies that see a whole sequence before backward.

    Args:
        p: share of the steps, 0 < p <= 1.

    Raises:
        OptionError: p out of range.
        StrategyError: in `draw`: a rule that frees each step before the next cannot know which will be active.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise OptionError(f"TopActivity: p must lie in (0, 1], got {self.p!r}.")

    def draw(self, timesteps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        raise StrategyError(
            "TopActivity: it ranks the steps of a whole sequence by activity, and a rule that frees each step before "
            "the next runs cannot know them in advance; use RandomK or EveryK."
        )


def check_whole(who: str, name: str, value: object) -> None:
    """Raise OptionError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{who}: {name} must be a whole number of at least 1, got {value!r}.")
