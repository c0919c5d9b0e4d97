"""Bars and lines in the one style of all figures, as plain plotly dictionaries.

A plot is {"label": text for screen readers, "data": traces, "layout": layout}.
"""

from collections.abc import Sequence
from typing import Any

Plot = dict[str, Any]

# Okabe and Ito's colours that keep contrast on white, in an order where neighbours differ in lightness too
COLOURS = ("#0072B2", "#E08A00", "#007F5F", "#B8437F", "#4FA3D9", "#7A4B12", "#5B5B5B", "#B0A100")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def lines(
    names: Sequence[str],
    curves: Sequence[Sequence[tuple[float, float]]],
    title: str,
    *,
    x: str,
    y: str,
    unit: str,
    zero: bool = True,
    coincide: bool = True,
) -> list[Plot]:
    """One plot with a line per name through its (x, y) points; no plot where no line has a point.

    With `coincide`, later lines are thinner, so that lines on top of each other all show.
    """
    traces: list[Plot] = []
    for i, (name, points) in enumerate(zip(names, curves, strict=True)):
        if not points:
            continue
        rank = i if coincide else 2
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [p[0] for p in points],
                "y": [p[1] for p in points],
                "line": {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % 4], "width": max(2, 6 - 3 * rank)},
                "marker": {"symbol": SYMBOLS[i % 5], "size": max(6, 11 - 4 * rank)},
                "hovertemplate": f"{name}<br>%{{x}}: %{{y:.4g}}{unit}<extra></extra>",
            }
        )
    if not traces:
        return []
    layout = {"yaxis": {"rangemode": "tozero"} if zero else {}, "xaxis": _whole_numbers(traces), "showlegend": True}
    return [plot(traces, title, x=x, y=y, layout=layout)]


def _whole_numbers(traces: list[Plot]) -> dict[str, Any]:
    """Ticks at the whole numbers that occur, or plotly's choice where there are many."""
    values = sorted({value for trace in traces for value in trace["x"]})
    return {"tickvals": values} if len(values) <= 10 else {"tickformat": "d"}


def bar(
    *,
    x: list[Any],
    y: list[Any],
    name: str,
    colour: str,
    hover: str,
    text: list[str] | None = None,
    horizontal: bool = False,
) -> Plot:
    """One set of bars, upright or, for long names, lying; `text` stands at their ends."""
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


def plot(
    traces: list[Plot], title: str, *, x: str = "", y: str = "", height: int = 340, layout: dict[str, Any]
) -> Plot:
    """Traces with title, axes and legend; `layout` adds to or replaces parts of the common layout."""
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


def headroom(bars: list[Plot]) -> dict[str, Any]:
    """Room above the tallest bar for its number."""
    tallest = max((v for bar in bars for v in bar["y"] if v is not None), default=1)
    return {"yaxis": {"range": [0, 1.15 * tallest or 1]}, "xaxis": {"type": "category", "showgrid": False}}
