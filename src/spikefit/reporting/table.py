"""The results table, once as cells, from which text and HTML are made."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spikefit.reporting.units import error, mib, milliseconds, percent, ratio, significant

Row = dict[str, Any]

# Characters of a text up to which its column stays on one line.
SHORT = 32
HEADER = ("strategy", "exact", "accuracy %", "loss", "peak MiB", "saved MiB", "step ms", "max gradient error")


def table(rows: Sequence[Row]) -> Table:
    """The rows of `compare` as a rich table: memory in MiB, time in ms, the ratio to bptt in brackets.

    Args:
        rows: what `compare` returns.

    Returns:
        a rich renderable; `table_text(rows)` is the same as plain text.

    Example:
        rich.print(table(compare("recipes/demo.toml")))
    """
    return grid(HEADER, cells(rows), caption=caption(rows))


def grid(header: Sequence[str], body: Sequence[Sequence[str]], *, caption: str | None = None, text: int = 1) -> Table:
    """A plain rich table; the first `text` columns are text, the others are right-aligned numbers."""
    made = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, title_justify="left")
    for i, name in enumerate(header):
        column = (name, *(line[i] for line in body))
        # lines break between words only, as far as the terminal has room, and long texts before short ones
        longest = max(len(word) for cell in column for word in (cell.split() or [""]))
        short = i < text and max(map(len, column)) <= SHORT
        made.add_column(name, justify="left" if i < text else "right", no_wrap=short, min_width=longest)
    for line in body:
        made.add_row(*line)
    return made


def as_text(made: Table, width: int = 120) -> str:
    """A rich table as plain text without colours, at most `width` characters wide."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(made)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"


def table_text(rows: Sequence[Row], width: int = 120) -> str:
    """`table(rows)` as plain text."""
    return as_text(table(rows), width)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One tuple of texts per row, in the order of `HEADER`."""
    base = bptt_row(rows)

    def with_ratio(row: Row, key: str, text: str) -> str:
        share = ratio(row.get(key), base.get(key)) if base and row is not base else ""
        return f"{text} ({share})" if share else text

    return [
        (
            str(row["strategy"]),
            "yes" if row["exact"] else "approximate",
            percent(row.get("accuracy")),
            significant(row.get("loss"), 4),
            with_ratio(row, "peak_bytes", mib(row.get("peak_bytes"))),
            with_ratio(row, "saved_bytes", mib(row.get("saved_bytes"))),
            with_ratio(row, "step_seconds", milliseconds(row.get("step_seconds"))),
            error(row.get("max_gradient_error")),
        )
        for row in rows
    ]


def bptt_row(rows: Sequence[Row]) -> Row | None:
    """The row all ratios refer to, or None if plain bptt was not run."""
    return next((row for row in rows if row["strategy"] == "bptt"), None)


def caption(rows: Sequence[Row]) -> str:
    """What the ratios refer to, with the settings that belong beside every ratio, and which strategies were refused."""
    where = conditions(rows[0]) if rows else ""
    if bptt_row(rows) is None or len(rows) < 2:
        told = f"At {where}." if where else ""
    else:
        told = f"(x) = ratio to bptt{' at ' + where if where else ''}."
    refused = [f"{row['strategy']} was refused: {row['refused']}" for row in rows if row.get("refused")]
    return "\n".join(filter(None, [told, *refused]))


def conditions(row: Row) -> str:
    """T, batch, reset mode, dtype and device of a row, as one phrase."""
    s = row.get("settings") or {}
    parts = [
        f"T = {s['timesteps']}" if s.get("timesteps") else "",
        f"batch {s['batch']}" if s.get("batch") else "",
        f"{s['reset']}" if s.get("reset") else "",
        str(s.get("dtype", "")),
        f"on {s['device']}" if s.get("device") else "",
    ]
    return ", ".join(part for part in parts if part)
