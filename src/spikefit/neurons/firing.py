"""What fires, and where its spikes are: for those who watch a network from outside."""

from typing import Any

from torch import Tensor

from spikefit.neurons.lif import SpikingNeuron
from spikefit.neurons.threshold import Threshold
from spikefit.neurons.window import WindowLIF

# The modules whose output is spikes.
FIRING = (SpikingNeuron, Threshold, WindowLIF)


def spikes_of(output: Any) -> Tensor:
    """The spikes in what a module that fires returned: a neuron returns its membrane beside them, a threshold none."""
    return output if isinstance(output, Tensor) else output[0]
