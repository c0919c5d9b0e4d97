"""Engines: who owns the backward of a chain, and how a strategy is chosen."""

from spikefit.engines.packing import pack_saved_tensors
from spikefit.engines.plan import Plan, UnitPlan, planned_units
from spikefit.engines.strategy import STRATEGIES, Strategy, parse_strategy

__all__ = [
    "STRATEGIES",
    "Plan",
    "Strategy",
    "UnitPlan",
    "pack_saved_tensors",
    "parse_strategy",
    "planned_units",
]
