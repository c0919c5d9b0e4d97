"""The fresh process of `measured`: reads a job from standard input, runs one step, prints its peak resident bytes."""

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikefit.ops.dispatch import use_backend
from spikefit.planning.target import Step, training_step

STATUS = Path("/proc/self/status")


def resident(field: str = "VmRSS") -> int:
    """A line of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    # the file was written a moment ago by the process that started this one
    content = torch.load(job["file"], weights_only=False)
    step = content if isinstance(content, Step) else content[0].step(content[1])
    model, x, y = step.model, step.x, step.y

    def train(x: Tensor, y: Tensor) -> None:
        training_step(model, x, y, step.loss, autocast=step.autocast, driver=step.driver)

    model.train()
    with use_backend(step.backend):
        # two samples load libraries and compile kernels, which is no memory of the step
        for _ in range(2):
            train(x[:, :2], y[:2])
            model.zero_grad(set_to_none=True)
        gc.collect()
        before = resident()
        peak = _peak_during(lambda: train(x, y))
    print(json.dumps({"peak_bytes": peak - before}))


def _peak_during(run) -> int:
    """Highest resident bytes while `run` runs: the kernel's own mark, reset before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled_peak(run)
    run()
    return resident("VmHWM")


def _sampled_peak(run) -> int:
    """As `_peak_during` where the mark cannot be reset: a thread reads the level every millisecond."""
    done, highest = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return highest[0]


if __name__ == "__main__":
    main()
