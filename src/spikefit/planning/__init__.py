"""Planning: the one harness for bytes, operations, energy and rates."""

from spikefit.planning.energy import Operations, energy_report
from spikefit.planning.memory import PredictedBytes, SavedBytes, predicted_bytes, saved_bytes, watch_saved
from spikefit.planning.profile import Profile, memory_against_timesteps, profile
from spikefit.planning.target import Target, random_sample

__all__ = [
    "Operations",
    "PredictedBytes",
    "Profile",
    "SavedBytes",
    "Target",
    "energy_report",
    "memory_against_timesteps",
    "predicted_bytes",
    "profile",
    "random_sample",
    "saved_bytes",
    "watch_saved",
]
