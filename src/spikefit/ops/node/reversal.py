"""How backward gets the states of a two-group node back, as a value, and the context that sets it."""

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from spikefit.errors import StrategyError
from spikefit.ops.node.equation import SAFE_GROWTH, TwoGroups, reverse_growth, reverse_multiplier, safe_steps

ReversalName = Literal["streamlined", "generic"]
REVERSALS: tuple[str, ...] = get_args(ReversalName)
# Steps between two kept states where nothing is said.
DEFAULT_ANCHOR_EVERY = 4


@dataclass(frozen=True)
class Reversal:
    """Run the steps of a node backwards instead of keeping what autograd needs.

    Attributes:
        name: "streamlined" (inverse and gradient in one pass) or "generic" (inverse, forward again, gradient).
        anchor_every: K, keep the state after every K-th step; None for the last state alone; "auto" for 4, or fewer
            where fewer are safe.

    Raises:
        StrategyError: an unknown name, or an anchor below 1.
    """

    name: ReversalName = "streamlined"
    anchor_every: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.name not in REVERSALS:
            raise StrategyError(f"reversing: expected one of {', '.join(REVERSALS)}, got {self.name!r}.")
        every = self.anchor_every
        counts = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if not (every is None or every == "auto" or counts):
            raise StrategyError(
                f"reversing: anchor_every is the distance of kept states in steps, a whole number of at least 1, None "
                f"for none, or 'auto', got {every!r}."
            )

    def distance(self, node: TwoGroups, timesteps: int, dtype: torch.dtype) -> int:
        """Steps between two kept states, counted from the first step; `timesteps` keeps the last state alone.

        Raises:
            StrategyError: no anchors, and rounding would grow too far; or not even one step can be undone.
        """
        longest = safe_steps(node, dtype)
        rho = reverse_multiplier(node.alpha, node.kappa)
        if self.anchor_every is None and timesteps > longest:
            raise StrategyError(
                f"two_group: without anchors {timesteps} steps would be undone, where rounding grows by rho={rho:.3g} "
                f"a step to {reverse_growth(timesteps, node, dtype):.2g}, above {SAFE_GROWTH:g} ({node.who}, {dtype}). "
                f"{_way_out(longest)}"
            )
        if self.anchor_every == "auto" and longest == 0:
            raise StrategyError(
                f"two_group: one step undone already multiplies rounding by rho={rho:.3g}, above {SAFE_GROWTH:g} "
                f"({node.who}, {dtype}). {_way_out(longest)}"
            )
        if self.anchor_every is None:
            return timesteps
        if self.anchor_every == "auto":
            return min(DEFAULT_ANCHOR_EVERY, longest, timesteps)
        every = min(self.anchor_every, timesteps)
        if every > longest:
            # its text holds the numbers, so Python shows it once for each of them
            warnings.warn(
                f"two_group: anchor_every={self.anchor_every} undoes up to {every} steps, where rounding grows by "
                f"rho={rho:.3g} a step to {reverse_growth(every, node, dtype):.2g} ({node.who}, {dtype}): gradients "
                f"will be off. {_way_out(longest)}",
                stacklevel=_level_outside(),
            )
        return every


def _level_outside() -> int:
    """The stacklevel at which a warning of the caller points at the first line outside spikefit and torch."""
    if torch.compiler.is_compiling():
        return 2
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("spikefit", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _way_out(longest: int) -> str:
    if longest == 0:
        return "Raise alpha, use float64, or strategy='bptt'."
    return f"The largest safe anchor_every is {longest}; or raise alpha or kappa, or use float64 or strategy='bptt'."


_active: contextvars.ContextVar[Reversal | None] = contextvars.ContextVar("spikefit_reversal", default=None)
# The same for torch.compile, which cannot read context variables but traces again when a global has changed.
_active_when_traced: Reversal | None = None


@contextlib.contextmanager
def reversing(
    name: ReversalName = "streamlined", *, anchor_every: int | Literal["auto"] | None = "auto"
) -> Iterator[None]:
    """Within the block, two-group nodes keep states alone and run their steps backwards for the gradient.

    Only the forward needs to be inside: backward does what its forward was set up for. Networks have the strategies
    `streamlined` and `generic` for it.

    Args:
        name: "streamlined" or "generic", see `Reversal`.
        anchor_every: distance of kept states in steps, None for the last state alone, "auto" for 4 or as many as are
            safe.

    Raises:
        StrategyError: unknown name, or an anchor below 1.

    Example:
        with spikefit.neurons.reversing("streamlined", anchor_every=4):
            y, v = node(x)
        y.sum().backward()
    """
    global _active_when_traced
    reversal = Reversal(name, anchor_every)
    before, _active_when_traced = _active_when_traced, reversal
    token = None if torch.compiler.is_compiling() else _active.set(reversal)
    try:
        yield
    finally:
        if token is not None:
            _active.reset(token)
        _active_when_traced = before


def active_reversal() -> Reversal | None:
    """What `reversing` set, or None for plain autograd."""
    return _active_when_traced if torch.compiler.is_compiling() else _active.get()
