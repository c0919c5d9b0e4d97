"""The modules that a strategy tells what to keep for backward, in their attribute `keep`."""

from spikefit.layers.unit import SpikingUnit
from spikefit.layers.window_block import WindowSpike

Keeping = SpikingUnit | WindowSpike
