"""The two-group node: two populations that drive each other, whose steps can be run backwards from their outputs."""

from spikefit.ops.node.op import two_group
from spikefit.ops.node.reversal import Reversal, reversing

__all__ = ["Reversal", "reversing", "two_group"]
