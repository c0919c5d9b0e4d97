"""Who applies the parts of a unit: the parts themselves, or a rule of training that gets their gradients its own way.

Within `applied_by(rule)` the units hand each synapse, norm, neuron and dropout to the rule, which returns the same
values. It holds for one forward; nothing is stored in modules.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError

if TYPE_CHECKING:
    from spikefit.layers.norm import BatchNorm
    from spikefit.layers.packed import PackedSpikes, Spikes
    from spikefit.layers.unit import SpikingUnit
    from spikefit.layers.weight import Weight
    from spikefit.neurons import SpikingNeuron


class Traced(NamedTuple):
    """What the gradients of norm(W * i) read in a lean unit, in the place of this step's values, for one step.

        z = W * i + bias      dW = sum g a^T,     dbias = c sum g,     g = dL/dz
        x = first n + second  dfirst = sum h p,   dsecond = c sum h,   h = dL/dx

    Attributes:
        a: trace of the input i, [1, B, C, ...]; None for c i, where the input is the same at every step.
        c: trace of 1.
        follow: called once in forward with n, [1, B, C_out, ...]; returns p, its trace. None for no trace of the norm.
    """

    a: Tensor | None
    c: float | Tensor
    follow: Callable[[Tensor], Tensor] | None = None


class Tracer(Protocol):
    """What a rule with traces does for a unit that runs lean; everything else the unit does by itself."""

    def trace(self, unit: "SpikingUnit", x: "Spikes") -> Traced | None:
        """The traces of a unit that reads `x`, [1, B, C, ...]; None where the rule has none."""

    def start(self, neuron: "SpikingNeuron", v_0: Tensor | None) -> Tensor | None:
        """`v_0` itself, with the gradient that earlier steps give to what the neuron learns."""

    def fired(self, neuron: "SpikingNeuron", spikes: "PackedSpikes", v_0: Tensor | None, v_T: Tensor) -> None:
        """Take note of what the neuron did: its spikes before the pool, and its membrane before and after."""


class Applier(Protocol):
    """What a rule does in the place of the parts; values are theirs, bit for bit, gradients are the rule's."""

    def weigh(self, synapse: "Weight", x: Tensor, chunk: int | None) -> Tensor:
        """z = W * x of `apply_weight`, [T, B, C, ...] -> [T, B, C_out, ...]."""

    def normalise(self, norm: "BatchNorm", z: Tensor, repeats: int) -> Tensor:
        """x = norm(z) of `BatchNorm.forward`."""

    def fire(self, neuron: "SpikingNeuron", current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        """(spikes, last membrane) of the neuron of a unit."""

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        """`x` with elements dropped with probability `p`, in training."""

    def check_lean(self, unit: nn.Module) -> Tracer | None:
        """Raise StrategyError unless a unit may run lean, past all of the above; who traces it then, or None."""


_applier: contextvars.ContextVar[Applier | None] = contextvars.ContextVar("spikefit_applier", default=None)
# The same for torch.compile, which cannot read context variables but traces again when a global has changed.
_applied_when_traced = 0


@contextlib.contextmanager
def applied_by(applier: Applier) -> Iterator[None]:
    """Within the block the parts of units are applied by `applier`."""
    global _applied_when_traced
    token = _applier.set(applier)
    _applied_when_traced += 1
    try:
        yield
    finally:
        _applied_when_traced -= 1
        _applier.reset(token)


def applier_now() -> Applier | None:
    """Who applies the parts now; None for the parts themselves.

    Raises:
        StrategyError: in a compiled function that a rule runs.
    """
    if not torch.compiler.is_compiling():
        return _applier.get()
    if _applied_when_traced:
        raise StrategyError(
            "rules: expected a model that runs step by step in Python, got one inside torch.compile, which cannot hand "
            "its synapses to a rule; give the rule the model itself."
        )
    return None
