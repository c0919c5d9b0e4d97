"""How backward gets membranes back from spikes: the choice, the error it makes, and what it refuses."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from spikefit.errors import StrategyError
from spikefit.layers.norm import needs_whole_calls
from spikefit.layers.unit import Layer
from spikefit.neurons import SpikingNeuron
from spikefit.ops.lif.equation import grid_leak
from spikefit.ops.packbits.op import BITS

# How backward gets a membrane back from the spikes.
REBUILDS: tuple[str, ...] = ("replay", "inverse", "integer")
# Largest |u| that is assumed before one is seen; a number as it is, like the tolerance, whatever the threshold.
ASSUMED_RANGE = 8.0
# Calls beyond which anchors are as good as none.
FARTHEST = 1 << 20
# Largest error of a rebuilt u that the inverse accepts, if nothing else is said.
TOLERANCE = 1e-3


class Rebuild(NamedTuple):
    """How backward gets the membrane of every call back.

    Attributes:
        name: one of `REBUILDS`.
        anchor_every: for "inverse", keep the membrane of every so many calls, counted from the last; None for as many
            as are safe at |u| <= 8.
        tolerance: for "inverse", the largest error of u that is accepted.
    """

    name: str = "replay"
    anchor_every: int | None = None
    tolerance: float = TOLERANCE

    def distance(self, leak: float, dtype: torch.dtype) -> int:
        """The distance of anchors in calls, for membranes of `dtype`."""
        if self.anchor_every is not None:
            return self.anchor_every
        return safe_anchor_every(leak, ASSUMED_RANGE, dtype, self.tolerance)


def inverse_error(undone: int, leak: float, largest: float, dtype: torch.dtype) -> float:
    """Bound on the error of u after `undone` calls run backwards.

        E(j) = eps R (leak^-j - 1) / (1 - leak),   eps R j at leak = 1

    Args:
        undone: j, calls undone since the last membrane that was kept.
        leak: share of the membrane kept per call, > 0.
        largest: R, the largest |u|.
        dtype: of the membrane; eps = 2^-24 for float32, 2^-53 for float64.
    """
    eps = torch.finfo(dtype).eps / 2
    if leak == 1:
        return eps * largest * undone
    return eps * largest * math.expm1(-undone * math.log(leak)) / (1 - leak)


def safe_anchor_every(leak: float, largest: float, dtype: torch.dtype, tolerance: float = TOLERANCE) -> int:
    """The largest distance of anchors at which the bound of the inverse stays below `tolerance`; at least 1."""
    if not 0 < leak <= 1 or not 0 < largest < math.inf:
        return 1
    # E(j) = tolerance, solved for j
    calls = tolerance / (torch.finfo(dtype).eps / 2 * largest)
    undone = calls if leak == 1 else math.log1p(calls * (1 - leak)) / -math.log(leak)
    return 1 + int(min(undone, FARTHEST))


def neuron_of(layer: Layer) -> SpikingNeuron:
    """The neuron of a layer, which has one by construction."""
    return cast(SpikingNeuron, layer.unit.neuron)


def digits_of(neuron: SpikingNeuron) -> int:
    """Bits in which what a call loses is packed, for a neuron on a grid; 0 if a byte is too small."""
    form = grid_leak(float(neuron.coefficients()[0]))
    return next((bits for bits in BITS if form is not None and bits >= form.digits), 0)


def check_rebuild(who: str, layer: Layer, rebuild: Rebuild, *, any_grid: bool = False) -> None:
    """Raise StrategyError unless backward can rebuild the membrane of `layer`, which messages call `who`.

    With `any_grid`, "integer" takes a grid for granted where the neuron has none.
    """
    neuron, name = neuron_of(layer), rebuild.name
    if type(neuron).forward is not SpikingNeuron.forward:
        raise StrategyError(
            f"{who}: {type(neuron).__name__} has a forward of its own, which {name} cannot rebuild; use "
            "strategy='bptt'."
        )
    if name == "replay":
        return
    norms = [u.norm for u in (layer.unit, layer.short) if u is not None]
    if layer.unit.consumes_time or any(map(needs_whole_calls, norms)):
        raise StrategyError(
            f"{who}: {name} runs backwards step by step, and its norm or weight needs the whole sequence; use "
            "norm='step_bn' ('ws', 'none'), or strategy='replay'."
        )
    if not neuron.reset or neuron.v_reset is not None:
        raise StrategyError(
            f"{who}: {name} undoes a soft reset, and a hard reset erases u where a neuron fired; use v_reset='soft' "
            "(None in Python), or strategy='replay'."
        )
    leak = neuron.coefficients()[0]
    if isinstance(leak, Tensor):
        raise StrategyError(
            f"{who}: {name} needs a leak that stays as it is, and this neuron learns it; use strategy='replay', or "
            "neuron 'lif'."
        )
    if name == "integer" and neuron.frac_bits is not None and digits_of(neuron) == 0:
        raise StrategyError(
            f"{who}: integer keeps the digits that a call loses in a byte at most, so leak >= 1/256, got "
            f"{float(neuron.coefficients()[0]):g}; use strategy='replay'."
        )
    if name == "integer" and neuron.frac_bits is None and not any_grid:
        raise StrategyError(
            f"{who}: integer runs whole numbers backwards, and this membrane is floating point; give the neuron a "
            "grid, frac_bits=16 (leak 1/2, 1/4, ... or 3/4, 7/8, ...), or use strategy='replay'."
        )
    if name == "inverse" and neuron.frac_bits is not None:
        raise StrategyError(
            f"{who}: inverse cannot know the digits that a membrane on a grid loses (frac_bits={neuron.frac_bits}); "
            "use strategy='integer', which keeps them."
        )
    if name == "inverse":
        dtype = layer.unit.synapse.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise StrategyError(
                f"{who}: inverse needs float32 or float64, got {dtype}; use autocast for half precision, or 'replay'."
            )
        check_bound(who, leak, rebuild, ASSUMED_RANGE, dtype)


def check_bound(who: str, leak: float, rebuild: Rebuild, largest: float, dtype: torch.dtype) -> None:
    """Raise StrategyError if membranes up to `largest` would be rebuilt with too large an error."""
    if leak <= 0:
        raise StrategyError(
            f"{who}: inverse divides by the leak, which is {leak:g}; use strategy='replay', or a tau above 1."
        )
    undone = rebuild.distance(leak, dtype) - 1
    error = math.inf if -undone * math.log(leak) > 700 else inverse_error(undone, leak, largest, dtype)
    # a NaN is no safe number either
    if not error <= rebuild.tolerance:
        raise StrategyError(
            f"{who}: inverse would undo up to {undone} calls at leak={leak:g}, where |u| up to {largest:.3g} leaves an "
            f"error of up to {error:.2g} in u, above the {rebuild.tolerance:g} accepted; the largest safe anchor_every "
            f"is {safe_anchor_every(leak, largest, dtype, rebuild.tolerance)} (strategy='inverse:N'). "
            "Or use 'replay', float64 or a larger leak."
        )
