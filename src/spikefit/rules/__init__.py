"""Rules: approximate gradients, taken while a sequence runs, in memory that does not grow with T."""

from spikefit.rules.driver import Outcome, drive
from spikefit.rules.rate import RateRule, drive_rate, rate
from spikefit.rules.resolve import Note, resolve
from spikefit.rules.sampler import AllSteps, EveryK, GivenSteps, RandomK, Sampler, TopActivity
from spikefit.rules.table import RULES, Driver, parse_driver
from spikefit.rules.trace import TBPTT, StepRule, TraceRule, ndot, ottt, sltt, tbptt
from spikefit.rules.verdicts import verdict_rows

__all__ = [
    "RULES",
    "TBPTT",
    "AllSteps",
    "Driver",
    "EveryK",
    "GivenSteps",
    "Note",
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
    "parse_driver",
    "rate",
    "resolve",
    "sltt",
    "tbptt",
    "verdict_rows",
]
