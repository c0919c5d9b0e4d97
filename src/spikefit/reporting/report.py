"""The report of `compare`: one HTML file with figures, tables and everything needed to repeat the run."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from spikefit.errors import OptionError
from spikefit.planning.energy import counts_analog_as_spikes
from spikefit.reporting import figures
from spikefit.reporting.page import Section, html_details, html_facts, html_table, render
from spikefit.reporting.table import HEADER, bptt_row, caption, cells, conditions
from spikefit.reporting.units import error, mib, microjoules, percent, ratio, significant
from spikefit.training.files import write_text

Row = dict[str, Any]


def write_report(path: str | Path, report: dict[str, Any]) -> Path:
    """Write one self-contained HTML file that opens offline and asks the network for nothing.

    Args:
        path: the file, replaced as a whole.
        report: "rows" (what `compare` returns; figures without numbers are left out and named), and optionally
            "title", "command", "recipe" and "environment", shown as settings.

    Returns:
        the path.

    Raises:
        OptionError: no rows, a row without a strategy, or a place that cannot be written.
        ValueError: a number that is not finite.

    Example:
        write_report("report.html", {"title": "demo", "rows": compare("recipes/demo.toml")})
    """
    rows = report.get("rows") or []
    if not rows or any("strategy" not in row or "exact" not in row for row in rows):
        raise OptionError("write_report: expected report['rows'] as spikefit.compare returns them, at least one row.")
    title = str(report.get("title") or "What each strategy costs")
    sections = [_results(rows), *_figures(rows), _settings(report, rows)]
    return write_text(path, render(title, _headline(rows), sections))


def _results(rows: Sequence[Row]) -> Section:
    note = (
        "Accuracy and loss are those of the test data after training. Peak: memory of one training step above the "
        "level before it, in a process of its own. Saved: bytes held between forward and backward, each storage once. "
        "Step: forward, loss and backward on one batch, median of rounds that take turns. Max gradient error: largest "
        "relative difference to plain bptt of any parameter's gradient, first batch, same weights."
    )
    return Section("Results", caption(rows), html=html_table(HEADER, cells(rows), text=2) + _note(note))


def _figures(rows: Sequence[Row]) -> list[Section]:
    at = conditions(rows[0])
    at = f" At {at}." if at else ""
    made = [
        Section(
            "Memory and time per strategy",
            f"Lower is better; the forward, and so every spike, is the same for all exact strategies.{at}",
            figures.memory_per_strategy(rows),
        ),
        Section(
            "Memory by layer and category",
            "What each layer holds between forward and backward; all strategies on one scale, one colour per "
            "category. A segment is the input of a run of layers that backward runs again; what only that second run "
            f"holds counts in the peak.{at}",
            figures.memory_by_layer(rows),
            _layer_tables(rows),
        ),
        Section(
            "Memory against time steps",
            "The slope is what one more time step costs. Counted and predicted, nothing is allocated for it.",
            figures.memory_against_timesteps(rows),
        ),
        Section(
            "Learning curves",
            "All strategies start from the same weights and see the same batches; curves of exact strategies lie on "
            "top of each other, up to rounding.",
            figures.learning_curves(rows),
        ),
        Section(
            "Spike rate per layer",
            "Share of neurons that fire in a step, mean over test samples and steps, after training.",
            figures.spike_rates(rows),
        ),
        Section(
            "Energy per layer",
            "An estimate from counted operations, not a measurement; see the assumptions.",
            figures.energy_per_layer(rows),
            _energy_assumptions(rows),
        ),
    ]
    missing = [section.title.lower() for section in made if not section.plots]
    made = [section for section in made if section.plots]
    if missing:
        made.append(Section("Not in this report", f"No numbers were given for: {', '.join(missing)}."))
    return made


def _settings(report: dict[str, Any], rows: Sequence[Row]) -> Section:
    settings = rows[0].get("settings") or {}
    recipe = report.get("recipe") or {}
    environment = report.get("environment") or {}
    facts = {
        "time steps T": settings.get("timesteps"),
        "batch": settings.get("batch"),
        "reset": settings.get("reset"),
        "dtype": settings.get("dtype"),
        "device": settings.get("device"),
        "parameters": f"{rows[0]['parameters']:,}" if rows[0].get("parameters") else None,
        **{str(name): value for name, value in environment.items() if not isinstance(value, dict | list)},
    }
    command = report.get("command")
    html = html_facts(facts)
    if command:
        html += f"<p class='note'>Command</p><pre>{escape(str(command))}</pre>"
    if recipe:
        html += html_details("Full recipe", f"<pre>{escape(recipe_text(recipe))}</pre>")
    return Section("Settings", html=html)


def recipe_text(recipe: dict[str, Any]) -> str:
    """A recipe as readable lines, one per section."""
    return "\n".join(f"{name} = {json.dumps(value, default=str)}" for name, value in recipe.items())


def _headline(rows: Sequence[Row]) -> str:
    """The result in one or two sentences."""
    base = bptt_row(rows)
    parts = []
    for row in rows if base else []:
        if row is base or base is None:
            continue
        shares = [
            f"{ratio(row.get(key), base.get(key))} the {what}"
            for key, what in (
                ("saved_bytes", "saved memory"),
                ("peak_bytes", "peak memory"),
                ("step_seconds", "step time"),
            )
            if ratio(row.get(key), base.get(key))
        ]
        if shares:
            kind = "exact" if row["exact"] else "approximate"
            gradient = row.get("max_gradient_error")
            tail = f", max gradient error {error(gradient)}" if gradient is not None else ""
            parts.append(f"{row['strategy']} ({kind}{tail}) needs {', '.join(shares)} of bptt.")
    accuracies = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
    if accuracies:
        low, high = percent(min(accuracies)), percent(max(accuracies))
        parts.append(f"Test accuracy {high} %." if low == high else f"Test accuracy {low} to {high} %.")
    return " ".join(parts)


def _layer_tables(rows: Sequence[Row]) -> str:
    header = ("layer", "kind", "parameters", "saved MiB", "spike rate %", "MACs", "SynOps", "energy µJ")
    html = ""
    for row in rows:
        body = [
            (
                str(layer["name"]),
                str(layer.get("kind", "")),
                f"{layer.get('parameters') or 0:,}",
                mib(sum((layer.get("saved_bytes") or {}).values())),
                percent(layer.get("spike_rate")),
                _count(layer.get("macs")),
                _count(layer.get("synops")),
                microjoules(layer.get("energy_pj")),
            )
            for layer in row.get("layers") or []
        ]
        if body:
            html += html_details(f"Layers under {row['strategy']}, in numbers", html_table(header, body, text=2))
    return html


def _energy_assumptions(rows: Sequence[Row]) -> str:
    energy: dict[str, Any] = next((row["energy"] for row in rows if row.get("energy")), {})
    assumptions = energy.get("assumptions") or []
    if energy.get("snn_pj") and energy.get("ann_pj"):
        snn, ann = energy["snn_pj"], energy["ann_pj"]
        told = f"In all {microjoules(snn)} µJ; the same network without spikes {microjoules(ann)} µJ ({ann / snn:.2f}x)"
        if counts_analog_as_spikes(energy):
            told += (
                f"; with accumulates only behind the first layer {microjoules(energy['all_spiking_pj'])} µJ, at a "
                f"firing rate of {percent(energy['all_spiking_rate'])} %"
            )
        assumptions = [f"{told} (strict).", *_published(energy), *assumptions]
    items = "".join(f"<li>{escape(str(line))}</li>" for line in assumptions)
    return f"<ul>{items}</ul>" if items else ""


def _published(energy: dict[str, Any]) -> list[str]:
    """The sentence on the published accounting; none for files that have no such numbers."""
    published = energy.get("published") or {}
    if published.get("snn_pj") is None:
        return []
    snn, ann = published["snn_pj"], published["ann_pj"]
    return [
        f"As published, which flatters the spiking network: {microjoules(snn)} µJ at a firing rate of "
        f"{percent(published['rate'])} %; the same network without spikes {microjoules(ann)} µJ ({ratio(ann, snn)})."
    ]


def _note(text: str) -> str:
    return f'<p class="note" style="margin-top:.75rem">{escape(text)}</p>'


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else significant(value)
