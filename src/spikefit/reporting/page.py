"""A self-contained page: HTML, style, figures and plotly.js in one file that opens offline."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from spikefit.reporting.plots import Plot

# The browser itself refuses every request, so an offline page is a fact and not a promise. Plotly writes its styles
# inline and saves pictures through blob: and data:.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root { --ink: #24292f; --soft: #57606a; --line: #d8dee4; --back: #f6f8fa; --accent: #0b5c94; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
.lede { font-size: 1.05rem; margin: 0 0 .3rem; max-width: 75ch; }
.note { color: var(--soft); font-size: .92rem; margin: .25rem 0 .75rem; max-width: 95ch; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 1.1rem 1.25rem; margin: 1.1rem 0; }
.plots { display: grid; gap: .5rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.plot { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
th.text, td.text { text-align: left; }
dl { display: grid; gap: .6rem 1.25rem; margin: .6rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
dl div { min-width: 0; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .6rem; }
summary { cursor: pointer; color: var(--accent); }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86rem; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; margin: .5rem 0; }
ul { margin: .4rem 0; padding-left: 1.2rem; color: var(--soft); font-size: .92rem; }
@media (max-width: 600px) { main { padding: 1rem .6rem 2rem; } section { padding: .9rem .7rem; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""

# Draws every figure; a figure that fails says so in its place instead of staying blank.
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displayModeBar: false}).catch((error) => {
    place.textContent = "This figure could not be drawn: " + error;
    throw error;
  });
}
"""


@dataclass
class Section:
    """One box of the page.

    Attributes:
        title: heading.
        note: one line under the figures that says how to read them.
        plots: figures as {"label", "data", "layout"}.
        html: ready-made HTML below the note.
    """

    title: str
    note: str = ""
    plots: Sequence[Plot] = field(default_factory=list)
    html: str = ""


def render(title: str, lede: str, sections: Sequence[Section]) -> str:
    """The page as one string of HTML; `title`, `lede` and notes are text, not HTML."""
    figures: dict[str, Plot] = {}
    body = []
    for section in sections:
        places = []
        for plot in section.plots:
            name = f"figure-{len(figures)}"
            figures[name] = {"data": plot["data"], "layout": plot["layout"]}
            # the height is reserved, so that the page does not jump while it draws
            style = f"height:{plot['layout']['height']}px"
            label = escape(plot["label"])
            places.append(f'<div class="plot" id="{name}" role="img" aria-label="{label}" style="{style}"></div>')
        drawn = f'<div class="plots">{"".join(places)}</div>' if places else ""
        note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
        body.append(f"<section><h2>{escape(section.title)}</h2>{drawn}{note}{section.html}</section>")
    lede = f'<p class="lede">{escape(lede)}</p>' if lede else ""
    # "<" may not stand in a script element, where it could close it
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>",
            f"<body><main><header><h1>{escape(title)}</h1>{lede}</header>",
            *body,
            "</main>",
            f'<script type="application/json" id="figures">{data}</script>',
            # once, however many figures there are; without figures the page needs no script at all
            f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>" if figures else "",
            "</body></html>\n",
        ]
    )


def html_table(header: Sequence[str], body: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A table of plain texts; the first `text` columns are left-aligned."""

    def line(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="text"' if i < text else "" for i in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True))

    rows = "".join(f"<tr>{line('td', values)}</tr>" for values in body)
    return f'<div class="scroll"><table><thead><tr>{line("th", header)}</tr></thead><tbody>{rows}</tbody></table></div>'


def html_facts(facts: dict[str, Any]) -> str:
    """Names and values side by side; empty values are left out."""
    kept = {name: value for name, value in facts.items() if value not in (None, "", [], {})}
    items = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(str(v))}</dd></div>" for n, v in kept.items())
    return f"<dl>{items}</dl>" if items else ""


def html_details(summary: str, html: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"
