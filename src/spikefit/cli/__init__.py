"""The command line: `spikefit VERB TARGET [key=value ...] [--json]`."""

from spikefit.cli.app import main

__all__ = ["main"]
