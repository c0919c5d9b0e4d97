"""Chains whose two-group nodes run their steps backwards; everything else in them is under plain autograd."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spikefit.engines import depth
from spikefit.errors import StrategyError
from spikefit.layers.chain import State
from spikefit.neurons.two_group import TwoGroupNode
from spikefit.ops.node.reversal import Reversal, ReversalName, reversing


def run_reversing(name: ReversalName) -> Callable[[list[Any], Tensor, State, str | None], tuple[Tensor, State]]:
    """A runner: `depth.run_plain` with all two-group nodes under reversal `name`."""

    def run(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
        reversal = read_reversal(name, option)
        with reversing(reversal.name, anchor_every=reversal.anchor_every):
            return depth.run_plain(chain, x, state)

    return run


def read_reversal(name: ReversalName, option: str | None) -> Reversal:
    """ "8" (steps between two kept states) or "none"; None for the default.

    Raises:
        StrategyError: anything else.
    """
    if option is None:
        return Reversal(name)
    if option == "none":
        return Reversal(name, None)
    if option.isdecimal() and int(option) >= 1:
        return Reversal(name, int(option))
    raise StrategyError(
        f"strategy {name}: the option is the distance of kept states in steps, 1 or more, or 'none' for the last state "
        f"alone, as in {name}:4, got {option!r}."
    )


def check_reversal(name: ReversalName) -> Callable[[str | None], None]:
    """A check of the option of strategy `name`."""

    def check(option: str | None) -> None:
        read_reversal(name, option)

    return check


def check_two_group(name: ReversalName) -> Callable[[list[Any], str | None], None]:
    """A check that a chain has a two-group node."""

    def check(chain: list[Any], option: str | None) -> None:
        # a stage of blocks that share membranes cannot hold one
        modules = [m for block in chain if isinstance(block, nn.Module) for m in block.modules()]
        if not any(isinstance(m, TwoGroupNode) for m in modules):
            raise StrategyError(
                f"strategy {name}: the network has no two-group node, whose steps alone it can run backwards; create "
                "it with neuron='two_group', or use strategy='lean', or 'inverse' for a soft reset."
            )

    return check
