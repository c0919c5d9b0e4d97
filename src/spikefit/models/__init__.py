"""Models: a chain of blocks from a sequence to logits, one family per file."""

from spikefit.models.network import SpikingNetwork, use_strategy
from spikefit.models.table import MODELS, create_model

__all__ = ["MODELS", "SpikingNetwork", "create_model", "use_strategy"]
