"""What a run leaves behind: its record, and the events while it goes on."""

import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import spikefit
from spikefit.training.files import write_json


@dataclass(frozen=True)
class ProgressEvent:
    """One moment of a run, for whoever draws its progress.

    Attributes:
        kind: "start", "step" (after every update), "epoch" (after its evaluation) or "end".
        epoch, epochs: current epoch, counted from 1, and their number.
        step, steps: updates made so far, and in the whole run.
        loss: of the batch ("step") or mean of the epoch ("epoch", "end").
        accuracy: on the test split, share in [0, 1]; None before the first evaluation.
        learning_rate: of the last update.
    """

    kind: Literal["start", "step", "epoch", "end"]
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None = None
    accuracy: float | None = None
    learning_rate: float | None = None


@dataclass
class TrainRecord:
    """The record of a training run.

    Attributes:
        recipe: as trained, with the shapes that followed from the data.
        environment: versions, device, commit.
        history: one entry per epoch: epoch, train_loss, test_loss, test_accuracy (share), seconds, learning_rate,
            spike_rate (mean over layers).
        accuracy, loss: on the test split after the last epoch, with averaged weights if there are any.
        spike_rates: layer -> mean share of neurons that fire per step, on the test split.
        steps: updates made.
        step_seconds: median time of an update.
        parameters: trainable numbers in the model.
        classes: names, in the order of the logits.
        note: what must be said beside the numbers.
        checkpoint: path of the newest checkpoint, or None without `out`.
    """

    recipe: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    accuracy: float
    loss: float
    spike_rates: dict[str, float]
    steps: int
    step_seconds: float
    parameters: int
    classes: list[str]
    note: str
    checkpoint: str | None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of what computes, the device, and the commit of the working directory ("-dirty" with open changes)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "spikefit": spikefit.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": str(device.type),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def write_record(folder: str | Path, record: TrainRecord) -> Path:
    """Write record.json into `folder`, whole or not at all."""
    return write_json(Path(folder) / "record.json", record.to_dict())


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
