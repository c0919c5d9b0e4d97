"""The scan of windows: one step of a layer, cut into windows that start from each other's membranes."""

from spikefit.ops.window_scan.fusion import FUSIONS, check_phi, check_threshold, omega, over_activation
from spikefit.ops.window_scan.links import (
    NOTHING,
    Link,
    Links,
    across,
    across_release,
    apart,
    behind,
    in_turn,
)
from spikefit.ops.window_scan.op import window_scan

__all__ = [
    "FUSIONS",
    "NOTHING",
    "Link",
    "Links",
    "across",
    "across_release",
    "apart",
    "behind",
    "check_phi",
    "check_threshold",
    "in_turn",
    "omega",
    "over_activation",
    "window_scan",
]
