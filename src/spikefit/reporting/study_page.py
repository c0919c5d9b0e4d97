"""The table and the page of a study."""

from collections.abc import Sequence
from html import escape
from typing import Any

from spikefit.reporting.analyses_page import spike_rate_section
from spikefit.reporting.page import Section, html_details, html_facts, html_table, render
from spikefit.reporting.plots import COLOURS, Plot, lines, plot
from spikefit.reporting.table import as_text, conditions, grid
from spikefit.reporting.units import MIB, significant

Row = dict[str, Any]

# key of a row, its column, factor to the unit of the column
COLUMNS = (
    ("accuracy", "accuracy %", 100.0),
    ("loss", "loss", 1.0),
    ("step_seconds", "step ms", 1e3),
    ("saved_bytes", "saved MiB", 1 / MIB),
    ("peak_bytes", "peak MiB", 1 / MIB),
    ("predicted_peak_bytes", "predicted peak MiB", 1 / MIB),
)


def study_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, body) of the table: mean ± sample standard deviation over n seeds; unmeasured columns are left out."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    body = [
        (row["data"], row["variant"], str(row["n"]), *(_with_spread(row, key, scale) for key, _, scale in columns))
        for row in rows
    ]
    return ("data", "variant", "n", *(name for _, name, _ in columns)), body


def study_text(name: str, rows: Sequence[Row], width: int = 200) -> str:
    """The table of a study as plain text."""
    header, body = study_cells(rows)
    return f"{name}\n{as_text(grid(header, body, text=2), width)}\n{study_caption(rows)}\n"


def study_caption(rows: Sequence[Row]) -> str:
    """What ± means, and the settings all rows share."""
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    shared = {conditions(row) for row in rows}
    at = f" At {shared.pop()}." if len(shared) == 1 and shared != {""} else ""
    return f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.{at}"


def study_page(
    name: str,
    rows: Sequence[Row],
    environments: Sequence[dict[str, Any]],
    source: str,
    analyses: Sequence[Section] = (),
) -> str:
    """The page of a study as one string of HTML.

    Args:
        name: heading.
        rows: what `study` returns.
        environments: where the runs were made; different ones are all listed.
        source: text of the study file.
        analyses: further sections.
    """
    header, body = study_cells(rows)
    several = len({row["data"] for row in rows}) > 1
    names = [f"{row['data']}: {row['variant']}" if several else row["variant"] for row in rows]
    curves = [
        [(e["epoch"], 100 * e["test_accuracy"]) for e in row["history"] if e.get("test_accuracy") is not None]
        for row in rows
    ]
    sections = [
        Section("Results", study_caption(rows), html=html_table(header, body, text=2)),
        Section(
            "Accuracy per variant",
            "Filled: mean, with one sample standard deviation to both sides. Hollow: single seeds.",
            _accuracy(rows, names),
        ),
        Section(
            "Learning curves",
            "Test accuracy after every epoch, mean over seeds.",
            lines(names, curves, "Test accuracy", x="epoch", y="correct [%]", unit=" %", zero=False, coincide=False),
        ),
        spike_rate_section(rows, names),
        *analyses,
        Section("Settings", html=_settings(environments, source)),
    ]
    runs = sum(row["n"] for row in rows)
    return render(name, f"{runs} training runs, {len(rows)} rows.", [s for s in sections if s.plots or s.html])


def _settings(environments: Sequence[dict[str, Any]], source: str) -> str:
    """Where the runs were made, each place once, and the study file."""
    places: list[dict[str, Any]] = []
    for environment in environments:
        plain = {str(k): v for k, v in environment.items() if not isinstance(v, dict | list)}
        if plain not in places:
            places.append(plain)
    return "".join(map(html_facts, places)) + html_details("Study file", f"<pre>{escape(source)}</pre>")


def _accuracy(rows: Sequence[Row], names: Sequence[str]) -> list[Plot]:
    """Mean, spread and single seeds of the test accuracy [%], a line per row."""
    kept = [(name, row) for name, row in zip(names, rows, strict=True) if row["accuracy"] is not None]
    if not kept:
        return []
    seeds = {
        "type": "scatter",
        "mode": "markers",
        "name": "single seeds",
        "x": [100 * value for _, row in kept for value in row["accuracy_values"]],
        "y": [name for name, row in kept for _ in row["accuracy_values"]],
        "marker": {"symbol": "circle-open", "size": 8, "color": COLOURS[1], "line": {"width": 1.5}},
        "hovertemplate": "%{y}: %{x:.2f} %<extra></extra>",
    }
    mean = {
        "type": "scatter",
        "mode": "markers",
        "name": "mean ± spread",
        "x": [100 * row["accuracy"] for _, row in kept],
        "y": [name for name, _ in kept],
        "error_x": {"type": "data", "array": [100 * (row["accuracy_spread"] or 0) for _, row in kept], "thickness": 2},
        "marker": {"size": 10, "color": COLOURS[0]},
        "hovertemplate": "%{y}: %{x:.2f} %<extra></extra>",
    }
    layout = {"yaxis": {"autorange": "reversed", "type": "category"}, "showlegend": True}
    return [plot([mean, seeds], "Test accuracy", x="correct [%]", height=150 + 34 * len(kept), layout=layout)]


def _with_spread(row: Row, key: str, scale: float) -> str:
    value, spread = row.get(key), row.get(f"{key}_spread")
    if value is None:
        return "–"
    text = f"{scale * value:.2f}" if key == "accuracy" else significant(scale * value)
    if spread is None:
        return text
    return f"{text} ± {scale * spread:.2f}" if key == "accuracy" else f"{text} ± {significant(scale * spread, 2)}"
