"""Studies that train nothing: bytes of membranes by variant and strategy, once by formula and once counted."""

from collections.abc import Sequence
from html import escape
from textwrap import fill
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from spikefit.errors import OptionError
from spikefit.models import SpikingNetwork
from spikefit.ops.dispatch import use_backend
from spikefit.planning import predicted_bytes, profile
from spikefit.reporting.measure import settings_of
from spikefit.reporting.page import Section, html_details, html_table, render
from spikefit.reporting.study_file import Cell
from spikefit.reporting.table import as_text, conditions, grid
from spikefit.training import Recipe, build_step

Row = dict[str, Any]
# title, note, header, body
TextTable = tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]

# bptt stores membranes, the others rebuild them
STRATEGIES = ("bptt", "replay", "inverse", "integer")
# Binary places of the grid on which `integer` is counted, for a neuron that has none.
FRAC_BITS = 16
MB = 1e6


def check_membranes(recipe: Recipe) -> None:
    """Make the step of a recipe from shapes and drop it, so that what cannot work is told before anything is counted.

    Raises:
        OptionError: the model is no `SpikingNetwork`; and as `spikefit.training.build_step`.
    """
    _step(recipe)


def measure_membranes(recipe: Recipe) -> dict[str, Any]:
    """Bytes of the membranes of one training step of `recipe`, from shapes alone.

    Returns:
        lif_forward_bytes, and by strategy lif_backward_kept_bytes and lif_backward_peak_bytes: the formulas of
        `spikefit.profile`.
        state_bytes: of the tensors of `model.init_state(batch)`; None for a network that consumes time, whose state is
            a window of its input.
        lif_backward_saved_bytes: by strategy, what saved-tensor hooks see in a step: for bptt what the plain torch
            equation keeps inside neurons, for the others packed spikes, kept membranes and digits. integer is counted
            on a grid of `FRAC_BITS` places if the neuron has none.
        step_saved_bytes, step_predicted_peak_bytes: by strategy, of the whole step with weights, norms and all.
        share, timesteps, batch.
        None stands where a strategy does not apply.

    Raises:
        SpikefitError: as `check_membranes`.
    """
    step = _step(recipe)
    model, (timesteps, batch) = step.model, step.x.shape[:2]
    state = model.init_state(batch, tuple(step.x.shape[2:]), device="cpu")
    plain = profile(step, predict_only=True)
    # (kept by membranes, held by the step, its peak)
    counted = {"bptt": (_saved(plain.categories, "bptt"), plain.saved_bytes, plain.predicted_peak_bytes)}
    for name in STRATEGIES[1:]:
        if plain.lif_backward_kept_bytes[name] is not None:
            counted |= _counted(recipe, name)
    saved, held, peak = ({s: counted[s][i] if s in counted else None for s in STRATEGIES} for i in range(3))
    return {
        "lif_forward_bytes": plain.lif_forward_bytes,
        "state_bytes": None if model.timesteps is not None else _bytes(state),
        "lif_backward_kept_bytes": _of(counted, plain.lif_backward_kept_bytes),
        "lif_backward_peak_bytes": _of(counted, plain.lif_backward_peak_bytes),
        "lif_backward_saved_bytes": saved,
        "step_saved_bytes": held,
        "step_predicted_peak_bytes": peak,
        "share": model.share,
        "timesteps": timesteps,
        "batch": batch,
    }


def _step(recipe: Recipe, **changes: Any) -> Any:
    # the plain equation, so that what autograd keeps inside a neuron is what the equation needs
    step = build_step(recipe.override({"strategy": "bptt", "backend": "reference", **changes}), shapes_only=True)
    if not isinstance(step.model, SpikingNetwork):
        raise OptionError(
            f"membranes of {recipe.model.name}: expected a SpikingNetwork, got {type(step.model).__name__}; build it "
            "from spikefit.SpikingNetwork([...]), or train = true."
        )
    return step


def _counted(recipe: Recipe, strategy: str) -> dict[str, tuple[int, int, int]]:
    """{strategy: bytes kept by membranes, held by the step, and its peak}; empty where there is no such grid."""
    on_grid = strategy == "integer" and recipe.neuron.frac_bits is None
    try:
        step = _step(recipe, strategy=strategy, **({"neuron.frac_bits": FRAC_BITS} if on_grid else {}))
    except OptionError:
        if on_grid:
            return {}
        raise
    with use_backend(step.backend):
        found = predicted_bytes(
            step.model.train(), step.x, step.y, loss=step.loss, autocast=step.autocast, device=step.device
        )
    kept = {f"kept: {name}": count for name, count in found.saved.categories().items()}
    return {strategy: (_saved(kept, strategy), found.saved.total, found.peak)}


def _of(counted: dict[str, Any], formula: dict[str, int | None]) -> dict[str, int | None]:
    """What the formula says of strategies that can run."""
    return {name: formula[name] if name in counted else None for name in STRATEGIES}


def _bytes(state: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tree_leaves(state) if isinstance(t, Tensor))


def _saved(categories: dict[str, int], strategy: str) -> int:
    """What of the categories of a profile belongs to membranes."""
    names = ("neuron input",) if strategy == "bptt" else ("packed spikes", "membranes")
    return sum(categories.get(f"kept: {name}", 0) for name in names)


def membrane_rows(cells: Sequence[Cell], results: dict[str, dict[str, Any]]) -> list[Row]:
    """One row per variant and data row, in the order of the cells.

    Returns:
        what `measure_membranes` gives, and data, variant, settings, cells; ratios: {"baseline": the first variant of
        the same data row that shares nothing, "forward", "kept" and "peak" by strategy}, how many times less than that
        variant under bptt; None without such a variant.
    """
    rows: list[Row] = []
    for cell in cells:
        result = results[cell.key]
        settings = settings_of(cell.recipe, timesteps=result["timesteps"], device="")
        rows.append({"data": cell.data, "variant": cell.variant, **result, "settings": settings, "cells": [cell.key]})
    for row in rows:
        base = next((r for r in rows if r["data"] == row["data"] and r["share"] == "none"), None)
        row["ratios"] = None if base is None else _ratios(row, base)
    return rows


def _ratios(row: Row, base: Row) -> dict[str, Any]:
    stored = base["lif_backward_kept_bytes"]["bptt"]

    def times_less(key: str) -> dict[str, float | None]:
        return {name: stored / row[key][name] if row[key][name] else None for name in STRATEGIES}

    return {
        "baseline": base["variant"],
        "forward": base["lif_forward_bytes"] / row["lif_forward_bytes"],
        "kept": times_less("lif_backward_kept_bytes"),
        "peak": times_less("lif_backward_peak_bytes"),
    }


def membrane_tables(rows: Sequence[Row]) -> list[TextTable]:
    """The tables of such a study: forward, kept, peak, ratios, and the whole step."""
    names = [s for s in STRATEGIES if any(row["lif_backward_kept_bytes"][s] is not None for row in rows)]
    where = ("data", "variant")

    def body(keys: Sequence[str], by_key: bool = False) -> list[tuple[str, ...]]:
        order = [(key, s) for key in keys for s in names] if by_key else [(key, s) for s in names for key in keys]
        return [(*_place(row), *(_mb(row[key][s]) for key, s in order)) for row in rows]

    return [
        _forward_table(rows),
        (
            "Membranes kept for backward [MB]",
            "By strategy, what neurons keep between forward and backward, packed spikes included: by formula, and "
            "counted by saved-tensor hooks in a training step on tensors without values, for bptt what the plain torch "
            "equation keeps inside neurons (u - threshold of every call; with a hard reset the spike too). integer is "
            "counted on a grid, frac_bits = 16 where the neuron names none.",
            (*where, *(text for s in names for text in (s, "counted"))),
            body(["lif_backward_kept_bytes", "lif_backward_saved_bytes"]),
        ),
        (
            "Membranes at the peak of backward [MB]",
            "What is kept and, beside it, what the membrane that takes most is rebuilt into; by formula.",
            (*where, *names),
            body(["lif_backward_peak_bytes"]),
        ),
        *_ratio_tables(rows, names),
        (
            "The whole training step [MB]",
            "What membranes are a part of, counted: all that is held between forward and backward, and then the "
            "predicted peak, with the plain torch equation; weights, their gradients and the input apart.",
            (*where, *names, *(f"{s} peak" for s in names)),
            body(["step_saved_bytes", "step_predicted_peak_bytes"], by_key=True),
        ),
    ]


def _forward_table(rows: Sequence[Row]) -> TextTable:
    body: list[tuple[str, ...]] = [
        (
            *_place(row),
            _mb(row["lif_forward_bytes"]),
            _mb(row["state_bytes"]),
            _times(row["ratios"] and row["ratios"]["forward"], 3),
        )
        for row in rows
    ]
    note = "All membranes at one moment: by formula, and counted in the tensors of init_state."
    return "Membranes in forward [MB]", note, ("data", "variant", "forward", "counted", "times less"), body


def _ratio_tables(rows: Sequence[Row], names: Sequence[str]) -> list[TextTable]:
    """How many times less than the unshared network that stores: nothing where no variant is unshared."""
    body = [
        (
            *_place(row),
            *(_times(row["ratios"]["kept"][s]) for s in names),
            *(_times(row["ratios"]["peak"][s]) for s in names[1:]),
        )
        for row in rows
        if row["ratios"]
    ]
    if not body:
        return []
    bases = sorted({row["ratios"]["baseline"] for row in rows if row["ratios"]})
    return [
        (
            "Membranes in backward: times less than unshared and stored",
            f"What {' / '.join(bases)} keeps under bptt, divided by what the variant keeps, and then by its peak. Down "
            "a column it is sharing that saves; along a row it is rebuilding: bptt stores, the others rebuild.",
            ("data", "variant", *names, *(f"{s} peak" for s in names[1:])),
            body,
        )
    ]


def membrane_caption(rows: Sequence[Row]) -> str:
    """The unit, and the settings all rows share."""
    shared = {conditions(row) for row in rows}
    at = f" At {shared.pop()}." if len(shared) == 1 and shared != {""} else ""
    return f"MB = 10^6 bytes; – where a strategy does not apply. Nothing was trained.{at}"


def membrane_text(name: str, rows: Sequence[Row], width: int = 200) -> str:
    """The tables as plain text."""
    parts = [
        f"{title}\n{as_text(grid(header, body, text=2), width)}\n{fill(note, 120)}\n"
        for title, note, header, body in membrane_tables(rows)
    ]
    return f"{name}\n{membrane_caption(rows)}\n\n" + "\n".join(parts)


def membrane_page(name: str, rows: Sequence[Row], source: str) -> str:
    """The page as one string of HTML; `source` is the text of the study file."""
    sections = [
        Section(title, note, html=html_table(header, body, text=2))
        for title, note, header, body in membrane_tables(rows)
    ]
    file = html_details("Study file", f"<pre>{escape(source)}</pre>")
    return render(name, membrane_caption(rows), [*sections, Section("Settings", html=file)])


def _place(row: Row) -> tuple[str, str]:
    return row["data"], row["variant"]


def _mb(count: int | None) -> str:
    """Three decimals, as tables of such bytes are printed."""
    return "–" if count is None else f"{count / MB:,.3f}"


def _times(ratio: float | None, decimals: int = 2) -> str:
    return "–" if ratio is None else f"{ratio:.{decimals}f}"
