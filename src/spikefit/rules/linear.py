"""Whether a network is linear in the firing rates of its neurons, so that a mean over time can be taken inside it."""

from collections.abc import Iterable

from torch import nn

from spikefit.errors import StrategyError
from spikefit.layers import BatchNorm, Chain, Readout, ResidualBlock, SpikingUnit
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron
from spikefit.rules.wiring import is_linear


def check_linear(who: str, model: nn.Module) -> None:
    """Raise StrategyError unless `model` consists of neurons with one fixed leak and of linear maps between them.

    Args:
        who: the rule, for messages.
        model: what is trained.
    """
    if not isinstance(model, SpikingNetwork) or type(model).run is not SpikingNetwork.run:
        raise StrategyError(
            f"{who}: expected a SpikingNetwork, whose blocks are known, got {type(model).__name__}, in which no one "
            "can tell what is linear in rates; build it as spikefit.SpikingNetwork([...]), or use sltt."
        )
    if model.share != "none":
        raise StrategyError(
            f"{who}: expected a membrane of its own for every layer, got share={model.share!r}; use share='none', or "
            "sltt."
        )
    if not model.strategy.by_unit:
        raise StrategyError(
            f"{who}: expected strategy='bptt', got {str(model.strategy)!r}, whose backward runs units again, on rates "
            "as if they were spikes; call use_strategy(model, 'bptt'). The memory of the rule does not grow with T."
        )
    _check_blocks(who, "blocks", model.blocks)


def _check_blocks(who: str, path: str, blocks: Iterable[nn.Module]) -> None:
    for i, block in enumerate(blocks):
        name = f"{path}.{i}"
        if getattr(block, "consumes_time", False):
            raise StrategyError(
                f"{who}: {name} ({type(block).__name__}) needs all time steps at once, and a rate has none; use an "
                "exact strategy such as checkpoint or lean."
            )
        if isinstance(block, Chain):
            _check_blocks(who, f"{name}.blocks", block.blocks)
        elif isinstance(block, ResidualBlock):
            for part, unit in (("first", block.first), ("second", block.second), ("short", block.short)):
                if unit is not None:
                    _check_unit(who, f"{name}.{part}", unit)
        elif isinstance(block, SpikingUnit):
            _check_unit(who, name, block)
        elif isinstance(block, Readout):
            _check_readout(who, name, block)
        elif not is_linear(block):
            raise StrategyError(
                f"{who}: {name} ({_describe(block)}) is not known to be linear in rates; use units, residual blocks "
                "and average pools in its place, or another rule, such as sltt."
            )


def _check_unit(who: str, name: str, unit: SpikingUnit) -> None:
    if unit.pool not in (None, "avg"):
        raise StrategyError(f"{who}: the {unit.pool} pool of {name} is not linear in rates; use pool='avg', or sltt.")
    if unit.norm is not None and not isinstance(unit.norm, BatchNorm):
        raise StrategyError(
            f"{who}: expected {name}.norm to be a BatchNorm or StepBatchNorm, whose statistics are known, got "
            f"{type(unit.norm).__name__}; use norm='step_bn', 'ws' or 'none', or sltt."
        )
    if unit.norm is not None and unit.norm.training and unit.norm.time_scope == "sequence":
        raise StrategyError(
            f"{who}: {name}.norm normalises over the whole sequence, and the rule frees each step before the next; use "
            "norm='step_bn', 'ws' or 'none', or model.eval() for running statistics."
        )
    if unit.neuron is None:
        return
    if unit.keep != "all":
        raise StrategyError(
            f"{who}: {name} runs lean, and its backward would rebuild membranes of spikes, not of rates; call "
            "use_strategy(model, 'bptt'). The memory of the rule does not grow with T."
        )
    _check_neuron(f"{who}: {name}.neuron", unit.neuron)


def _check_neuron(who: str, neuron: SpikingNeuron) -> None:
    kind = type(neuron).__name__
    if type(neuron).forward is not SpikingNeuron.forward or neuron.groups > 1:
        what = f"groups={neuron.groups}" if neuron.groups > 1 else "a forward of its own"
        raise StrategyError(
            f"{who}: expected a neuron whose membrane keeps one leak per step, got {kind} with {what}; use sltt, or "
            "another neuron."
        )
    if neuron.frac_bits is not None:
        raise StrategyError(
            f"{who}: expected a membrane without a grid, got frac_bits={neuron.frac_bits}, where rounding hides how "
            "rates depend on the input; leave out frac_bits, or use sltt."
        )
    if any(p.requires_grad for p in neuron.parameters()):
        raise StrategyError(
            f"{who}: expected a fixed leak, got {kind}, which learns it, and rates carry no gradient to it; use LIF, "
            "freeze the neuron with requires_grad_(False), or use ottt."
        )


def _check_readout(who: str, name: str, readout: Readout) -> None:
    if readout.membrane is not None:
        raise StrategyError(
            f"{who}: expected a read-out without a membrane, got {name} with tau={readout.membrane.tau:g}, which "
            "weighs steps differently; use head_tau=None (Readout(..., tau=None)), or sltt."
        )


def _describe(block: nn.Module) -> str:
    """What a block is, with what is inside a pool."""
    pool = getattr(block, "pool", None)
    return f"{type(block).__name__} of {type(pool).__name__}" if isinstance(pool, nn.Module) else type(block).__name__
