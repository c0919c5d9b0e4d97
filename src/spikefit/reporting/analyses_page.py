"""Tables and figures of what studies ask of trained weights, and of their spike rates."""

import statistics
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from spikefit.reporting.page import Section, html_details, html_table
from spikefit.reporting.plots import COLOURS, Plot, lines, plot
from spikefit.reporting.study_file import Cell
from spikefit.reporting.table import as_text, grid
from spikefit.reporting.units import significant

Row = dict[str, Any]

# key of a row of `transfer_rows`, and how its matrix is called
MATRICES = (
    ("accuracy", "running statistics as trained"),
    ("reestimated", "running statistics re-estimated"),
)
TRANSFER_NOTE = (
    "Test accuracy [%] of weights trained under the variant of the row and evaluated under that of the column; mean ± "
    "sample standard deviation over seeds. Re-estimated: statistics of the norms are the plain mean over one pass over "
    "the training data under the variant of the column; no weight changes."
)


def transfer_rows(cells: Sequence[Cell], results: dict[tuple[str, str], dict[str, Any]]) -> list[Row]:
    """One row per data row and pair of variants.

    Args:
        cells: of the study.
        results: (key of the cell trained, key of the cell evaluated) -> accuracy and reestimated.

    Returns:
        data, trained, evaluated (variants), n; accuracy and reestimated as mean, with _spread and _values.
    """
    keys = {(cell.data, cell.variant, cell.seed): cell.key for cell in cells}
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    rows = []
    for data in dict.fromkeys(cell.data for cell in cells):
        for a, b in [(a, b) for a in variants for b in variants]:
            runs = [results[keys[data, a, seed], keys[data, b, seed]] for seed in seeds]
            row: Row = {"data": data, "trained": a, "evaluated": b, "n": len(runs)}
            rows.append(row | _summed(runs, ("accuracy", "reestimated")))
    return rows


def pruning_rows(
    cells: Sequence[Cell], shares: Sequence[float], results: dict[tuple[str, float], dict[str, Any]]
) -> list[Row]:
    """One row per data row, variant and share of weights.

    Args:
        cells: of the study.
        shares: of weights set to zero.
        results: (key of the cell, share) -> what `Trained.prune` gives.

    Returns:
        data, variant, share, n; accuracy, firing and membranes_used as mean, with _spread and _values;
        firing_per_layer as mean; weights, weights_left, lif_forward_bytes, firing_samples.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.variant), []).append(cell)
    rows = []
    for (data, variant), group in groups.items():
        for share in shares:
            runs = [results[cell.key, share] for cell in group]
            row: Row = {"data": data, "variant": variant, "share": share, "n": len(runs)}
            row |= _summed(runs, ("accuracy", "firing", "membranes_used"))
            row["firing_per_layer"] = mean_by_layer([run["firing_per_layer"] for run in runs])
            same = ("weights", "weights_left", "lif_forward_bytes", "firing_samples")
            rows.append(row | {key: runs[0][key] for key in same})
    return rows


def mean_by_layer(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Layer -> mean over runs."""
    return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}


def _summed(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Row:
    """Mean, spread and values; None for what the runs do not have."""
    row: Row = {}
    for name in names:
        values = [run[name] for run in runs]
        known = None not in values
        row[name] = statistics.fmean(values) if known else None
        row[f"{name}_spread"] = statistics.stdev(values) if known and len(values) > 1 else None
        row[f"{name}_values"] = values if known else None
    return row


def transfer_text(rows: Sequence[Row], width: int = 200) -> str:
    """The matrices as plain text."""
    parts = []
    for data, key, title in _matrices(rows):
        header, body = _matrix(rows, data, key)
        parts.append(f"Transfer of weights, {data}: {title}\n{as_text(grid(header, body), width)}")
    return "\n".join([*parts, f"{fill(TRANSFER_NOTE, 120)}\n"])


def transfer_section(rows: Sequence[Row]) -> Section:
    """The matrices as heat maps, with their numbers as tables."""
    plots, tables = [], []
    values = [100 * row[key] for row in rows for key, _ in MATRICES if row[key] is not None]
    limits = (min(values), max(values))
    for data, key, title in _matrices(rows):
        header, body = _matrix(rows, data, key)
        # one scale for all, so that equal colours are equal numbers
        plots.append(_heat_map(header[1:], body, f"{data}: {title}", limits))
        tables.append(f"<p>{title}</p>" + html_table(header, body))
    return Section("Transfer of weights", TRANSFER_NOTE, plots, html_details("As tables", "".join(tables)))


def _matrices(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(data, key, title) of every matrix that has numbers."""
    return [
        (data, key, title)
        for data in dict.fromkeys(row["data"] for row in rows)
        for key, title in MATRICES
        if any(row["data"] == data and row[key] is not None for row in rows)
    ]


def _matrix(rows: Sequence[Row], data: str, key: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, body): a line per variant trained under, a column per variant evaluated under."""
    found = {(row["trained"], row["evaluated"]): _percent(row, key) for row in rows if row["data"] == data}
    variants = list(dict.fromkeys(a for a, _ in found))
    return ("trained under", *variants), [(a, *(found[a, b] for b in variants)) for a in variants]


def _heat_map(columns: Sequence[str], body: Sequence[Sequence[str]], title: str, limits: tuple[float, float]) -> Plot:
    trace = {
        "type": "heatmap",
        "x": list(columns),
        "y": [line[0] for line in body],
        "z": [[None if text == "–" else float(text.split(" ")[0]) for text in line[1:]] for line in body],
        "text": [list(line[1:]) for line in body],
        "texttemplate": "%{text}",
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": [[0, "#f3f6f9"], [1, COLOURS[4]]],
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "trained under %{y}<br>evaluated under %{x}: %{text} %<extra></extra>",
    }
    layout = {"yaxis": {"autorange": "reversed", "type": "category"}, "xaxis": {"type": "category"}}
    return plot([trace], title, x="evaluated under", y="trained under", height=190 + 42 * len(body), layout=layout)


def pruning_text(rows: Sequence[Row], width: int = 200) -> str:
    """The table of pruning as plain text."""
    header, body = _pruning_cells(rows)
    return f"Pruning\n{as_text(grid(header, body, text=2), width)}\n{fill(_pruning_note(rows), 120)}\n"


def pruning_section(rows: Sequence[Row]) -> Section:
    """Accuracy and firing neurons against the share of weights that are zero."""
    several = len({row["data"] for row in rows}) > 1
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(f"{row['data']}: {row['variant']}" if several else row["variant"], []).append(row)
    plots = []
    for key, title, y in (
        ("accuracy", "Test accuracy", "correct [%]"),
        ("firing", "Neurons that fire at least once", "of all neurons [%]"),
        ("membranes_used", "Membranes that a firing neuron uses", "of all membranes [%]"),
    ):
        points = [[(100 * r["share"], 100 * r[key]) for r in curve if r[key] is not None] for curve in curves.values()]
        plots += lines(list(curves), points, title, x="weights set to zero [%]", y=y, unit=" %", coincide=False)
    header, body = _pruning_cells(rows)
    return Section("Pruning", _pruning_note(rows), plots, html_table(header, body, text=2) + _firing_by_layer(rows))


def _pruning_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("data", "variant", "zero weights %", "accuracy %", "firing neurons %", "membranes used %", "used KB")
    body = [
        (
            row["data"],
            row["variant"],
            f"{100 * row['share']:g}",
            *(_percent(row, key) for key in ("accuracy", "firing", "membranes_used")),
            significant(_used_bytes(row, 1e3)),
        )
        for row in rows
    ]
    return header, body


def _used_bytes(row: Row, unit: float) -> float | None:
    used, total = row["membranes_used"], row["lif_forward_bytes"]
    return None if used is None or total is None else used * total / unit


def _pruning_note(rows: Sequence[Row]) -> str:
    samples = max(row["firing_samples"] for row in rows)
    return (
        "The smallest magnitudes of all weights of convolutions and linear layers together are set to zero in trained "
        "models; nothing is trained further and norms stay as they are. Firing: at least one spike in the sequence of "
        f"a sample, mean over the first {samples} test samples. Membranes used: numbers in membranes that a firing "
        "neuron needs, where several may use one, and their bytes per sample (KB = 1000 bytes): what forward would "
        "hold if it skipped silent neurons. Mean ± sample standard deviation over seeds."
    )


def _firing_by_layer(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["firing_per_layer"]))
    body = [
        (
            row["data"],
            row["variant"],
            f"{100 * row['share']:g}",
            *(_share(row["firing_per_layer"].get(name)) for name in names),
        )
        for row in rows
    ]
    return html_details("Firing neurons by layer [%]", html_table(("data", "variant", "zero %", *names), body, text=2))


def spike_rate_section(rows: Sequence[Row], names: Sequence[str]) -> Section:
    """Spike rate of every layer, a line per row of the study.

    Args:
        rows: what `study` returns.
        names: what the rows are called.
    """
    kept = [(name, row["spike_rates"]) for name, row in zip(names, rows, strict=True) if row["spike_rates"]]
    layers = list(dict.fromkeys(layer for _, rates in kept for layer in rates))
    curves = [[(i + 1, 100 * rates[one]) for i, one in enumerate(layers) if one in rates] for _, rates in kept]
    names = [name for name, _ in kept]
    plots = lines(names, curves, "Spike rate", x="layer, from the input", y="per step [%]", unit=" %", coincide=False)
    if not plots:
        return Section("Spike rates")
    body = [(layer, *(_share(rates.get(layer)) for _, rates in kept)) for layer in layers]
    note = "Share of the neurons of a layer that fire in a step, mean over steps, test samples and seeds."
    table = html_details("As a table [%]", html_table(("layer", *names), body))
    return Section("Spike rates", note, plots, table)


def _percent(row: Row, key: str) -> str:
    value, spread = row[key], row[f"{key}_spread"]
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
