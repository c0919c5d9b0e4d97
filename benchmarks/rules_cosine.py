"""How far the gradients of rules point where those of BPTT point, layer by layer, for `gradient_rules.py`."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rules_rows import ROWS, RULES, TWIN, Network, baseline, gradients, studied
from torch import Tensor

from spikefit.reporting.analyses import has_weights
from spikefit.reporting.measure import FirstBatch
from spikefit.reporting.study_file import Cell
from spikefit.training import train

# draws of the steps of sltt_k, of which means are told
DRAWS = 3
ATTACHED = "bptt, attached reset"
# what is compared with BPTT through the reset too; the forward, and so the gradient of sltt and ottt, is the same
BESIDE_ATTACHED = ("bptt", "sltt", "ottt")

Layers = dict[str, tuple[float, float]]


def cosine(study: str, folders: Sequence[Path], *, quick: bool) -> dict[str, Any]:
    """Rows of one study, with the weights a network starts with and those of a trained one.

    Raises:
        DataError: its data are not there.
    """
    cell = baseline(study, quick=quick)
    batch = FirstBatch(cell.recipe)
    found: dict[str, Any] = {"study": study, "settings": _settings(cell, batch)}
    found["initial"] = rows(studied(cell, batch))
    with trained(cell, folders) as (weights, how):
        found |= {"trained": rows(studied(cell, batch, weights)), "training": how}
    print(f"  {study}, {how}")
    for when in ("initial", "trained"):
        for row in found[when]:
            told = "  ".join(f"{c:5.2f} ({r:.2f})" for c, r in row["layers"].values())
            print(f"  {when:<8} {row['row']:<8} to {row['reference']:<24} {told}")
    return found


def rows(network: Network) -> list[dict[str, Any]]:
    """[{row, reference, layers: {layer: (cosine, ratio of norms)}}]; "all" is all weights of synapses together."""
    references = {row: gradients(network, row) for row in TWIN.values()}
    references[ATTACHED] = gradients(network, "bptt", detach_reset=False)
    made = []
    for row in RULES:
        draws = []
        for seed in range(DRAWS if row == "sltt_k" else 1):
            torch.manual_seed(seed)
            draws.append(gradients(network, row))
        reference = TWIN[ROWS[row]]
        made.append(
            {"row": row, "reference": reference, "layers": _mean([_layers(g, references[reference]) for g in draws])}
        )
        if row in BESIDE_ATTACHED:
            made.append({"row": row, "reference": ATTACHED, "layers": _layers(draws[0], references[ATTACHED])})
    made.append({"row": "bptt", "reference": ATTACHED, "layers": _layers(references["bptt"], references[ATTACHED])})
    return made


def _layers(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Layers:
    names = [name for name, w in wanted.items() if w.ndim > 1]
    pairs = {name: (got[name].double().flatten(), wanted[name].double().flatten()) for name in names}
    pairs["all"] = tuple(torch.cat(parts) for parts in zip(*pairs.values(), strict=True))  # type: ignore[assignment]
    return {name: (float(g @ w / (g.norm() * w.norm())), float(g.norm() / w.norm())) for name, (g, w) in pairs.items()}


def _mean(draws: Sequence[Layers]) -> Layers:
    return {name: (fmean(d[name][0] for d in draws), fmean(d[name][1] for d in draws)) for name in draws[0]}


def _settings(cell: Cell, batch: FirstBatch) -> dict[str, Any]:
    recipe = cell.recipe
    return {
        "model": recipe.model.name,
        "timesteps": batch.x.shape[0],
        "batch": batch.x.shape[1],
        "tau": recipe.neuron.options()["tau"],
        "norm": recipe.norm.name,
        "reset": "soft, detached",
        "seed": cell.seed,
    }


@contextmanager
def trained(cell: Cell, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """A folder with weights trained by bptt, and how: those that a study kept, or else of one epoch, made here."""
    kept = [folder / "weights" / cell.key for folder in folders if has_weights(folder / "weights" / cell.key)]
    if kept:
        yield kept[0], "weights of the study"
        return
    recipe = cell.recipe.override({"train.epochs": 1, "train.warmup_epochs": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        record = train(recipe, out=folder)
        yield Path(folder), f"one epoch of bptt, seed {cell.seed}, test accuracy {100 * record.accuracy:.2f} %"
