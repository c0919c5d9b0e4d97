"""Chains whose blocks of two streams are run backwards in depth, so that memory does not grow with their number."""

from typing import Any

from torch import Tensor

from spikefit.engines.depth import names_of
from spikefit.errors import StrategyError, named
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.reversible_function import check_grid, run_reversible
from spikefit.layers.two_streams import TwoStreams

# Whether a checksum of every block's streams is kept and compared in backward.
CHECKS = ("check", "off")


def run_reversed(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Run the chain; runs of blocks of two streams keep their last streams, the rest is as usual."""
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
    if option is not None and option not in CHECKS:
        raise StrategyError(
            "strategy reversible: the option says whether backward compares checksums of the streams, one of "
            f"{', '.join(CHECKS)} (default: check), got {option!r}."
        )


def check_streams(chain: list[Any]) -> None:
    """Raise StrategyError unless there are blocks of two streams, all on a grid."""
    found = [(i, block) for i, block in enumerate(chain) if isinstance(block, TwoStreams)]
    if not found:
        raise StrategyError(
            "strategy reversible: the network has no blocks of two streams (TwoStreams) to run backwards; use a model "
            "such as revsresnet21 or revsformer_2_384, or strategy='lean' or 'checkpoint', which run any network."
        )
    for i, block in found:
        check_grid(f"blocks.{i}", block)
