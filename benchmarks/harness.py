"""What the benchmarks share: interleaved timing, a record that says where and how, and how to print it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = ("MALLOC_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "OMP_", "GOMP_", "NUMBA_", "PYTORCH_CUDA_ALLOC_CONF")


def interleave(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every contestant, one list entry per round; each round runs all of them, in turning order.

    A machine that slows down for a while then slows down all of them alike.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm_up, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contestants[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, other: str | None = None) -> float:
    """Median of `name`, over that of `other` if given."""
    return median(seconds[name]) / (1 if other is None else median(seconds[other]))


def describe(benchmark: str, *, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """The conditions of a run: device, threads, versions, commit, date, command, allocator settings."""
    packages = ("spikefit", "torch", "numpy", "numba", "triton", *extra)
    record: dict[str, Any] = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: v for p in packages if (v := _version(p))},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ALLOCATOR)},
    }
    if torch.cuda.is_available():
        record |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return record


def write(record: dict[str, Any], out: str | None) -> None:
    """Print medians and ratios of a record, and write all of it to `out` if given."""
    for name, values in record.get("seconds", {}).items():
        print(f"  {name:<28} {1e3 * median(values):9.1f} ms   ({1e3 * min(values):.1f} .. {1e3 * max(values):.1f})")
    for name, value in record.get("ratios", {}).items():
        target = record.get("targets", {}).get(name)
        print(f"  {name:<40} {value:7.3f}" + (f"   target {target}" if target else ""))
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
