"""Chains that are run backwards: blocks of two streams in depth, coupled steps in time.

Memory does not grow with the number of blocks, or of steps.
"""

from typing import Any

from torch import Tensor

from spikefit.engines import time
from spikefit.engines.depth import names_of
from spikefit.errors import StrategyError, named
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.reversible_function import check_grid, run_reversible
from spikefit.layers.two_streams import TwoStreams

# Whether a checksum of every block's streams is kept and compared in backward.
CHECKS = ("check", "off")


def run_reversed(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Run the chain; blocks of two streams keep their last streams, coupled steps some states, the rest is as usual."""
    if time.has_coupled(chain):
        return time.run_reversed_in_time(chain, x, state, option)
    after: list[Any] = []
    for block, before, name in zip(chain, state, names_of(chain), strict=True):
        if isinstance(block, TwoStreams):
            with named(name):
                x, s = run_reversible(block, x, before, check=option != "off")
        else:
            x, (s,) = run_blocks([block], x, (before,), [name])
        after.append(s)
    return x, tuple(after)


def check_option(option: str | None) -> None:
    """Raise StrategyError unless the option of `reversible` is known."""
    if option is None or option in CHECKS:
        return
    try:
        time.read_keep("reversible", option)
    except StrategyError:
        raise StrategyError(
            "strategy reversible: for blocks of two streams the option says whether backward compares checksums of the "
            f"streams, one of {', '.join(CHECKS)} (default: check); for steps coupled in time it is anchor_every (a "
            "number or none), which the accepted error and raise or repair may follow, as in "
            f"reversible:4,0.001,repair; got {option!r}."
        ) from None


def accepted_error(option: str | None) -> float:
    """The error of a state up to which steps coupled in time run backwards."""
    return 0.0 if option in CHECKS else time.read_keep("reversible", option).tolerance


def check_chain(chain: list[Any], option: str | None) -> None:
    """Raise StrategyError unless the chain has something to run backwards, and the option is for it."""
    streams = any(isinstance(block, TwoStreams) for block in chain)
    if time.has_coupled(chain):
        if option in CHECKS:
            raise StrategyError(
                f"strategy reversible: {option!r} is an option for blocks of two streams, and this network is "
                "reversible in time, where marks of spikes are always compared; give anchor_every, as in "
                "reversible:4, or nothing."
            )
        time.check_coupled(chain, time.read_keep("reversible", option))
    if streams or not time.has_coupled(chain):
        check_streams(chain)
    if streams and option is not None and option not in CHECKS:
        raise StrategyError(
            f"strategy reversible: {option!r} is an option for steps coupled in time, and this network has blocks of "
            f"two streams, which take {' or '.join(CHECKS)}."
        )


def check_streams(chain: list[Any]) -> None:
    """Raise StrategyError unless there are blocks of two streams, all on a grid."""
    found = [(i, block) for i, block in enumerate(chain) if isinstance(block, TwoStreams)]
    if not found:
        raise StrategyError(
            "strategy reversible: the network has neither blocks of two streams (TwoStreams) nor steps coupled in time "
            "(CoupledSteps) to run backwards; use a model such as revsresnet21, revsformer_2_384 or trevsnn_mini, or "
            "strategy='checkpoint', which runs any network, or 'lean' for units."
        )
    for i, block in found:
        check_grid(f"blocks.{i}", block)
