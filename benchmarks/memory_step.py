"""Peak memory and time of one training step, every strategy against SpikingJelly and snnTorch, same nets and weights.

The step: forward, cross-entropy of the mean logits, backward; gradients start as None, nothing is updated. The cases:

    A  vgg6, T = 32, batch 8      B  vgg6, T = 8, batch 16      C  resnet19 (wide), T = 4, batch 8

with batch norm over time and batch, images 3x32x32 repeated T times, leak 0.5, soft reset, detached, atan(2). Peers run
as written (NCHW), in channels-last and under torch.compile; SpikingJelly also with its memory optimiser,
`optimize_memory` on units and residual blocks, at level 1 (levels 2 to 4 need CUDA, which their row says).

Peak: highest resident bytes above the level before the step, in a fresh process with the allocator settings of
`spikefit.planning`; weights and input are there before. Two steps of batch 2 go before it, of the full batch where a
net is compiled. Saved: bytes held between forward and backward; hooks do not see those of checkpoints and of compiled
nets. Seconds: all in turns in one process with the allocator as it is.

Depth: peak of k = 4, 8, 12 equal units of 64 channels, T = 8, batch 8, 16x16, as a slope in k.

No number of a case is printed unless its first losses agree, to 1e-5 in float64 and 1 % in float32 (compiled nets in
float32 only), and the gradients with those of `bptt`: SpikingJelly's in float64, those of our strategies in both. The
gradients of snnTorch pass through the reset and are not compared. See `vgg6_step.py` and `peer_nets.py` for its reset.

Run by `benchmarks/run.py` in the environment of `benchmarks/peers.py`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from harness import describe, interleave, write
from peer_nets import CLASSES, Case, Contestant, contestant
from torch import nn

from spikefit import SpikingNetwork
from spikefit.errors import SpikefitError
from spikefit.layers import GlobalAveragePool, Readout, SpikingConv2d
from spikefit.planning import Target, saved_bytes, watch_saved
from spikefit.planning.measured import MALLOC, measured_peak_bytes
from spikefit.planning.worker import _peak_during, resident

STRATEGIES = "bptt,checkpoint,lean:input,lean:spikes,planned,lean:spikes chunk-4"
DEFAULT_PEERS = ("spikingjelly", "snntorch")
LEVEL_1 = "spikingjelly level-1"
PEERS = (
    *(f"{peer}{form}" for peer in DEFAULT_PEERS for form in ("", " channels_last", " compiled")),
    LEVEL_1,
    f"{LEVEL_1} channels_last",
    "spikingjelly level-4",
)
# Steps up to which a peer's net is compiled, which unrolls its loop over time.
LONGEST_COMPILED = 16
TOLERANCE = {"float64": 1e-5, "float32": 1e-2}  # of first losses
GRADIENT_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # of all gradients as one vector
DEPTHS = (4, 8, 12)

CASES = {"A": Case("vgg6", 32, 8), "B": Case("vgg6", 8, 16), "C": Case("resnet19", 4, 8)}
EVERY_CASE = dict.fromkeys(CASES, 1.0)

# The ratios of a record: (measure, ours, rival) -> case -> the highest we want; none where it is only reported.
GOALS: dict[tuple[str, str, str], dict[str, float]] = {
    ("peak", "lean:input", "spikingjelly"): dict.fromkeys(CASES, 1 / 2),
    ("peak", "lean:spikes", "spikingjelly"): {"A": 1 / 6.5, "B": 1 / 6, "C": 1 / 6},
    ("peak", "lowest of ours", "spikingjelly"): {"A": 1 / 8},
    ("peak", "planned", "spikingjelly"): {},
    ("peak", "lean:spikes", LEVEL_1): EVERY_CASE,
    ("seconds", "lean:input", "fastest default peer"): EVERY_CASE,
    ("seconds", "lean:spikes", "fastest default peer"): EVERY_CASE,
    ("seconds", "lean:spikes", LEVEL_1): EVERY_CASE,
    ("seconds", "planned", "fastest default peer"): {},
    ("seconds", "lean:input", "fastest eager peer"): {},
    ("seconds", "lean:spikes", "fastest eager peer"): {},
    ("seconds", "planned", "fastest eager peer"): {},
}
SLOPE_GOAL = {"lean:spikes": 1 / 20}  # of the slope of bptt


def chain(units: int) -> nn.Module:
    """`units` equal units of 64 channels on 16x16, and a head; the depth study makes it in fresh processes."""
    blocks = [SpikingConv2d(64, 64) for _ in range(units)]
    return SpikingNetwork([*blocks, GlobalAveragePool(), Readout(64, CLASSES)], input_shape=(64, 16, 16))


def reason(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def try_all(case: Case, names: Iterable[str]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """(contestants by name after one step each, why the others could not run)."""
    ready, failed = {}, {}
    for name in names:
        try:
            made = contestant(case, name)
            made.step()
        except Exception as error:  # whatever a strategy, a peer or its compiler raises; the row of the table says it
            failed[name] = reason(error)
        else:
            ready[name] = made
    return ready, failed


def first_steps(contestants: dict[str, Contestant], dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """(first losses, distance of the gradient to that of bptt over its length), of those that are compared."""
    losses, distances, expected = {}, {}, []
    for name, each in contestants.items():
        if dtype == torch.float64 and name.endswith("compiled"):
            continue
        each.to(dtype)
        losses[name] = each.step(2 if dtype == torch.float64 else None).item()
        gradients = [p.grad for p in each.net.parameters() if p.ndim > 0]
        if not expected:
            expected = gradients
        elif name.startswith("ours") or (dtype == torch.float64 and name.startswith("spikingjelly")):
            wrong = sum(float((g - e).square().sum()) for g, e in zip(gradients, expected, strict=True))
            distances[name] = (wrong / sum(float(e.square().sum()) for e in expected)) ** 0.5
        each.net.zero_grad(set_to_none=True)
        each.to(torch.float32)
    return losses, distances


def parity(contestants: dict[str, Contestant]) -> tuple[dict[str, Any], list[str]]:
    """(losses and distances of gradients by dtype, what is too far off)."""
    record: dict[str, Any] = {"first_losses": {}, "gradients": {}}
    wrong = []
    for dtype in (torch.float64, torch.float32):
        key = str(dtype).removeprefix("torch.")
        losses, distances = first_steps(contestants, dtype)
        record["first_losses"][key], record["gradients"][key] = losses, distances
        expected = losses["ours bptt"]
        far = {k: v for k, v in losses.items() if not abs(v / expected - 1) <= TOLERANCE[key]}
        wrong += [f"{key} loss of {k} is {v:.7f}, of ours {expected:.7f}" for k, v in far.items()]
        far = {k: v for k, v in distances.items() if not v <= GRADIENT_TOLERANCE[key]}
        wrong += [f"{key} gradient of {k} is {v:.1e} off" for k, v in far.items()]
    return record, wrong


def worker() -> None:
    """Read case, name and threads from standard input, print peak and saved bytes of one step."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    name = job["name"]
    made = contestant(Case(**job["case"]), name)
    for _ in range(2):
        made.step(None if name.endswith("compiled") else 2)
        made.net.zero_grad(set_to_none=True)
    gc.collect()
    before = resident()
    result: dict[str, int] = {"peak": _peak_during(made.step) - before}
    if name.startswith("ours"):
        result["saved"] = saved_bytes(made.net, made.x).total
    elif "compiled" not in name and "level" not in name:
        with watch_saved(made.net) as saved:
            made.forward(made.net, made.x)
        result["saved"] = saved.total
    print(json.dumps(result))


def peaks(case: Case, name: str, *, processes: int) -> dict[str, Any]:
    """Peak and saved bytes from fresh processes; "failed" with the reason if one ended early."""
    job = json.dumps({"case": asdict(case), "name": name, "threads": torch.get_num_threads()})
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    record: dict[str, Any] = {"peak_bytes": []}
    for _ in range(processes):
        done = subprocess.run(command, input=job, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            return {"failed": lines[-1] if lines else f"the process ended with status {done.returncode}"}
        result = json.loads(done.stdout.splitlines()[-1])
        record["peak_bytes"].append(result["peak"])
        if "saved" in result:
            record["saved_bytes"] = result["saved"]
    return record


def run_case(case: Case, strategies: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured of a case; rows are in "contestants", by name."""
    peers = {p for p in PEERS if "compiled" not in p or case.timesteps <= LONGEST_COMPILED}
    ready, failed = try_all(case, (*(f"ours {s}" for s in strategies), *(p for p in PEERS if p in peers)))
    failed |= dict.fromkeys(set(PEERS) - peers, f"compiling {case.timesteps} unrolled steps takes more than 7 minutes")
    if "ours bptt" in ready:
        record, wrong = parity(ready)
    else:
        record, wrong = {}, [f"ours bptt did not run: {failed['ours bptt']}"]
    rows: dict[str, dict[str, Any]] = {name: {} for name in ready}
    if not wrong and args.only != "memory":
        steps = {name: net.step for name, net in ready.items()}
        for name, seconds in interleave(steps, rounds=3 if args.quick else 5).items():
            rows[name]["seconds"] = seconds
    ready.clear()
    if not wrong and args.only != "time":
        for name, row in rows.items():
            row |= peaks(case, name, processes=1 if args.quick else 3)
    for row in rows.values():
        row |= {f"median_{key}": median(row[key]) for key in ("seconds", "peak_bytes") if key in row}
    rows |= {name: {"failed": why} for name, why in failed.items()}
    return asdict(case) | record | {"parity": not wrong, "wrong": wrong, "contestants": rows}


def run_depth(strategies: list[str], *, processes: int) -> dict[str, Any]:
    """Peaks of chains of `DEPTHS` units by strategy, and their slopes in bytes per unit."""
    record: dict[str, Any] = {"peak_bytes": {}, "slope_bytes": {}, "failed": {}}
    for strategy in strategies:
        values: dict[int, list[int]] = {}
        try:
            for k in DEPTHS:
                target = Target(
                    "memory_step:chain",
                    options={"units": k},
                    strategy=strategy,
                    timesteps=8,
                    batch=8,
                    encoding="sequence",
                )
                values[k] = [measured_peak_bytes(target) for _ in range(processes)]
        except SpikefitError as error:
            record["failed"][strategy] = reason(error)
            continue
        record["peak_bytes"][strategy] = values
        record["slope_bytes"][strategy] = linear_regression(DEPTHS, [median(v) for v in values.values()]).slope
    return record


def medians(rows: dict[str, dict[str, Any]], key: str) -> dict[str, float]:
    """Contestant -> median of `key`, of those that have one."""
    return {name: row[f"median_{key}"] for name, row in rows.items() if f"median_{key}" in row}


def rivals(measure: str, values: dict[str, float]) -> dict[str, float]:
    """What ours is compared with, by name: the lowest value of a group of peers."""
    eager = {k: v for k, v in values.items() if not k.startswith("ours") and "compiled" not in k}
    groups = {LEVEL_1: [v for k, v in eager.items() if k.startswith(LEVEL_1)]}
    if measure == "peak":
        groups["spikingjelly"] = [v for k, v in eager.items() if k == "spikingjelly"]
    else:
        groups["fastest default peer"] = [v for k, v in eager.items() if k in DEFAULT_PEERS]
        groups["fastest eager peer"] = list(eager.values())
    return {name: min(group) for name, group in groups.items() if group}


def case_ratios(letter: str, rows: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """(ratios, targets) of `GOALS` in one case, of what was measured."""
    ratios, targets = {}, {}
    for (measure, strategy, rival), goals in GOALS.items():
        values = medians(rows, "peak_bytes" if measure == "peak" else measure)
        ours = {k.removeprefix("ours "): v for k, v in values.items() if k.startswith("ours")}
        if ours:
            ours["lowest of ours"] = min(ours.values())
        bars = rivals(measure, values)
        if strategy in ours and rival in bars:
            name = f"{letter} {measure} {strategy} / {rival}"
            ratios[name] = ours[strategy] / bars[rival]
            if letter in goals:
                targets[name] = f"<= {goals[letter]:.3f}"
    return ratios, targets


def depth_ratios(slopes: dict[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """(ratios, targets) of the slopes in depth over that of bptt."""
    others = {name: slope for name, slope in slopes.items() if name != "bptt" and "bptt" in slopes}
    return (
        {f"depth slope {name} / bptt": slope / slopes["bptt"] for name, slope in others.items()},
        {f"depth slope {name} / bptt": f"<= {SLOPE_GOAL[name]:.3f}" for name in others if name in SLOPE_GOAL},
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per contestant: peak and saved MB (1e6 bytes), seconds, and both over the default peers."""
    peak, seconds = medians(rows, "peak_bytes"), medians(rows, "seconds")
    bars = rivals("peak", peak) | rivals("seconds", seconds)
    lines = [("", "peak MB", "/ spikingjelly", "saved MB", "seconds", "/ fastest default peer")]
    for name, row in rows.items():
        if "failed" in row:
            lines.append((name, row["failed"], "", "", "", ""))
            continue
        p, s, held = peak.get(name), seconds.get(name), row.get("saved_bytes")
        lines.append(
            (
                name,
                _cell(p, 1e6, 1),
                _cell(p, bars.get("spikingjelly"), 3),
                _cell(held, 1e6, 1),
                _cell(s, 1, 3),
                _cell(s, bars.get("fastest default peer"), 3),
            )
        )
    widths = [max(len(line[i]) for line in lines if line[2] or i == 0) for i in range(6)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: float | None, unit: float | None, digits: int) -> str:
    return "-" if value is None or unit is None else f"{value / unit:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="letters, by comma")
    parser.add_argument("--strategies", default=STRATEGIES, help="of ours, by comma; bptt is always among them")
    parser.add_argument("--only", choices=("memory", "time"))
    parser.add_argument("--quick", action="store_true", help="1 process for a peak instead of 3, 3 rounds instead of 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    torch.set_num_threads(args.threads)
    letters, strategies = args.cases.split(","), list(dict.fromkeys(("bptt", *args.strategies.split(","))))
    if unknown := set(letters) - set(CASES):
        parser.error(f"--cases: expected letters of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    record = describe("memory_step", extra=("spikingjelly", "snntorch"))
    record |= {"tolerance": TOLERANCE, "gradient_tolerance": GRADIENT_TOLERANCE, "malloc": MALLOC}
    record |= {"cases": {}, "ratios": {}, "targets": {}, "unmeasured": {}}
    for letter in letters:
        case = record["cases"][letter] = run_case(CASES[letter], strategies, args)
        head = f"memory_step {letter}: {case['model']}, T {case['timesteps']}, batch {case['batch']}"
        if not case["parity"]:
            print(f"{head}: RED, no numbers: {'; '.join(case['wrong'])}.")
            continue
        loss = case["first_losses"]["float64"]["ours bptt"]
        print(
            f"{head}, threads {args.threads}; first losses agree, ours {loss:.7f}\n{table(case['contestants'])}\n",
            flush=True,
        )
        ratios, targets = case_ratios(letter, case["contestants"])
        record["ratios"] |= ratios
        record["targets"] |= targets
        record["unmeasured"] |= {f"{letter} {k}": v["failed"] for k, v in case["contestants"].items() if "failed" in v}
    if args.only != "time":
        named = [s for s in strategies if s != "planned" and " " not in s]
        depth = record["depth"] = run_depth(named, processes=1 if args.quick else 3)
        ratios, targets = depth_ratios(depth["slope_bytes"])
        record["ratios"] |= ratios
        record["targets"] |= targets
        record["unmeasured"] |= {f"depth {k}": why for k, why in depth["failed"].items()}
        print("depth, bytes per unit: " + ", ".join(f"{k} {v:,.0f}" for k, v in depth["slope_bytes"].items()))
    record["parity"] = all(case["parity"] for case in record["cases"].values())
    write(record, args.out)
    return 0 if record["parity"] else 1


if __name__ == "__main__":
    sys.exit(main())
