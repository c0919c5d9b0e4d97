"""Layers: the unit (weight -> norm -> neuron -> pool) and what it is made of."""

from spikefit.layers.attention import SpikingAttention
from spikefit.layers.block import ResidualBlock
from spikefit.layers.chain import Chain
from spikefit.layers.norm import NORMS, BatchNorm, OnlineRenorm, StepBatchNorm, create_norm, frozen_statistics
from spikefit.layers.shape import (
    AveragePoolTime,
    Dropout,
    Flatten,
    FlattenTime,
    GlobalAveragePool,
    Pool2d,
    Readout,
    Twice,
)
from spikefit.layers.two_streams import TwoStreams
from spikefit.layers.unit import KEEPS, SpikingConv1d, SpikingConv2d, SpikingLinear, SpikingUnit
from spikefit.layers.weight import StandardizedConv1d, StandardizedConv2d, StandardizedLinear, apply_weight

__all__ = [
    "KEEPS",
    "NORMS",
    "AveragePoolTime",
    "BatchNorm",
    "Chain",
    "Dropout",
    "Flatten",
    "FlattenTime",
    "GlobalAveragePool",
    "OnlineRenorm",
    "Pool2d",
    "Readout",
    "ResidualBlock",
    "SpikingAttention",
    "SpikingConv1d",
    "SpikingConv2d",
    "SpikingLinear",
    "SpikingUnit",
    "StandardizedConv1d",
    "StandardizedConv2d",
    "StandardizedLinear",
    "StepBatchNorm",
    "Twice",
    "TwoStreams",
    "apply_weight",
    "create_norm",
    "frozen_statistics",
]
