"""Neurons: parameters and an equation; the membrane goes in and comes out."""

from spikefit.neurons.lif import IF, LIF, ParametricLIF, SpikingNeuron
from spikefit.neurons.readout import LeakyReadout
from spikefit.neurons.table import NEURONS, create_neuron

__all__ = ["IF", "LIF", "NEURONS", "LeakyReadout", "ParametricLIF", "SpikingNeuron", "create_neuron"]
