"""Losses: from logits [T, B, K] and targets to one number. Each declares whether it splits over steps."""

from spikefit.losses.losses import (
    LOSSES,
    TET,
    CrossEntropyHeads,
    CrossEntropyMean,
    CrossEntropySteps,
    RateMSE,
    create_loss,
    labels_per_step,
)

__all__ = [
    "LOSSES",
    "TET",
    "CrossEntropyHeads",
    "CrossEntropyMean",
    "CrossEntropySteps",
    "RateMSE",
    "create_loss",
    "labels_per_step",
]
