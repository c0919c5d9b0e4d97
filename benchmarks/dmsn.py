"""One-step window networks: memory by strategy, and accuracy, spike rate and energy of trained ones.

    SPIKEFIT_DATA=FOLDER python benchmarks/dmsn.py [--quick] [--threads 2] [--checkpoints NAME=FOLDER ...] [--out FILE]

Memory: bytes kept for backward, and predicted and measured peak of a training step, of the networks of full width.
Printed only if the gradients of every strategy are those of `bptt` to the bit, on small networks.

Checkpoints: folders that `spikefit train --out` wrote. Test accuracy under five seeds of the draws, mean spike rate,
energy of one inference in two accountings on 256 test images in evaluation, and the time of one image.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from harness import describe, write

from spikefit.data import load_dataset
from spikefit.models import create_model, use_strategy
from spikefit.planning import profile
from spikefit.planning.counting import counted_run
from spikefit.planning.energy import energy_report
from spikefit.training import evaluate
from spikefit.training.build import build_encoding
from spikefit.training.checkpoint import load_checkpoint
from spikefit.training.evaluation import restored
from spikefit.training.recipe import load_recipe

NETWORKS = ("dmsn_cnn12", "dmsn_lstm12")
STRATEGIES = ("bptt", "lean", "checkpoint:1", "checkpoint")
BATCH, SAMPLES, DRAWS = 32, 256, 5
MIB = 1 << 20


def disagreement() -> str | None:
    """The first strategy whose gradients are not those of bptt to the bit, or None."""
    x = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in NETWORKS:
        torch.manual_seed(0)
        model = create_model(name, width=1 / 6, coding="bernoulli_ste")
        torch.nn.init.normal_(model.blocks[-1].linear.weight)
        wanted: list[torch.Tensor] = []
        for strategy in STRATEGIES:
            use_strategy(model, strategy)
            torch.manual_seed(1)
            found = list(torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters())))
            wanted = wanted or found
            if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                return f"{name}, {strategy}"
    return None


def memory(quick: bool) -> list[dict[str, Any]]:
    """Rows of kept bytes and peaks, per network and strategy."""
    rows = []
    for name in NETWORKS:
        for strategy in STRATEGIES:
            options = {"width": 1 / 6} if quick else {}
            found = profile(name, strategy=strategy, timesteps=1, batch=BATCH, repeats=1, **options)
            rows.append({
                "network": name,
                "strategy": strategy,
                "batch": BATCH,
                "saved_bytes": found.saved_bytes,
                "predicted_peak_bytes": found.predicted_peak_bytes,
                "measured_peak_bytes": found.measured_peak_bytes,
                "prediction": found.settings["prediction"],
            })  # fmt: skip
            row = rows[-1]
            print(
                f"  {name:<12} {strategy:<13} kept {row['saved_bytes'] / MIB:7.1f} MiB, peak predicted "
                f"{row['predicted_peak_bytes'] / MIB:7.1f}, measured {row['measured_peak_bytes'] / MIB:7.1f}"
            )
    return rows


def trained(label: str, folder: str) -> dict[str, Any]:
    """Accuracy, rate and energy of a trained network."""
    found = load_checkpoint(folder)
    recipe = load_recipe(found.state["recipe"])
    accuracies = [evaluate(folder, recipe.override({"seed": seed}))["accuracy"] for seed in range(DRAWS)]
    options = {k: v for k, v in (recipe.data.model_extra or {}).items() if k != "limit"}
    dataset = load_dataset(recipe.data.name, recipe.data.root, "test", limit=SAMPLES, **options)
    _, model = restored("benchmark", found, recipe, dataset)
    images, _ = dataset.batch(list(range(SAMPLES)))
    x = build_encoding(recipe)(images, torch.Generator())
    torch.manual_seed(0)
    counted, rates = counted_run(model, x, False)
    energy = energy_report(list(counted.values()), firing=list(rates.values()))
    row = {
        "network": label,
        "accuracy": statistics.mean(accuracies),
        "accuracy_sd_over_draws": statistics.stdev(accuracies),
        "rates": rates,
        "rate": statistics.mean(rates.values()) if rates else None,
        "energy": {k: v for k, v in energy.items() if k != "assumptions"},
        "seconds_per_image": _latency(model, x[:, :1]),
    }
    published = energy["published"]
    print(
        f"  {label}: {100 * row['accuracy']:.2f} +- {100 * row['accuracy_sd_over_draws']:.2f} % over {DRAWS} draws, "
        f"rate {row['rate']}, strict {energy['snn_pj'] / 1e6:.2f} uJ of {energy['ann_pj'] / 1e6:.2f} "
        f"({energy['ratio']:.2f}x), as published {published}, one image {1e3 * row['seconds_per_image']:.1f} ms"
    )
    return row


@torch.no_grad()
def _latency(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Median seconds of one inference."""
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="networks of a sixth of the width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    record = describe("dmsn")
    wrong = disagreement()
    if wrong is not None:
        print(f"dmsn: gradients of {wrong} are not those of bptt; nothing is measured.")
        write(record | {"parity": False, "disagreement": wrong}, args.out)
        return 1
    print("dmsn: gradients of all strategies are those of bptt to the bit")
    record |= {"parity": True, "memory": memory(args.quick)}
    record["trained"] = [trained(*pair.split("=", 1)) for pair in args.checkpoints]
    write(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
