"""Small whole numbers, one to eight bits each: spikes take one bit."""

from spikefit.ops.packbits.op import pack, packed_length, unpack

__all__ = ["pack", "packed_length", "unpack"]
