"""The LIF sequence: one neuron population over all T steps."""

from spikefit.ops.lif.op import LIFGradients, lif, lif_backward

__all__ = ["LIFGradients", "lif", "lif_backward"]
