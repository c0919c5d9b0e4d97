"""Chains whose membranes are rebuilt in backward, whether layers share them or not."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from spikefit.engines.depth import modules_of
from spikefit.errors import StrategyError
from spikefit.layers import ResidualBlock, SpikingUnit
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.rebuild import TOLERANCE, Rebuild, neuron_of
from spikefit.layers.shared import SharedStage
from spikefit.layers.window_block import WindowSpike


def stages_of(chain: list[Any]) -> list[Any]:
    """The chain with every block of neurons as a stage; blocks without any, or of your own, stay."""
    made, number = [], 0
    for block in chain:
        firing = isinstance(block, SpikingUnit | ResidualBlock) and block.spiking_layers()
        made.append(SharedStage([block], first=number, one_membrane=False) if firing else block)
        number += block.count if isinstance(block, SharedStage) else 1
    return made


def run_stages(chain: list[Any], x: Tensor, state: State, rebuild: Rebuild) -> tuple[Tensor, State]:
    """Run the chain; stages keep the bits of spikes and rebuild membranes as `rebuild` says, the rest is as usual."""
    how = {"rebuild": rebuild}
    return run_blocks(stages_of(chain), x, state, options=lambda block: how if isinstance(block, SharedStage) else {})


def run_replay(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """`run_stages` that runs the calls of a membrane forward again."""
    return run_stages(chain, x, state, Rebuild("replay"))


def run_inverse(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """`run_stages` that runs the calls of a membrane backwards, from anchors."""
    return run_stages(chain, x, state, read_inverse(option))


def run_integer(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """`run_stages` that runs the calls of a membrane backwards on a grid."""
    return run_stages(chain, x, state, Rebuild("integer"))


def read_inverse(option: str | None) -> Rebuild:
    """ "6" (distance of anchors in calls) or "6,0.01" (and the accepted error of u); None for what is safe.

    Raises:
        StrategyError: anything else.
    """
    if option is None:
        return Rebuild("inverse")
    every, comma, tolerance = option.partition(",")
    try:
        rebuild = Rebuild("inverse", int(every), float(tolerance) if comma else TOLERANCE)
        if rebuild.anchor_every is not None and rebuild.anchor_every >= 1 and 0 < rebuild.tolerance < float("inf"):
            return rebuild
    except ValueError:
        pass
    raise StrategyError(
        "strategy inverse: the option is the distance of anchors in calls, 1 or more, and may be followed by the "
        f"accepted error of u, as in inverse:6 or inverse:6,0.01, got {option!r}."
    )


def check_inverse(option: str | None) -> None:
    """Raise StrategyError unless the option of `inverse` can be read."""
    read_inverse(option)


def no_option(name: str) -> Callable[[str | None], None]:
    """A check that refuses any option of strategy `name`."""

    def check(option: str | None) -> None:
        if option is not None:
            raise StrategyError(f"strategy {name}: takes no option, got {option!r}; write strategy={name}.")

    return check


def check_rebuilt(chain: list[Any], rebuild: Rebuild) -> None:
    """Raise StrategyError unless the membranes of all stages can be rebuilt so, and there is one."""
    stages = [block for block in stages_of(chain) if isinstance(block, SharedStage)]
    if not stages:
        raise StrategyError(
            f"strategy {rebuild.name}: the network has no block of neurons that it knows; build it of units and "
            "residual blocks, or use strategy='bptt'."
        )
    for stage in stages:
        stage.check(rebuild)


def check_lean(chain: list[Any], option: str | None = None) -> None:
    """Raise StrategyError unless there is a unit to be lean, and no membrane is shared, which it cannot rebuild."""
    modules = [m for block in modules_of(chain) for m in block.modules()]
    windows = [m for m in modules if isinstance(m, WindowSpike) and m.coding != "analog"]
    if windows and option not in (None, "auto", "spikes"):
        raise StrategyError(
            f"strategy lean: blocks of windows keep bits of their spikes and the stream between them, which is "
            f"lean:spikes, and nothing else can be chosen, got option {option!r}; use lean, or checkpoint, which keeps "
            "the streams of every few blocks alone."
        )
    if not windows and not any(isinstance(m, SpikingUnit) for m in modules):
        raise StrategyError(
            "strategy lean: the network has no unit (SpikingConv2d and its like) that could keep bits of spikes, so "
            "nothing would change; use strategy='checkpoint', which runs blocks of any kind again, or "
            "'step_checkpoint', which does so piece by piece in time."
        )
    for block in stages_of(chain):
        if not isinstance(block, SharedStage):
            continue
        if block.one_membrane or any(neuron_of(layer).groups > 1 for layer in block.layers):
            raise StrategyError(
                f"strategy lean: the layers of {block.name} share a membrane, which a lean unit cannot rebuild; use "
                "strategy='replay', which keeps the bits of spikes alone as well."
            )
