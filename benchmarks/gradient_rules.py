"""Approximate rules beside BPTT: memory against T, time of a step, and the gradient of every layer.

    SPIKEFIT_DATA=FOLDER python benchmarks/gradient_rules.py [--quick] [--threads 2] [--only memory time batch cosine]
        [--networks vgg6 ...] [--measure-to 64] [--studies FOLDER ...] [--out FILE]
    python benchmarks/gradient_rules.py --tables [RECORD ...] [--studies FOLDER ...] [--page PAGE.md]

memory  bytes held for backward, predicted peak and, up to --measure-to, measured peak of a step at T = 4 .. 256, with
        slopes in T; bytes held over streams in depth, against T and blocks (`rules_memory.py`)
time    seconds of a step over those of bptt with the same loss, all rows in turns in one process: VGG6 of full width at
        T = 8, batch 16, and the networks of studies/gradient_rules_*.toml on their first batch
batch   seconds of a step of sltt over those of bptt, the two in turns, on VGG6 of full width at T = 8, batch 8 .. 64
cosine  cosine to the gradient of BPTT with the same loss and ratio of norms, layer by layer, on the first batch of each
        study, with initial and with trained weights (`rules_cosine.py`): those in a folder of --studies that kept its
        weights, else of one epoch that is trained here

Nothing is measured unless all rows give the gradient of BPTT at T = 1, exact strategies and rules over lean units that
of what they stand for at T = 4, and no rule that of BPTT at T = 4, where they must differ.

The second command prints the tables of docs/results/gradient_rules.md, from records and from the folders that
`spikefit study` wrote, and with --page writes them into that page. What lacks its data is listed as unmeasured.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import describe, interleave, ratio, write
from rules_cosine import cosine
from rules_memory import memory
from rules_page import fill, tables
from rules_rows import (
    BATCHES,
    ROWS,
    RULES,
    STUDIES,
    TWIN,
    VGG6,
    Network,
    baseline,
    gradients,
    in_batches,
    step_of,
    studied,
    zoo,
)
from torch import Tensor

from spikefit.errors import DataError, RuleWarning, SpikefitError
from spikefit.reporting.measure import FirstBatch

# rows with the gradient of another one
SAME = {
    "tbptt:4": "bptt",
    "lean:spikes": "bptt",
    "checkpoint": "bptt",
    "sltt over lean:spikes": "sltt",
    "ottt over lean:spikes": "ottt",
    "rate:sequence": "rate",
}
PARTS = ("memory", "time", "batch", "cosine")
GOAL = "<= 1.1"  # of sltt over bptt
ROUNDS = 11  # of VGG6


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of a gradient over the largest of its parameter."""
    return max(float((got[name] - w).abs().max() / w.abs().max()) for name, w in wanted.items())


def disagreement() -> str | None:
    """What differs though it must be equal, or is equal though it must differ; None if all is as it should be."""
    small: dict[str, dict[str, Any]] = {
        "vgg6": VGG6 | {"width": 0.125, "input_shape": (3, 8, 8)},
        "har_mlp": {"hidden": 16},
    }
    for name, options in small.items():
        one, four = (zoo(name, T, 4, dtype=torch.float64, **options) for T in (1, 4))
        for row, loss in ROWS.items():
            if distance(gradients(one, row), gradients(one, TWIN[loss])) > 1e-9:
                return f"{name}: {row} and bptt differ at T = 1"
            if row in RULES and distance(gradients(four, row), gradients(four, TWIN[loss])) < 1e-3:
                return f"{name}: {row} and bptt are equal at T = 4"
        for row, other in SAME.items():
            if distance(gradients(four, row), gradients(four, other)) > 1e-9:
                return f"{name}: {row} and {other} differ at T = 4"
    return None


def times(name: str, network: Network, rounds: int, rows: Sequence[str] = tuple(ROWS)) -> dict[str, Any]:
    """Seconds of a step by row, and ratios to bptt with the same loss."""
    steps = {f"{name}: {row}": step_of(network, row)[1] for row in rows}
    torch.manual_seed(0)
    seconds = interleave(steps, rounds=rounds)
    pairs = {row: (f"{name}: {row}", f"{name}: {TWIN[ROWS[row]]}") for row in rows if row not in TWIN.values()}
    ratios = {f"{name}: {row} / bptt": ratio(seconds, own, twin) for row, (own, twin) in pairs.items()}
    return {"seconds": seconds, "ratios": ratios}


def joined(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `times` gave for several networks, as one."""
    parts = list(found)
    return {key: {name: value for part in parts for name, value in part[key].items()} for key in ("seconds", "ratios")}


def vgg6(batch: int, quick: bool) -> Network:
    """VGG6 at T = 8, with random input."""
    return zoo("vgg6", 8, batch, **VGG6, width=0.25 if quick else 1.0)


def by_batch(quick: bool) -> dict[str, Any]:
    """The batch part."""
    rounds, rows = 1 if quick else ROUNDS, ("bptt", "sltt")
    batches = BATCHES[:2] if quick else BATCHES
    record = joined(times(in_batches(batch), vgg6(batch, quick), rounds, rows) for batch in batches)
    return record | {"targets": dict.fromkeys(record["ratios"], GOAL)}


def timed(quick: bool, networks: list[str]) -> dict[str, Any]:
    """The time part: of VGG6, and of the networks of studies whose data are there, those in `networks`."""
    found, unmeasured = [], {}
    if "vgg6" in networks:
        found.append(times("vgg6", vgg6(16, quick), 1 if quick else ROUNDS))
    for study in (study for study in STUDIES if study in networks):
        try:
            cell = baseline(study, quick=quick)
            found.append(times(study, studied(cell, FirstBatch(cell.recipe)), 1 if quick else 3))
        except DataError as error:
            unmeasured[f"time: {study}"] = str(error)
    return joined(found) | {"targets": {"vgg6: sltt / bptt": GOAL}, "unmeasured": unmeasured}


def directions(folders: list[Path], quick: bool) -> dict[str, Any]:
    """The cosine part: every study whose data are there."""
    record: dict[str, Any] = {"cosine": [], "unmeasured": {}}
    for study in STUDIES:
        try:
            record["cosine"].append(cosine(study, folders, quick=quick))
        except DataError as error:
            record["unmeasured"][f"cosine: {study}"] = str(error)
    return record


def measure(args: argparse.Namespace) -> int:
    """Run the parts; returns the status of the program."""
    record: dict[str, Any] = describe("gradient_rules") | {"quick": args.quick, "parity": True}
    record |= {"seconds": {}, "ratios": {}, "targets": {}, "unmeasured": {}, "part_seconds": {}}
    wrong = disagreement()
    if wrong is not None:
        print(f"gradient_rules: RED, no numbers: {wrong}.")
        write(record | {"parity": False, "disagreement": wrong}, args.out)
        return 1
    print("gradient_rules: all rows give the gradient of bptt at T = 1, and that of what they stand for at T = 4")
    runs = {
        "memory": lambda: memory(args.quick, args.threads, args.measure_to),
        "time": lambda: timed(args.quick, args.networks),
        "batch": lambda: by_batch(args.quick),
        "cosine": lambda: directions(args.studies, args.quick),
    }
    for part in args.only:
        start = time.perf_counter()
        for key, value in runs[part]().items():
            record[key] = record[key] | value if isinstance(value, dict) and key in record else value
        record["part_seconds"][part] = seconds = time.perf_counter() - start
        print(f"gradient_rules: {part} took {seconds:.0f} s")
    for name, why in record["unmeasured"].items():
        print(f"  unmeasured: {name}: {why}")
    write(record, args.out)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, little data, one round")
    parser.add_argument("--threads", type=int, default=2, help="and processes that measure bytes at a time")
    parser.add_argument("--networks", nargs="+", choices=("vgg6", *STUDIES), default=("vgg6", *STUDIES), help="timed")
    parser.add_argument("--measure-to", type=int, default=64, metavar="T", help="above it peaks are predicted only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run these parts")
    parser.add_argument(
        "--studies", nargs="+", type=Path, default=[], metavar="FOLDER", help="written by spikefit study"
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tables", nargs="*", type=Path, metavar="RECORD", help="print the tables and measure nothing")
    parser.add_argument("--page", type=Path, help="with --tables: the page to write them into")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # what is approximate here is the question
    warnings.simplefilter("ignore", RuleWarning)
    if args.tables is None:
        return measure(args)
    try:
        made = tables(args.tables, args.studies, quick=args.page is None)
        if args.page is not None:
            fill(args.page, made)
    except SpikefitError as error:
        print(f"gradient_rules: {error}")
        return 1
    for name, text in made.items():
        print(f"<!-- table: {name} -->\n{text}\n<!-- end -->\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
