"""Who applies the parts of a unit: the parts themselves, or a rule of training that gets their gradients its own way.

Within `applied_by(rule)` the units hand each synapse, norm, neuron and dropout to the rule, which returns the same
values. It holds for one forward; nothing is stored in modules.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError

if TYPE_CHECKING:
    from spikefit.layers.norm import BatchNorm
    from spikefit.layers.weight import Weight
    from spikefit.neurons import SpikingNeuron


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

    def check_lean(self, unit: nn.Module) -> None:
        """Raise StrategyError unless a unit may run lean, past all of the above."""


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
