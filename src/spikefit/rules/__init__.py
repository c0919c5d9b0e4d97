"""Rules: approximate gradients, taken while a sequence runs, in memory that does not grow with T."""

from spikefit.rules.driver import Outcome, drive
from spikefit.rules.sampler import AllSteps, EveryK, RandomK, Sampler, TopActivity
from spikefit.rules.trace import TBPTT, StepRule, TraceRule, ndot, ottt, sltt, tbptt

__all__ = [
    "TBPTT",
    "AllSteps",
    "EveryK",
    "Outcome",
    "RandomK",
    "Sampler",
    "StepRule",
    "TopActivity",
    "TraceRule",
    "drive",
    "ndot",
    "ottt",
    "sltt",
    "tbptt",
]
