"""Run the CPU benchmarks, print one table, write one JSON per benchmark to `benchmarks/results/`.

    python benchmarks/run.py [--quick] [--threads 2] [--only lif_op]

`make bench` runs it. Benchmarks run one after the other, each in a process of its own; those against peers run in
`.peers/`, which is made if missing. Exits with 1 if a parity check is red or a benchmark fails, never because of a
time. A CUDA machine has `benchmarks/gpu.py`.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import peers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Memory stays with the process: an op of milliseconds is then timed, not the page faults of its results.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
OPS = ("lif_op", "reversible_node", "windows")
# name -> whether it needs the environment of the peers
BENCHMARKS = {
    "lif_op": False,
    "vgg6_step": True,
    "memory_step": True,
    "reversible_node": False,
    "reversible_depth": False,
    "trevsnn": False,
    "windows": False,
    "dmsn": False,
    "gradient_rules": False,
}


def run(name: str, *, quick: bool, threads: int) -> dict | None:
    """Run one benchmark; returns its record, or None if it failed without one."""
    python = peers.ensure() if BENCHMARKS[name] else Path(sys.executable)
    out = RESULTS / f"{name}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    script = str((HERE / f"{name}.py").relative_to(peers.ROOT))
    command = [str(python), script, "--threads", str(threads), "--out", str(out.relative_to(peers.ROOT))]
    command += ["--quick"] if quick else []
    # warnings of the peers are not ours to print
    environment = os.environ | {"PYTHONWARNINGS": "ignore"} | (KEEP_MEMORY if name in OPS else {})
    result = subprocess.run(command, cwd=peers.ROOT, env=environment, check=False)
    if not out.exists():
        print(f"{name}: ended with status {result.returncode} and wrote no record; see its message above.")
        return None
    return json.loads(out.read_text())


def table(records: list[dict]) -> str:
    """One line per ratio: benchmark, what over what, value, target; what could not be measured says why instead."""
    rows = [("benchmark", "ratio", "value", "target", "seconds of ours")]
    for r in records:
        ours = f"{median(r['seconds']['ours']):.3f}" if "ours" in r.get("seconds", {}) else ""
        if not r["parity"]:
            rows.append((r["benchmark"], "parity is RED", "", "", ""))
        rows += [
            (r["benchmark"], name, f"{value:.3f}", r["targets"].get(name, ""), ours)
            for name, value in r.get("ratios", {}).items()
        ]
        rows += [(r["benchmark"], name, "-", "", why) for name, why in r.get("unmeasured", {}).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(BENCHMARKS), help="run one benchmark")
    args = parser.parse_args()
    names = [args.only] if args.only else list(BENCHMARKS)
    try:
        records = [run(name, quick=args.quick, threads=args.threads) for name in names]
    except subprocess.CalledProcessError as error:
        print(f"benchmarks: the environment of the peers could not be set up; this command failed: {error.cmd}.")
        return 1
    done = [r for r in records if r is not None]
    print("\n" + table(done))
    print(f"records: {RESULTS.relative_to(peers.ROOT)}/")
    return 0 if len(done) == len(records) and all(r["parity"] for r in done) else 1


if __name__ == "__main__":
    sys.exit(main())
