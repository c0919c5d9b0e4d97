"""Neurons by name, as recipes write them."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from spikefit.errors import OptionError
from spikefit.neurons.lif import IF, LIF, ParametricLIF, SpikingNeuron
from spikefit.neurons.two_group import TwoGroupNode

NEURONS: dict[str, Callable[..., SpikingNeuron]] = {
    "lif": LIF,
    "if": IF,
    "plif": ParametricLIF,
    "two_group": TwoGroupNode,
}


def create_neuron(name: str = "lif", **options: Any) -> SpikingNeuron:
    """Make a neuron: `create_neuron("lif", tau=2.0, v_reset=None)`.

    Args:
        name: "lif", "if", "plif" or "two_group".
        **options: those of `LIF`, `IF`, `ParametricLIF` or `TwoGroupNode`; `v_reset="soft"` means None, as
            TOML cannot write it.

    Raises:
        OptionError: unknown name or option; near names are listed.
    """
    if name not in NEURONS:
        near = difflib.get_close_matches(name, NEURONS, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"neuron: expected one of {', '.join(NEURONS)}, got {name!r}.{hint}")
    cls = NEURONS[name]
    if options.get("v_reset") == "soft":
        options = {**options, "v_reset": None}
    known = neuron_options(cls)
    unknown = sorted(set(options) - known)
    if unknown:
        raise OptionError(f"neuron {name}: unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    return cls(**options)


def as_neuron(neuron: SpikingNeuron | str | dict[str, Any]) -> SpikingNeuron:
    """The neuron that users write as a module, a name, or {"name": ..., option: ...}."""
    if isinstance(neuron, SpikingNeuron):
        return neuron
    return create_neuron(neuron) if isinstance(neuron, str) else create_neuron(**neuron)


def neuron_options(cls: Callable[..., nn.Module]) -> set[str]:
    """The names of all keyword options of a neuron class, with those it hands on to its base."""
    parameters = list(inspect.signature(cls).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters += inspect.signature(SpikingNeuron).parameters.values()
    # groups are a matter of the network that shares membranes
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"groups"}
