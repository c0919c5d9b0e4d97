"""Peak memory of one training step, measured: the allocator's on CUDA, that of a fresh process on CPU."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import SpikefitError
from spikefit.planning.target import LossFunction, Target, mean_cross_entropy, training_step

# Every block above 64 KiB is its own mapping and goes back to the system at once, so resident memory follows the step.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "0"}


def measured_peak_bytes(target: Target) -> int:
    """Peak resident bytes of one training step of `target` above the level before it, in a fresh process.

    Raises:
        SpikefitError: the platform has no /proc, or the process failed; its last line is quoted.
    """
    return _run({"target": target.to_dict()})


def measured_peak_bytes_of(
    model: nn.Module, x: Tensor, y: Tensor, *, backend: str = "auto", autocast: bool = False
) -> int:
    """As `measured_peak_bytes`, for a model in memory: it is handed over in a temporary file of our own.

    Raises:
        SpikefitError: also if the model cannot be pickled; profile a factory, "package.module:function", instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        try:
            torch.save((model, x, y), path)
        except Exception as error:  # whatever pickling runs into
            raise SpikefitError(
                f"profile: {type(model).__name__} cannot be handed to a fresh process ({error}); give the name of a "
                "factory instead, package.module:function."
            ) from error
        return _run({"file": str(path), "backend": backend, "autocast": autocast})


def cuda_peak_bytes(
    model: nn.Module, x: Tensor, y: Tensor, loss: LossFunction = mean_cross_entropy, *, autocast: bool = False
) -> int:
    """Peak of the CUDA allocator in one training step above the level before it; compilation is left out."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, x, y, loss, autocast=autocast)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    model.zero_grad(set_to_none=True)
    return peak


def _run(job: dict[str, Any]) -> int:
    """Do `job` in a fresh process with the allocator settings of the harness."""
    if not Path("/proc/self/status").exists():
        raise SpikefitError("profile: measuring resident memory needs Linux (/proc); use predict_only=True here.")
    job = {**job, "threads": torch.get_num_threads()}
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "spikefit.planning.worker"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise SpikefitError(f"profile: the measuring process ended with: {lines[-1] if lines else done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
