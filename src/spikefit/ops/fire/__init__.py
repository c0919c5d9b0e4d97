"""Firing: from the inputs of a layer's current to packed spikes, and back. Dense spikes of a layer are never made."""

from spikefit.ops.fire.layout import Current, Grid
from spikefit.ops.fire.op import fire, fire_gradient, fire_sums

__all__ = ["Current", "Grid", "fire", "fire_gradient", "fire_sums"]
