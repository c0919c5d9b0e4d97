"""Rules: approximate gradients, taken while a sequence runs, in memory that does not grow with T."""

from spikefit.rules.driver import Outcome, drive
from spikefit.rules.rate import RateRule, drive_rate, rate
from spikefit.rules.sampler import AllSteps, EveryK, RandomK, Sampler, TopActivity
from spikefit.rules.trace import TBPTT, StepRule, TraceRule, ndot, ottt, sltt, tbptt

__all__ = [
    "TBPTT",
    "AllSteps",
    "EveryK",
    "Outcome",
    "RandomK",
    "RateRule",
    "Sampler",
    "StepRule",
    "TopActivity",
    "TraceRule",
    "drive",
    "drive_rate",
    "ndot",
    "ottt",
    "rate",
    "sltt",
    "tbptt",
]
