"""Figures of the report, made from the rows of `compare` as plain plotly dictionaries.

Every function returns a list of plots, empty where the rows hold nothing to draw; a plot is
{"label": text for screen readers, "data": traces, "layout": layout}.
"""

from collections.abc import Callable, Sequence
from typing import Any

from spikefit.reporting.plots import COLOURS, Plot, bar, headroom, lines, plot
from spikefit.reporting.units import MIB, mib, milliseconds

Row = dict[str, Any]


def memory_by_layer(rows: Sequence[Row]) -> list[Plot]:
    """One plot per strategy: bytes kept for backward, a bar per layer, stacked by category, all on one scale [MiB]."""
    rows = [row for row in rows if any(_categories(layer) for layer in row.get("layers") or [])]
    order = _category_order(rows)
    widest = max((sum(_categories(layer).values()) for row in rows for layer in row["layers"]), default=0)
    plots = []
    for row in rows:
        names = [_label(layer) for layer in row["layers"]]
        traces = [
            bar(
                x=[_categories(layer).get(category, 0) / MIB for layer in row["layers"]],
                y=names,
                name=category,
                colour=COLOURS[i % len(COLOURS)],
                hover=f"%{{y}}<br>{category}: %{{x:.3g}} MiB<extra></extra>",
                horizontal=True,
            )
            for i, category in enumerate(order)
        ]
        total = mib(sum(sum(_categories(layer).values()) for layer in row["layers"]))
        plots.append(
            plot(
                traces,
                f"{row['strategy']}: {total} MiB in all",
                x="saved for backward [MiB]",
                height=150 + 26 * len(names),
                layout={
                    "barmode": "stack",
                    "xaxis": {"range": [0, 1.05 * widest / MIB]},
                    "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
                    "showlegend": True,
                },
            )
        )
    return plots


def memory_per_strategy(rows: Sequence[Row]) -> list[Plot]:
    """Two plots: saved, measured peak and predicted peak [MiB]; time of a training step [ms]."""
    strategies = [row["strategy"] for row in rows]
    kinds = (
        ("saved_bytes", "saved for backward"),
        ("peak_bytes", "peak, measured"),
        ("predicted_peak_bytes", "peak, predicted"),
    )
    bars = [
        bar(
            x=strategies,
            y=[_scaled(row.get(key), 1 / MIB) for row in rows],
            name=name,
            colour=COLOURS[i],
            text=[mib(row.get(key)) for row in rows],
            hover=f"%{{x}}<br>{name}: %{{text}} MiB<extra></extra>",
        )
        for i, (key, name) in enumerate(kinds)
        if any(row.get(key) is not None for row in rows)
    ]
    plots = [plot(bars, "Memory", y="MiB", layout={"barmode": "group", **headroom(bars)})] if bars else []
    if any(row.get("step_seconds") is not None for row in rows):
        bars = [
            bar(
                x=strategies,
                y=[_scaled(row.get("step_seconds"), 1e3) for row in rows],
                name="training step",
                colour=COLOURS[2],
                text=[milliseconds(row.get("step_seconds")) for row in rows],
                hover="%{x}<br>%{text} ms<extra></extra>",
            )
        ]
        plots.append(plot(bars, "Time of one training step", y="ms", layout={"bargap": 0.55, **headroom(bars)}))
    return plots


def memory_against_timesteps(rows: Sequence[Row]) -> list[Plot]:
    """Two plots against T: bytes kept for backward and predicted peak [MiB], a line per strategy."""
    plots = []
    for key, title in (("saved_bytes", "Saved for backward"), ("predicted_peak_bytes", "Peak, predicted")):
        curves = [
            [(p["timesteps"], p[key] / MIB) for p in row.get("memory_against_T") or [] if p.get(key) is not None]
            for row in rows
        ]
        plots += lines(_names(rows), curves, title, x="time steps T", y="MiB", unit=" MiB")
    return plots


def learning_curves(rows: Sequence[Row]) -> list[Plot]:
    """Test accuracy [%] and training loss against epochs, a line per strategy."""
    plots = []
    for key, scale, title, y, unit in (
        ("test_accuracy", 100, "Test accuracy", "correct [%]", " %"),
        ("train_loss", 1, "Training loss", "loss", ""),
    ):
        curves = [
            [(e["epoch"], scale * e[key]) for e in row.get("history") or [] if e.get(key) is not None] for row in rows
        ]
        plots += lines(_names(rows), curves, title, x="epoch", y=y, unit=unit, zero=False)
    return plots


def spike_rates(rows: Sequence[Row]) -> list[Plot]:
    """Mean firing rate per layer [% of neurons and steps]; strategies with equal rates share a bar."""

    def values(row: Row) -> dict[str, float]:
        return {
            _label(layer): 100 * layer["spike_rate"]
            for layer in row.get("layers") or []
            if layer.get("spike_rate") is not None
        }

    return _by_layer(rows, values, "Mean spike rate", "spikes per neuron and step [%]", "%{x:.3g} %")


def energy_per_layer(rows: Sequence[Row]) -> list[Plot]:
    """Energy of one inference per layer [uJ]; strategies with equal energy share a bar."""

    def values(row: Row) -> dict[str, float]:
        return {
            _label(layer): layer["energy_pj"] * 1e-6
            for layer in row.get("layers") or []
            if layer.get("energy_pj") is not None
        }

    return _by_layer(rows, values, "Energy of one inference", "energy per sample [µJ]", "%{x:.3g} µJ")


def _by_layer(
    rows: Sequence[Row], values: Callable[[Row], dict[str, float]], title: str, x: str, hover: str
) -> list[Plot]:
    groups: list[tuple[list[str], dict[str, float]]] = []
    for row in rows:
        found = values(row)
        # equal to four digits: one bar with both names says more than two of the same length
        same = next((g for g in groups if _rounded(g[1]) == _rounded(found)), None)
        if same:
            same[0].append(row["strategy"])
        elif found:
            groups.append(([row["strategy"]], found))
    if not groups:
        return []
    names = list(dict.fromkeys(name for _, found in groups for name in found))
    traces = [
        bar(
            x=[found.get(name) for name in names],
            y=names,
            name=" = ".join(strategies),
            colour=COLOURS[i % len(COLOURS)],
            hover=f"%{{y}}: {hover}<extra></extra>",
            horizontal=True,
        )
        for i, (strategies, found) in enumerate(groups)
    ]
    layout = {
        "barmode": "group",
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
        "showlegend": len(rows) > 1,
    }
    return [plot(traces, title, x=x, height=150 + (14 + 14 * len(groups)) * len(names), layout=layout)]


def _names(rows: Sequence[Row]) -> list[str]:
    return [row["strategy"] for row in rows]


def _label(layer: Row) -> str:
    """Name and kind; what belongs to no layer stands under its name alone."""
    return layer["name"] if layer["name"].startswith("(") else f"{layer['name']} {layer.get('kind', '')}".strip()


def _categories(layer: Row) -> dict[str, float]:
    return {k: v for k, v in (layer.get("saved_bytes") or {}).items() if v}


def _category_order(rows: Sequence[Row]) -> list[str]:
    """Largest first, over all strategies, so that one colour means one category."""
    total: dict[str, float] = {}
    for row in rows:
        for layer in row["layers"]:
            for category, count in _categories(layer).items():
                total[category] = total.get(category, 0) + count
    return sorted(total, key=lambda c: (-total[c], c))


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _rounded(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items()}
