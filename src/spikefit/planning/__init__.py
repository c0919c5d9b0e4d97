"""Planning: the one harness for bytes, operations, energy and rates; plans, proofs and diagnoses made with it."""

from spikefit.planning.doctor import Diagnosis, Finding, doctor
from spikefit.planning.energy import Operations, energy_report
from spikefit.planning.held import SavedBytes, watch_saved
from spikefit.planning.memory import PredictedBytes, predicted_bytes, saved_bytes
from spikefit.planning.plan import plan
from spikefit.planning.profile import Profile, memory_against_timesteps, profile
from spikefit.planning.report import MemoryReport, report
from spikefit.planning.target import Target, random_sample
from spikefit.planning.verify import Verdict, verify

__all__ = [
    "Diagnosis",
    "Finding",
    "MemoryReport",
    "Operations",
    "PredictedBytes",
    "Profile",
    "SavedBytes",
    "Target",
    "Verdict",
    "doctor",
    "energy_report",
    "memory_against_timesteps",
    "plan",
    "predicted_bytes",
    "profile",
    "random_sample",
    "report",
    "saved_bytes",
    "verify",
    "watch_saved",
]
