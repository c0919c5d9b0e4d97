"""Figures of the report, made from the rows of `compare` as plain plotly dictionaries.

Every function returns a list of plots, empty where the rows hold nothing to draw; a plot is
{"label": text for screen readers, "data": traces, "layout": layout}.
"""

from collections.abc import Callable, Sequence
from typing import Any

from spikefit.reporting.units import MIB, mib, milliseconds

Row = dict[str, Any]
Plot = dict[str, Any]

# Okabe and Ito's colours that keep contrast on white, in an order where neighbours differ in lightness too
COLOURS = ("#0072B2", "#E08A00", "#007F5F", "#B8437F", "#4FA3D9", "#7A4B12", "#5B5B5B", "#B0A100")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def memory_by_layer(rows: Sequence[Row]) -> list[Plot]:
    """One plot per strategy: bytes kept for backward, a bar per layer, stacked by category, all on one scale [MiB]."""
    rows = [row for row in rows if any(_categories(layer) for layer in row.get("layers") or [])]
    order = _category_order(rows)
    widest = max((sum(_categories(layer).values()) for row in rows for layer in row["layers"]), default=0)
    plots = []
    for row in rows:
        names = [layer["name"] for layer in row["layers"]]
        traces = [
            _bar(
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
            _plot(
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
        _bar(
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
    plots = [_plot(bars, "Memory", y="MiB", layout={"barmode": "group", **_headroom(bars)})] if bars else []
    if any(row.get("step_seconds") is not None for row in rows):
        bars = [
            _bar(
                x=strategies,
                y=[_scaled(row.get("step_seconds"), 1e3) for row in rows],
                name="training step",
                colour=COLOURS[2],
                text=[milliseconds(row.get("step_seconds")) for row in rows],
                hover="%{x}<br>%{text} ms<extra></extra>",
            )
        ]
        plots.append(_plot(bars, "Time of one training step", y="ms", layout={"bargap": 0.55, **_headroom(bars)}))
    return plots


def memory_against_timesteps(rows: Sequence[Row]) -> list[Plot]:
    """Two plots against T: bytes kept for backward and predicted peak [MiB], a line per strategy."""
    plots = []
    for key, title in (("saved_bytes", "Saved for backward"), ("predicted_peak_bytes", "Peak, predicted")):
        lines = [
            [(p["timesteps"], p[key] / MIB) for p in row.get("memory_against_T") or [] if p.get(key) is not None]
            for row in rows
        ]
        plots += _lines(_names(rows), lines, title, x="time steps T", y="MiB", unit=" MiB")
    return plots


def learning_curves(rows: Sequence[Row]) -> list[Plot]:
    """Test accuracy [%] and training loss against epochs, a line per strategy."""
    plots = []
    for key, scale, title, y, unit in (
        ("test_accuracy", 100, "Test accuracy", "correct [%]", " %"),
        ("train_loss", 1, "Training loss", "loss", ""),
    ):
        lines = [
            [(e["epoch"], scale * e[key]) for e in row.get("history") or [] if e.get(key) is not None] for row in rows
        ]
        plots += _lines(_names(rows), lines, title, x="epoch", y=y, unit=unit, zero=False)
    return plots


def spike_rates(rows: Sequence[Row]) -> list[Plot]:
    """Mean firing rate per layer [% of neurons and steps]; strategies with equal rates share a bar."""

    def values(row: Row) -> dict[str, float]:
        return {
            layer["name"]: 100 * layer["spike_rate"]
            for layer in row.get("layers") or []
            if layer.get("spike_rate") is not None
        }

    return _by_layer(rows, values, "Mean spike rate", "spikes per neuron and step [%]", "%{x:.3g} %")


def energy_per_layer(rows: Sequence[Row]) -> list[Plot]:
    """Energy of one inference per layer [uJ]; strategies with equal energy share a bar."""

    def values(row: Row) -> dict[str, float]:
        return {
            layer["name"]: layer["energy_pj"] * 1e-6
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
        _bar(
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
    return [_plot(traces, title, x=x, height=150 + (14 + 14 * len(groups)) * len(names), layout=layout)]


def _lines(
    names: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]],
    title: str,
    *,
    x: str,
    y: str,
    unit: str,
    zero: bool = True,
) -> list[Plot]:
    traces: list[Plot] = []
    for i, (name, points) in enumerate(zip(names, lines, strict=True)):
        if not points:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [p[0] for p in points],
                "y": [p[1] for p in points],
                # later lines are thinner, so that lines on top of each other all show
                "line": {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % 4], "width": max(2, 6 - 3 * i)},
                "marker": {"symbol": SYMBOLS[i % 5], "size": max(6, 11 - 4 * i)},
                "hovertemplate": f"{name}<br>%{{x}}: %{{y:.4g}}{unit}<extra></extra>",
            }
        )
    if not traces:
        return []
    layout = {"yaxis": {"rangemode": "tozero"} if zero else {}, "xaxis": _whole_numbers(traces), "showlegend": True}
    return [_plot(traces, title, x=x, y=y, layout=layout)]


def _names(rows: Sequence[Row]) -> list[str]:
    return [row["strategy"] for row in rows]


def _whole_numbers(traces: list[Plot]) -> dict[str, Any]:
    """Ticks at the whole numbers that occur, or plotly's choice where there are many."""
    values = sorted({value for trace in traces for value in trace["x"]})
    return {"tickvals": values} if len(values) <= 10 else {"tickformat": "d"}


def _bar(
    *,
    x: list[Any],
    y: list[Any],
    name: str,
    colour: str,
    hover: str,
    text: list[str] | None = None,
    horizontal: bool = False,
) -> Plot:
    trace: Plot = {
        "type": "bar",
        "x": x,
        "y": y,
        "name": name,
        "hovertemplate": hover,
        "marker": {"color": colour, "line": {"color": "#ffffff", "width": 1}},
    }
    if horizontal:
        trace["orientation"] = "h"
    if text:
        trace |= {"text": text, "textposition": "outside", "cliponaxis": False, "textfont": {"size": 12}}
    return trace


def _plot(
    traces: list[Plot], title: str, *, x: str = "", y: str = "", height: int = 340, layout: dict[str, Any]
) -> Plot:
    axis = {
        "gridcolor": "#e3e6ea",
        "zerolinecolor": "#9aa3ad",
        "automargin": True,
        "fixedrange": True,
        "ticklabelstandoff": 4,
        "tickfont": {"size": 12},
    }
    full = {
        "height": height,
        "autosize": True,
        "font": {"family": FONT, "size": 13, "color": "#24292f"},
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 8}},
        "margin": {"l": 10, "r": 24, "t": 48, "b": 10},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        # below the plot, where it never covers bars or the title
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "xref": "container",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
        },
        **layout,
        "xaxis": {**axis, "title": _axis_title(x), **layout.get("xaxis", {})},
        "yaxis": {**axis, "title": _axis_title(y), **layout.get("yaxis", {})},
    }
    return {"label": f"{title}; {y or x}", "data": traces, "layout": full}


def _axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 10, "font": {"size": 13}}


def _headroom(bars: list[Plot]) -> dict[str, Any]:
    """Room above the tallest bar for its number."""
    tallest = max((v for bar in bars for v in bar["y"] if v is not None), default=1)
    return {"yaxis": {"range": [0, 1.15 * tallest or 1]}, "xaxis": {"type": "category", "showgrid": False}}


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
