"""Whether a network is linear in the firing rates of its neurons, so that a mean over time can be taken inside it."""

from collections.abc import Iterable, Iterator

from torch import nn

from spikefit.layers import BatchNorm, Chain, Readout, ResidualBlock, SpikingUnit
from spikefit.models import SpikingNetwork
from spikefit.rules.verdicts import Found
from spikefit.rules.wiring import is_linear


def linear_clashes(model: nn.Module) -> Iterator[Found]:
    """Blocks and norms of a `SpikingNetwork` that are not known to be linear in the rates of its neurons."""
    if isinstance(model, SpikingNetwork):
        yield from _in_blocks("blocks", model.blocks)


def _in_blocks(path: str, blocks: Iterable[nn.Module]) -> Iterator[Found]:
    for i, block in enumerate(blocks):
        name = f"{path}.{i}"
        if isinstance(block, Chain):
            yield from _in_blocks(f"{name}.blocks", block.blocks)
        elif isinstance(block, ResidualBlock):
            for part, unit in (("first", block.first), ("second", block.second), ("short", block.short)):
                if unit is not None:
                    yield from _in_unit(f"{name}.{part}", unit)
        elif isinstance(block, SpikingUnit):
            yield from _in_unit(name, block)
        elif not isinstance(block, Readout) and not is_linear(block):
            yield Found("foreign_block", name, (("kind", type(block).__name__),), cause=name)


def _in_unit(name: str, unit: SpikingUnit) -> Iterator[Found]:
    norm = unit.norm
    # a norm with a forward of its own may pass gradients in its own way, whatever it is derived from
    known = isinstance(norm, BatchNorm) and type(norm).normalised is BatchNorm.normalised
    if norm is not None and not known:
        yield Found("foreign_norm", f"{name}.norm", (("kind", type(norm).__name__),))
