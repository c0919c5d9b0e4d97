"""The tables of docs/results/gradient_rules.md, from records of `gradient_rules.py` and from folders of studies."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rules_cosine import ATTACHED
from rules_memory import slope_of
from rules_rows import BATCHES, MEAN, ROWS, STUDIES, TWIN, in_batches

from spikefit.errors import DataError
from spikefit.reporting.units import MIB, significant

TIMED = ("vgg6", *STUDIES)
MERGED = ("seconds", "ratios", "slopes", "part_seconds")
DASH = "-"


def tables(records: Sequence[Path], folders: Sequence[Path], *, quick: bool = False) -> dict[str, str]:
    """Markdown by name: "conditions", "memory NETWORK", "depth", "time", "batch", "direction STUDY WHEN",
    "accuracy STUDY".

    Args:
        records: JSON files that `gradient_rules.py --out` wrote; of a part that several hold, the last one counts.
        folders: of finished studies.
        quick: whether records made with --quick will do, whose networks are not those of the page.

    Raises:
        DataError: a file that is not there or is no such record.
    """
    record: dict[str, Any] = {}
    read = {path: _read(path) for path in records}
    for path, found in read.items():
        if not isinstance(found, dict) or found.get("benchmark") != "gradient_rules" or not found.get("parity"):
            raise DataError(
                f"{path}: expected a record of gradient_rules.py whose parity check was green; run it again."
            )
        if found["quick"] and not quick:
            raise DataError(f"{path}: expected a record of the networks of the page, got one made with --quick.")
        record |= found | {key: record.get(key, {}) | found.get(key, {}) for key in MERGED}
    made = {"conditions": "\n".join(_conditions(path, found) for path, found in read.items())} if read else {}
    for network in dict.fromkeys(row["network"] for row in record.get("memory", [])):
        rows = [row for row in record["memory"] if row["network"] == network]
        made[f"memory {network}"] = _memory(rows, record["slopes"][network])
    if record.get("depth"):
        made["depth"] = _depth(record["depth"])
    if any(f"{name}: bptt" in record.get("seconds", {}) for name in TIMED):
        made["time"] = _times(record["seconds"], record["ratios"])
    lines = [line for line in map(_batches, read.values()) if line is not None]
    if lines:
        made["batch"] = _markdown(["", *(f"batch {b}" for b in BATCHES)], lines)
    for study in record.get("cosine", []):
        for when in ("initial", "trained"):
            made[f"direction {study['study']} {when}"] = _directions(study, when)
    for folder in folders:
        for data, rows in _studies(folder).items():
            made[f"accuracy {data}"] = _accuracies(rows)
    return made


def fill(page: Path, made: dict[str, str]) -> None:
    """Write every table into its place in `page`, between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        DataError: the page cannot be read, or has no place for a table.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise DataError(f"{page}: cannot read the page ({error.strerror}).") from error
    for name, table in made.items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        if count != 1:
            raise DataError(
                f"{page}: expected one place <!-- table: {name} --> with <!-- end --> behind it, got {count}."
            )
    page.write_text(text)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _named(row: str) -> str:
    """A row as code, with what else its name says behind it, and the loss where the name does not tell it."""
    name, comma, rest = row.partition(",")
    name, _, inside = name.partition(" over ")
    named = f"`{name}`{f' over `{inside}`' if inside else ''}{comma}{rest}"
    return f"{named}, loss of the mean" if ROWS.get(row) == MEAN and not rest else named


def _conditions(path: Path, record: dict[str, Any]) -> str:
    ran = ", ".join(f"{part} {seconds / 60:.1f} min" for part, seconds in record["part_seconds"].items())
    return (
        f"Record `{path.name}` in `benchmarks/results`: commit {record['commit']}, torch "
        f"{record['versions']['torch']}, {record['threads']} threads on {record['cores']} cores; {ran}."
    )


def _memory(rows: Sequence[dict[str, Any]], slopes: dict[str, dict[str, float]]) -> str:
    """Saved bytes and peaks in MiB, slopes in KiB per step; a peak in brackets is predicted."""
    lengths = sorted({row["timesteps"] for row in rows})
    found = {(row["row"], row["timesteps"]): row for row in rows}
    header = ["", f"saved MiB, T = {lengths[0]}", *map(str, lengths[1:]), "KiB per step"]
    header += [f"peak MiB, T = {lengths[0]}", *map(str, lengths[1:]), "KiB per step"]
    body = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own, slope = [found[name, T] for T in lengths], slopes[name]
        saved = [_mib(row.get("saved_bytes")) for row in own]
        peaks = [
            _mib(row["measured_peak_bytes"])
            if "measured_peak_bytes" in row
            else f"({_mib(row.get('predicted_peak_bytes'))})"
            for row in own
        ]
        body.append([_named(name), *saved, _kib(slope.get("saved")), *peaks, _kib(slope.get("peak"))])
    return _markdown(header, body)


def _depth(rows: Sequence[dict[str, Any]]) -> str:
    """MiB held against blocks and against steps; slopes in bytes, that in blocks without the membranes of a block."""
    blocks = sorted({row["blocks"] for row in rows})
    steps = sorted({row["timesteps"] for row in rows})
    middle = {"blocks": blocks[len(blocks) // 2], "timesteps": steps[len(steps) // 2]}
    header = ["", f"held MiB, n = {blocks[0]}", *map(str, blocks[1:]), "bytes per block beside membranes"]
    header += [f"held MiB, T = {steps[0]}", *map(str, steps[1:]), "bytes per step"]
    body = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        deep = sorted((r for r in own if r["timesteps"] == middle["timesteps"]), key=lambda r: r["blocks"])
        long = sorted((r for r in own if r["blocks"] == middle["blocks"]), key=lambda r: r["timesteps"])
        per_block = slope_of([(r["blocks"], r["saved_bytes"] - r["membrane_bytes"]) for r in deep])
        per_step = slope_of([(r["timesteps"], r["saved_bytes"]) for r in long])
        cells = [*(_mib(r["saved_bytes"]) for r in deep), f"{per_block:,.0f}"]
        body.append([_named(name), *cells, *(_mib(r["saved_bytes"]) for r in long), f"{per_step:,.0f}"])
    return _markdown(header, body)


def _mib(count: float | None) -> str:
    return DASH if count is None else significant(count / MIB)


def _kib(count: float | None) -> str:
    """Bytes as KiB; below the tenth of a byte a slope is rounding of the fit."""
    return DASH if count is None else "0" if abs(count) < 0.1 else significant(count / 1024)


def _times(seconds: dict[str, list[float]], ratios: dict[str, float]) -> str:
    """Milliseconds of bptt, and ratios to it for all others, a column per network."""
    networks = [name for name in TIMED if f"{name}: bptt" in seconds]
    body = []
    for row in ROWS:
        if row in TWIN.values():
            cells = [f"{significant(1e3 * median(seconds[f'{n}: {row}']))} ms" for n in networks]
        else:
            cells = [f"{ratios[f'{n}: {row} / bptt']:.2f}x" for n in networks]
        body.append([_named(row), *cells])
    return _markdown(["", *networks], body)


def _batches(record: dict[str, Any]) -> list[str] | None:
    """The conditions of a record, and per batch sltt over bptt and the milliseconds of that; None without any."""
    names = [in_batches(b) for b in BATCHES]
    if not all(f"{name}: bptt" in record["seconds"] for name in names):
        return None
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    settings = "".join(f", `{key}={value}`" for key, value in record["environment"].items())
    ratios = [record["ratios"][f"{name}: sltt / bptt"] for name in names]
    bptt = [significant(1e3 * median(record["seconds"][f"{name}: bptt"])) for name in names]
    return [threads + settings, *(f"{r:.2f}x of {ms} ms" for r, ms in zip(ratios, bptt, strict=True))]


def _directions(study: dict[str, Any], when: str) -> str:
    """Cosine, and in brackets the ratio of norms, a column per layer."""
    layers = list(study[when][0]["layers"])
    header = ["", "beside", *(str(i + 1) for i in range(len(layers) - 2)), "read-out", "all"]
    body = []
    for row in study[when]:
        beside = "attached" if row["reference"] == ATTACHED else "detached"
        beside += ", loss of the mean" if row["reference"] == TWIN[MEAN] else ""
        body.append([f"`{row['row']}`", beside, *(f"{c:.2f} ({r:.2f})" for c, r in row["layers"].values())])
    return _markdown(header, body)


def _studies(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a finished study by data set."""
    path = folder / "study.json"
    if not path.exists():
        raise DataError(
            f"{folder}: expected study.json of a finished study; run spikefit study FILE --out {folder} again."
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _read(path):
        found.setdefault(row["data"], []).append(row)
    return found


def _accuracies(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy by seed, mean and sample standard deviation where there are several, saved bytes and peak of a step."""
    seeds, body = rows[0]["seeds"], []
    several = len(seeds) > 1
    for row in rows:
        name, comma, rest = row["variant"].partition(",")
        cells = [", ".join(f"{100 * value:.2f}" for value in row["accuracy_values"])]
        cells += [f"{100 * row['accuracy']:.2f} +- {100 * row['accuracy_spread']:.2f}"] if several else []
        body.append([f"`{name}`{comma}{rest}", *cells, _mib(row["saved_bytes"]), _mib(row["peak_bytes"])])
    accuracy = [f"accuracy %, seed {', '.join(map(str, seeds))}", *(["mean +- sd"] if several else [])]
    return _markdown(["", *accuracy, "saved MiB", "peak MiB"], body)
