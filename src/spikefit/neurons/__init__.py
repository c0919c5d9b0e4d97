"""Neurons: parameters and an equation; the membrane goes in and comes out."""

from spikefit.neurons.lif import IF, LIF, ParametricLIF, SpikingNeuron
from spikefit.neurons.readout import LeakyReadout
from spikefit.neurons.table import NEURONS, create_neuron
from spikefit.neurons.threshold import Threshold
from spikefit.neurons.two_group import TwoGroupNode
from spikefit.ops.node.reversal import reversing

__all__ = [
    "IF",
    "LIF",
    "NEURONS",
    "LeakyReadout",
    "ParametricLIF",
    "SpikingNeuron",
    "Threshold",
    "TwoGroupNode",
    "create_neuron",
    "reversing",
]
