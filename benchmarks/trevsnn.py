"""T-RevSNN: what its strategies keep and cost against T, how often a plain walk back fails, and energy at inference.

    python benchmarks/trevsnn.py [--quick] [--threads 2] [--parts a,b,c,d,e,f] [--out FILE] [--data FOLDER]
                                 [--weights CHECKPOINT]

a  parity: weight gradients of every strategy equal those of bptt bit for bit (all but gains), else nothing is
   measured; also run where it is not asked for, unless FILE has it of the same commit
b  bytes kept per image of `trevsnn_mini` at 32x32 against T, beside those on paper; the published networks on paper
c  peak bytes per image in fresh processes, and images per second of a training step, all strategies in turns
d  how often keeping the last state alone destroys the way back, and how often our strategies do (`trev_drift.py`)
e  operations and energy at inference on CIFAR-10 (`trev_energy.py`)
f  bytes of `trevsnn_tiny` at 224x224 from fake tensors, beside those on paper

A FILE that exists is continued: parts that are not asked for stay, and runs of d that it has are not run again; it must
come from the same mode, quick or full. Each part says when, with which command and how many threads it ran.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import describe, interleave, ratio, write
from torch import nn
from trev_drift import differences, drift, gradients, images, network, print_drift
from trev_energy import energy, published_counts
from trev_formulas import MINI, PUBLISHED, Layout

from spikefit.errors import DataError, SpikefitError, StrategyError
from spikefit.losses import create_loss
from spikefit.models import use_strategy
from spikefit.neurons import Threshold
from spikefit.planning import predicted_bytes, saved_bytes, watch_saved
from spikefit.planning.measured import measured_peak_bytes
from spikefit.planning.target import Target

GRID: dict[str, Any] = {"gain": "one", "state_grid": 14}
# name -> (strategy, options of the model, kind and anchor_every on paper). Where the detector may stop backward, it
# repairs, so that every case has a time.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, int | None]]] = {
    "bptt": ("bptt", {}, ("bptt_once", None)),
    "step_checkpoint": ("step_checkpoint", {}, ("step_checkpoint", None)),
    "spike_bits": ("spike_bits", {}, ("spike_bits", None)),
    "spike_bits:8": ("spike_bits:8", {}, ("spike_bits", 8)),
    "spike_bits, gains fixed": ("spike_bits", {"learn_gain": False}, ("bits_alone", None)),
    "reversible": ("reversible:none,0.001,repair", {}, ("reversible", None)),
    "reversible:4": ("reversible:4,0.001,repair", {}, ("reversible", 4)),
    "reversible, gains one on a grid": ("reversible", GRID, ("reversible", None)),
}
LENGTHS = (4, 8, 16, 32)
START = 0.75  # of bounded gains


def parity(quick: bool) -> dict[str, Any]:
    """Gradients of small networks whose inner layers fire, beside those of bptt."""
    small: dict[str, Any] = {"widths": (4, 6, 8, 10), "input_shape": (3, 16, 16), "lively": True}
    exact, found = {"spike_bits", "step_checkpoint", "reversible:2,0.001,repair"}, {}
    for T in (4,) if quick else (4, 8):
        for options, strategies in (({}, sorted(exact)), (GRID, ["reversible"])):
            net, x = network(T, **small, **options), images(T, 2, side=16)
            rates = firing(net, x)
            twin = gradients(net, "bptt", x)
            for strategy in strategies:
                name = f"T={T} {strategy}{', gains one on a grid' if options else ''}"
                found[name] = differences(twin, gradients(net, strategy, x)) | {"least_rate": min(rates)}
                row = found[name]
                print(f"  {name:<44} {'equal' if row['equal'] else 'NOT equal'}; gains off by {row['gains']:.1e}")
    # a silent layer would prove nothing; gradients of gains round
    good = all(r["equal"] and r["gains"] < 1e-3 and r["least_rate"] > 0.01 for r in found.values())
    return {"parity": good, "cases": found}


def firing(net: nn.Module, x: torch.Tensor) -> list[float]:
    """Rates of all layers that fire."""
    seen: list[float] = []
    handles = [
        m.register_forward_hook(lambda module, inputs, s: seen.append(float(s.detach().mean())))
        for m in net.modules()
        if isinstance(m, Threshold)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen


def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return create_loss("ce_mean")(net(x), torch.arange(x.shape[1]) % 10)


def per_image(count: Callable[[int], float], batches: tuple[int, int] = (1, 2)) -> float:
    """Growth of `count` with the batch: what does not depend on it, such as standardised weights, drops out."""
    small, large = batches
    return (count(large) - count(small)) / (large - small)


def kept_bytes(case: str, T: int) -> float:
    """Bytes per image from forward to backward of a real step, which the guard may refuse."""
    strategy, options, _ = CASES[case]
    net = use_strategy(network(T, **options), strategy)

    def held(batch: int) -> float:
        with watch_saved(net) as saved:
            value = loss(net, images(T, batch))
        del value
        return saved.total

    return per_image(held)


def kept(quick: bool) -> dict[str, Any]:
    """Kept bytes per image by case and T, on paper too; slopes are those between the two largest T that ran."""
    lengths, table, refused = LENGTHS[:2] if quick else LENGTHS, {}, {}
    print("  kept bytes per image: measured (on paper, without image, stem and head), and slope per step")
    for case, (_, _, (kind, every)) in CASES.items():
        row: dict[int, dict[str, float]] = {}
        for T in lengths:
            try:
                row[T] = {"measured": kept_bytes(case, T), "paper": MINI.at(T).kept(kind, every)}
            except StrategyError as error:
                refused[f"{case}, T={T}"] = str(error)
        (t, low), (u, high) = list(row.items())[-2:]
        slopes = {k: (high[k] - low[k]) / (u - t) for k in low}
        table[case] = {"bytes": row, "slope": slopes, "slope_between": (t, u)}
        cells = "  ".join(f"{T}: {r['measured']:,.0f} ({r['paper']:,.0f})" for T, r in row.items())
        print(f"    {case:<32} {cells}  slope {slopes['measured']:,.0f} ({slopes['paper']:,.0f})", flush=True)
    for name, message in refused.items():
        print(f"    refused: {name}: {message}")
    bound = {a: MINI.information(a) for a in (0.5, START, 0.9, 1.0)}
    print(f"  bytes per step that an inverse has to lose, or keep: { {a: round(n) for a, n in bound.items()} }")
    image = 4 * 3 * 32 * 32
    beside = {c: r["bytes"][4]["measured"] - r["bytes"][4]["paper"] for c, r in table.items()}
    print(f"  beside the states and graphs: {beside} (the image {image}, the rest is head and loss)")
    return {"cases": table, "refused": refused, "information_bound": bound, "beside": beside, "image": image}


def predictions() -> dict[str, Any]:
    """Bytes of fake tensors per image: of mini as a check of the kept ones, of tiny at 224 as one of the paper."""
    made: dict[str, Any] = {}
    chosen = {k: v for k, v in CASES.items() if k in ("bptt", "step_checkpoint", "spike_bits", "reversible")}
    for case, (strategy, options, (kind, every)) in chosen.items():
        # with weights: a network of this kind cannot be made without memory
        tiny = Target("trevsnn_tiny", options | {"auxiliary": False}, strategy, timesteps=4).build()
        found = {b: predicted_bytes(tiny, images(4, b, side=224), torch.zeros(b, dtype=torch.int64)) for b in (1, 2)}
        net = use_strategy(network(4, **options), strategy)
        made[case] = {
            "tiny kept": per_image(lambda b, f=found: f[b].saved.total, (1, 2)),
            "tiny kept on paper": PUBLISHED["tiny, T=4"].kept(kind, every),
            "tiny peak, batch 1": found[1].peak,
            "tiny peak per image": per_image(lambda b, f=found: f[b].peak, (1, 2)),
            "mini kept": per_image(lambda b, n=net: saved_bytes(n, images(4, b)).total),
        }
        print(f"    predicted {case:<16} { {k: round(v / 1e6, 3) for k, v in made[case].items()} } MB", flush=True)
    return made


def on_paper(layouts: dict[str, Layout]) -> dict[str, Any]:
    made = {name: layout.table() for name, layout in layouts.items()}
    print("    " + " " * 24 + "".join(f"{name:>18}" for name in made))
    for row in next(iter(made.values())):
        print(f"    {row:<24}" + "".join(f"{table[row]:>18,.2f}".replace(".00", "") for table in made.values()))
    return made


def cases(quick: bool) -> dict[str, Any]:
    """Those that are timed."""
    return {k: CASES[k] for k in CASES if not quick or k in ("bptt", "step_checkpoint", "spike_bits", "reversible")}


def peaks(quick: bool) -> dict[str, Any]:
    """Peak bytes per image of fresh processes."""
    batch, table, unmeasured = 8 if quick else 32, {}, {}
    for case, (strategy, options, _) in cases(quick).items():
        row: dict[int, float] = {}
        for T in LENGTHS[:1] if quick else LENGTHS:
            target = Target("trevsnn_mini", options | {"auxiliary": False}, strategy, timesteps=T, batch=batch)
            try:
                row[T] = measured_peak_bytes(target) / batch
            except SpikefitError as error:
                unmeasured[f"peak of {case}, T={T}"] = str(error)
        table[case] = row
        print(f"    {case:<32} " + "  ".join(f"T={T}: {n:,.0f}" for T, n in row.items()), flush=True)
    for name, why in unmeasured.items():
        print(f"    {name}: {why}")
    return {"batch": batch, "bytes_per_image": table, "unmeasured": unmeasured}


def times(quick: bool) -> dict[str, list[float]]:
    """Seconds of training steps, at every T all cases in turns in one process."""
    batch, seconds = 8 if quick else 32, {}
    for T in (4,) if quick else (4, 8):
        nets, x = {c: use_strategy(network(T, **o), s) for c, (s, o, _) in cases(quick).items()}, images(T, batch)

        def step(net: Any, x: torch.Tensor = x) -> None:
            net.zero_grad(set_to_none=True)
            loss(net, x).backward()

        found = interleave({c: lambda n=net: step(n) for c, net in nets.items()}, rounds=2 if quick else 5)
        seconds |= {f"T={T} {case}": values for case, values in found.items()}
    return seconds


def peaks_and_times(quick: bool) -> dict[str, Any]:
    print("  peak bytes per image")
    memory, seconds = peaks(quick), times(quick)
    lengths = sorted({name.split()[0] for name in seconds})
    return memory | {
        "seconds": seconds,
        "images_per_second": {name: memory["batch"] / median(values) for name, values in seconds.items()},
        "ratios": {
            f"step, {T}: {case} / bptt": ratio(seconds, f"{T} {case}", f"{T} bptt")
            for T in lengths
            for case in list(cases(quick))[1:]
        },
    }


def opened(out: str | None, quick: bool) -> dict[str, Any]:
    """The record to go on with."""
    record = describe("trevsnn") | {"quick": quick, "parts": {}}
    if out is not None and Path(out).exists():
        known = json.loads(Path(out).read_text())
        if known.get("quick") is not quick:
            raise SystemExit(f"trevsnn: {out} holds a run with quick={known.get('quick')}; give another --out.")
        record["parts"] = known["parts"]
    return record


def save(record: dict[str, Any], out: str | None) -> None:
    """Write the record in one go: a run that is stopped leaves a whole file."""
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(draft, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small T, batch 8, 2 runs of d, 32 images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", help="which to run; all if left out, with --quick all but f")
    parser.add_argument(
        "--runs", type=int, nargs=2, default=(0, 20), help="first seed of d, and the one behind the last"
    )
    parser.add_argument("--out", help="JSON file to write, or to go on with")
    parser.add_argument("--data", help="folder with CIFAR-10; $SPIKEFIT_DATA if left out")
    parser.add_argument("--weights", help="checkpoint of a trained trevsnn_mini, for e")
    args = parser.parse_args()
    chosen = set((args.parts or ("a,b,c,d,e" if args.quick else "a,b,c,d,e,f")).split(","))
    if not chosen <= set("abcdef"):
        parser.error(f"--parts: expected some of a,b,c,d,e,f, got {args.parts!r}")
    torch.set_num_threads(args.threads)
    record = opened(args.out, args.quick)
    parts = record["parts"]

    def done(part: str, found: dict[str, Any]) -> None:
        ran = {k: v for k, v in describe("trevsnn").items() if k in ("date", "commit", "threads")}
        # folders are of one machine
        ran["command"] = f"python benchmarks/trevsnn.py --parts {part} --threads {args.threads}"
        ran["command"] += " --quick" if args.quick else ""
        parts[part] = found | {"ran": ran}
        save(record, args.out)

    if "a" in chosen or parts.get("a", {}).get("ran", {}).get("commit") != record["commit"]:
        done("a", parity(args.quick))
    record["parity"] = parts["a"]["parity"]
    if not record["parity"]:
        print("trevsnn: RED, no numbers: gradients of a strategy and of bptt differ.")
        save(record, args.out)
        return 1
    if "b" in chosen:
        found = kept(args.quick)
        done("b", found | {"published": on_paper(PUBLISHED)})
    if "c" in chosen:
        done("c", peaks_and_times(args.quick))
    if "d" in chosen:
        found = parts.setdefault("d", {})
        seeds = range(args.runs[0], 2 if args.quick else args.runs[1])
        drift(found, lambda: save(record, args.out), lengths=LENGTHS[:2] if args.quick else LENGTHS, seeds=seeds)
        print_drift(found)
        done("d", found)
    if "e" in chosen:
        counts = published_counts()
        record["parity"] &= all(row["equal"] for row in counts.values())
        for name, row in counts.items():
            print(f"  {name}: {row}")
        try:
            done("e", {"published": counts} | energy(args.data, args.weights, quick=args.quick))
        except DataError as error:
            done("e", {"published": counts, "unmeasured": {"energy": str(error)}})
    if "f" in chosen:
        done("f", {"predicted": predictions()})
    finish(record, args.out)
    return 0 if record["parity"] else 1


def finish(record: dict[str, Any], out: str | None) -> None:
    """What the table of all benchmarks reads, gathered from the parts."""
    parts = record["parts"]
    record["seconds"] = parts.get("c", {}).get("seconds", {})
    record["ratios"], record["targets"] = dict(parts.get("c", {}).get("ratios", {})), {}
    if "b" in parts:
        slope = {case: row["slope"]["measured"] for case, row in parts["b"]["cases"].items()}
        goals = {"step_checkpoint": 4 * MINI.states, "spike_bits": MINI.states / 4, "reversible": 0}
        for case, goal in goals.items():
            name = f"kept per step: {case} / bptt"
            record["ratios"][name] = slope[case] / slope["bptt"]
            record["targets"][name] = f"{goal / slope['bptt']:.3f}"
    record["unmeasured"] = {}
    for part in parts.values():
        record["unmeasured"] |= part.get("unmeasured", {})
    write(record, None)
    save(record, out)


if __name__ == "__main__":
    sys.exit(main())
