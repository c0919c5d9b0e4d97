"""Engines: who owns the backward of a chain, and how a strategy is chosen."""

from spikefit.engines.strategy import STRATEGIES, Strategy, parse_strategy

__all__ = ["STRATEGIES", "Strategy", "parse_strategy"]
