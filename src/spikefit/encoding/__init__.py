"""Encodings: from a batch of samples to a sequence [T, B, ...]."""

from spikefit.encoding.events import event_frames
from spikefit.encoding.static import latency, rate, repeat, sequence
from spikefit.encoding.table import ENCODINGS, Encoding, create_encoding

__all__ = ["ENCODINGS", "Encoding", "create_encoding", "event_frames", "latency", "rate", "repeat", "sequence"]
