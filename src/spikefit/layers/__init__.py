"""Layers: the unit (weight -> norm -> neuron -> pool) and what it is made of."""

from spikefit.layers.block import ResidualBlock
from spikefit.layers.norm import NORMS, BatchNorm, StepBatchNorm, create_norm, frozen_statistics
from spikefit.layers.shape import AveragePoolTime, Dropout, Flatten, FlattenTime, GlobalAveragePool, Readout
from spikefit.layers.unit import KEEPS, SpikingConv1d, SpikingConv2d, SpikingLinear, SpikingUnit
from spikefit.layers.weight import StandardizedConv1d, StandardizedConv2d, StandardizedLinear, apply_weight

__all__ = [
    "KEEPS",
    "NORMS",
    "AveragePoolTime",
    "BatchNorm",
    "Dropout",
    "Flatten",
    "FlattenTime",
    "GlobalAveragePool",
    "Readout",
    "ResidualBlock",
    "SpikingConv1d",
    "SpikingConv2d",
    "SpikingLinear",
    "SpikingUnit",
    "StandardizedConv1d",
    "StandardizedConv2d",
    "StandardizedLinear",
    "StepBatchNorm",
    "apply_weight",
    "create_norm",
    "frozen_statistics",
]
