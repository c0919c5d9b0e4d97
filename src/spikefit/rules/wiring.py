"""Which neuron each synapse of a network feeds, and which one it reads from."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.layers import BatchNorm, Chain, Dropout, Flatten, GlobalAveragePool, Pool2d, Readout, SpikingUnit, Twice
from spikefit.layers.unit import pool_spikes
from spikefit.models import SpikingNetwork
from spikefit.neurons import LeakyReadout, SpikingNeuron
from spikefit.rules.verdicts import Found

SYNAPSES = (nn.Conv1d, nn.Conv2d, nn.Linear)
# What a synapse feeds: neurons, a leaky read-out, or nothing that keeps anything.
Fed = SpikingNeuron | LeakyReadout | None


class Source(NamedTuple):
    """What a synapse reads.

    Attributes:
        neuron: whose spikes; None for data.
        maps: linear maps between the spikes and the synapse, [1, B, ...] -> [1, B, ...].
        unknown: the block behind which no neuron can be told; None if it can.
    """

    neuron: SpikingNeuron | None = None
    maps: tuple[Callable[[Tensor], Tensor], ...] = ()
    unknown: nn.Module | None = None

    def through(self, map_: Callable[[Tensor], Tensor]) -> "Source":
        """The same behind a further map."""
        return self._replace(maps=(*self.maps, map_))


class Wiring:
    """Names, neurons and sources of the parts of a model.

    Args:
        model: made of units, read-outs and layers without parameters.

    Attributes:
        names: path of every module.
        fed: by synapse, and by norm, what it feeds.
        sources: by synapse, what it reads; those outside a chain of known blocks are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: path for path, module in model.named_modules()}
        self.fed: dict[nn.Module, Fed] = {}
        self.sources: dict[nn.Module, Source] = {}
        for module in model.modules():
            if isinstance(module, SpikingUnit) and module.neuron is not None:
                self._feed(module, module.neuron)
            elif isinstance(module, Readout):
                self.fed[module.linear] = module.membrane
            # only blocks know what a shortcut leads to
            for layer in getattr(module, "spiking_layers", list)():
                if layer.short is not None:
                    self._feed(layer.short, layer.unit.neuron)
        if isinstance(model, SpikingNetwork):
            self._follow(model.blocks, Source())

    def _feed(self, unit: SpikingUnit, fed: Fed) -> None:
        self.fed[unit.synapse] = fed
        if unit.norm is not None:
            self.fed[unit.norm] = fed

    def _follow(self, blocks: Iterable[nn.Module], source: Source) -> Source:
        """Note what the synapses of `blocks` read; returns what their last output is."""
        for block in blocks:
            layers = cast(Any, block).spiking_layers() if hasattr(block, "spiking_layers") else []
            if isinstance(block, Chain):
                source = self._follow(block.blocks, source)
            elif isinstance(block, Readout):
                self.sources[block.linear] = source
                source = Source(unknown=block)
            elif layers:
                source = self._follow_layers(layers, source)
            elif is_linear(block):
                source = source.through(partial(_output, block))
            else:
                source = Source(unknown=block)
        return source

    def _follow_layers(self, layers: list[Any], source: Source) -> Source:
        values = [source]
        for layer in layers:
            self.sources[layer.unit.synapse] = values[layer.source]
            if layer.short is not None:
                self.sources[layer.short.synapse] = values[layer.shortcut]
            out = Source(layer.unit.neuron)
            if layer.unit.pool == "avg":
                out = out.through(partial(pool_spikes, pool="avg"))
            elif layer.unit.pool is not None:
                out = Source(unknown=layer.unit)
            values.append(out)
        return values[-1]

    def leak(self, part: nn.Module) -> float | Tensor:
        """The leak of what a synapse or norm feeds, which keeps something."""
        fed = self.fed[part]
        assert fed is not None, "a read-out without membrane keeps nothing"
        leak = fed.leak if isinstance(fed, LeakyReadout) else fed.coefficients()[0]
        return leak.detach() if isinstance(leak, Tensor) else leak

    def reads_data(self, part: nn.Module) -> bool:
        """Whether a synapse reads the input of the network, or a norm stands behind such a synapse."""
        synapse = part
        if isinstance(part, BatchNorm):
            synapse = next(m.synapse for m in self.names if isinstance(m, SpikingUnit) and m.norm is part)
        source = self.sources.get(synapse)
        return source is not None and source.neuron is None and source.unknown is None


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer without a neuron is a linear map that traces may go through as spikes do."""
    if isinstance(layer, Pool2d):
        return isinstance(layer.pool, nn.AvgPool2d)
    return isinstance(layer, Flatten | GlobalAveragePool | Dropout | Twice)


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def traced_clashes(model: nn.Module, wiring: Wiring, *, ratio: bool, skip_data: bool) -> Iterator[Found]:
    """What is trained in `model` and reached by no trace.

    Args:
        model: what is trained.
        wiring: that of the model.
        ratio: whether mu is the ratio of membranes of the neuron that a synapse reads from.
        skip_data: whether synapses that read data stay without traces.
    """
    yield from _untraced(model, wiring)
    if skip_data and not any(map(wiring.reads_data, wiring.fed)):
        yield Found("no_first_synapse", type(model).__name__)
    # of other models no source is known, which is said of the model
    if ratio and isinstance(model, SpikingNetwork):
        yield from _without_source(wiring)


def _untraced(model: nn.Module, wiring: Wiring) -> Iterator[Found]:
    """Parameters that are trained and belong to no part that can be traced."""
    parts: list[nn.Module] = [m for m in wiring.fed if isinstance(m, (BatchNorm, *SYNAPSES))]
    parts += [m.neuron for m in wiring.names if isinstance(m, SpikingUnit) and m.neuron is not None]
    known = {id(p) for part in parts for p in part.parameters()}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            yield Found("untraced", path, cause=path)


def _without_source(wiring: Wiring) -> Iterator[Found]:
    """Synapses of which no one knows whose spikes they read."""
    for synapse in wiring.fed:
        source = wiring.sources.get(synapse)
        if not isinstance(synapse, SYNAPSES) or (source is not None and source.unknown is None):
            continue
        path, behind = wiring.names[synapse], None if source is None else source.unknown
        if behind is None:
            yield Found("foreign_block", path, (("told", "a block that the rule cannot follow"),), cause=path)
        else:
            told = f"{wiring.names[behind]} ({type(behind).__name__})"
            yield Found("foreign_block", path, (("told", told),), cause=wiring.names[behind])


def sign_ratio(v: Tensor, before: Tensor, leak: float | Tensor) -> Tensor:
    """v / before in [-leak, leak]; sign(v) leak where `before` is almost 0."""
    bound = torch.as_tensor(leak, dtype=v.dtype, device=v.device)
    small = before.abs() < 1e-9
    ratio = v / torch.where(small, 1, before)
    return torch.where(small, v.sign() * bound, torch.minimum(torch.maximum(ratio, -bound), bound))
