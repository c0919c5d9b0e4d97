"""Peak memory of one training step, measured: the allocator's on CUDA, that of a fresh process on CPU."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import SpikefitError
from spikefit.losses.model_loss import LossFunction
from spikefit.planning.target import Step, Target, mean_cross_entropy, training_step
from spikefit.rules.table import WHOLE, Driver

# Every block above 64 KiB is its own mapping and goes back to the system at once, so resident memory follows the step.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "0"}
INSTEAD = "predict only: predict_only=True, --predict-only on the command line"


def measured_peak_bytes(target: Target, loss: LossFunction = mean_cross_entropy) -> int:
    """Peak resident bytes of one training step of `target` above the level before it, in a fresh process.

    Raises:
        SpikefitError: the platform has no /proc, the loss cannot be pickled, or the process failed; its last line is
            quoted.
    """
    return _run((target, loss), (loss,))


def measured_peak_bytes_of(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: LossFunction = mean_cross_entropy,
    *,
    backend: str = "auto",
    autocast: bool = False,
    driver: Driver = WHOLE,
) -> int:
    """As `measured_peak_bytes`, for a model in memory: it is handed over in a temporary file of our own.

    Raises:
        SpikefitError: also if the model cannot be pickled; profile a factory, "package.module:function", instead.
    """
    return _run(Step(model, x, y, loss, backend, autocast, driver=driver), (*model.modules(), loss))


def cuda_peak_bytes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: LossFunction = mean_cross_entropy,
    *,
    autocast: bool = False,
    driver: Driver = WHOLE,
) -> int:
    """Peak of the CUDA allocator in one training step above the level before it; compilation is left out."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, x, y, loss, autocast=autocast, driver=driver)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    model.zero_grad(set_to_none=True)
    return peak


def _run(content: Any, parts: Iterable[Any]) -> int:
    """Do the step that `content` describes in a fresh process with the allocator settings of the harness.

    `parts` are the objects whose classes or functions that process has to import.
    """
    if not Path("/proc/self/status").exists():
        raise SpikefitError(f"profile: measuring resident memory needs Linux (/proc); {INSTEAD}.")
    for part in parts:
        kind = part if inspect.isfunction(part) else type(part)
        if kind.__module__ == "__main__":
            raise SpikefitError(
                f"profile: {kind.__name__} is defined in the script that runs, which the fresh process of the "
                f"measurement cannot import; move it into a module of its own, or {INSTEAD}."
            )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        try:
            torch.save(content, path)
        except Exception as error:  # whatever pickling runs into
            raise SpikefitError(
                f"profile: the step cannot be handed to a fresh process ({error}); give the name of a factory instead "
                f"of a model, package.module:function, a function of a module as loss, or {INSTEAD}."
            ) from error
        return _worker({"file": str(path), "threads": torch.get_num_threads()})


def _worker(job: dict[str, Any]) -> int:
    # a heap that is tuned otherwise would keep what the step gives back
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    environment = {**kept, **MALLOC, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "spikefit.planning.worker"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise SpikefitError(f"profile: the measuring process ended with: {lines[-1] if lines else done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
