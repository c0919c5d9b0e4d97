"""How results look in a terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console

from spikefit.planning.energy import counts_analog_as_spikes
from spikefit.reporting.table import as_text, grid
from spikefit.reporting.units import MIB


def _print(header: list[str], body: list[list[str]], *, caption: str | None = None, text: int = 1) -> None:
    console = Console()
    print(
        as_text(
            grid(header, body, caption=caption, text=text), width=max(80, console.width) if console.is_terminal else 160
        )
    )


def show_rows(rows: list[dict[str, Any]]) -> None:
    """A table of texts, one column per key."""
    header = list(rows[0])
    _print(header, [[str(row.get(key, "")) for key in header] for row in rows], text=len(header))


def show_record(record: dict[str, Any]) -> None:
    """What a training run ended with."""
    rates = record["spike_rates"]
    facts = {
        "test accuracy": f"{100 * record['accuracy']:.2f} %",
        "test loss": f"{record['loss']:.4f}",
        "updates": str(record["steps"]),
        "time per update": f"{1000 * record['step_seconds']:.1f} ms (median)",
        "parameters": f"{record['parameters']:,}",
        "firing rates": f"{100 * min(rates.values()):.1f} to {100 * max(rates.values()):.1f} %" if rates else "none",
        "checkpoint": record["checkpoint"] or "none kept; give --out DIR",
    }
    if record["note"]:
        facts["note"] = record["note"]
    _print(["result", ""], [[k, v] for k, v in facts.items()], text=2)


def show_evaluation(result: dict[str, Any]) -> None:
    """Accuracy, loss and rates of a split."""
    _print(
        ["result", ""],
        [
            [f"{result['split']} accuracy", f"{100 * result['accuracy']:.2f} % of {result['samples']} samples"],
            ["loss", f"{result['loss']:.4f}"],
            ["mean firing rate", _or(result["spike_rate"], lambda v: f"{100 * v:.1f} %")],
            ["checkpoint", result["checkpoint"]],
        ],
        text=2,
    )


def show_predictions(rows: list[dict[str, Any]]) -> None:
    """One line per sample."""
    _print(
        ["sample", "class", "probability"],
        [[str(r["sample"]), r["class"], f"{r['probability']:.3f}"] for r in rows],
        text=2,
    )


def show_study(target: Path, rows: list[dict[str, Any]], out: Path | None) -> None:
    """The table that the study wrote, and where it is."""
    from spikefit.reporting.study_file import read_study

    folder = out if out is not None else Path("runs") / read_study(target).name
    print((folder / "table.txt").read_text(encoding="utf-8"))
    print(
        f"Written: {folder / 'report.html'} (open it in a browser), {folder / 'study.json'} and {folder / 'table.txt'}"
    )


def show_profile(target: str, result: dict[str, Any]) -> None:
    """One line per layer, the totals, and what the energy assumes."""
    body = []
    for layer in result["layers"]:
        kept = layer["saved_bytes"]
        body.append(
            [
                layer["name"],
                layer["kind"],
                f"{layer['parameters']:,}",
                f"{sum(kept.values()) / MIB:.2f}",
                _or(layer["spike_rate"], lambda v: f"{100 * v:.1f}"),
                _or(layer["macs"], lambda v: f"{v / 1e6:.2f}"),
                _or(layer["synops"], lambda v: f"{v / 1e6:.2f}"),
                _or(layer["energy_pj"], lambda v: f"{v * 1e-6:.2f}"),
            ]
        )
    settings = result["settings"]
    reset = "no reset" if settings["reset"] in ("", "none") else f"{settings['reset']} reset"
    inside = "" if settings["inside"] in (None, "bptt") else f" over {settings['inside']}"
    _print(
        ["layer", "kind", "parameters", "kept MiB", "rate %", "M MACs", "M SynOps", "energy uJ"],
        body,
        caption=f"{target}, T={settings['timesteps']}, batch {settings['batch']}, {settings['dtype']}, {reset}, "
        f"strategy {settings['strategy']}{inside}; MACs per step, SynOps and energy per sample.",
        text=2,
    )
    measured, seconds, energy = result["measured_peak_bytes"], result["step_seconds"], result["energy"]
    totals = [
        ["gradient", settings["gradient"]],
        *[["", note] for note in settings["notes"]],
        ["kept for backward", f"{result['saved_bytes'] / MIB:.1f} MiB"],
        *[[name, f"{count / MIB:.1f} MiB"] for name, count in result["categories"].items()],
        ["peak of a step, predicted", f"{result['predicted_peak_bytes'] / MIB:.1f} MiB above weights and input"],
        ["the prediction is", settings["prediction"]],
        ["peak of a step, measured", _or(measured, lambda v: f"{v / MIB:.1f} MiB above weights and input")],
        ["time of a step", _or(seconds, lambda v: f"{1000 * v:.1f} ms (median)")],
        *_membrane_rows(result),
        *_energy_rows(energy),
    ]
    _print(["total", ""], totals, text=2)
    print("Energy assumes:")
    for line in energy["assumptions"]:
        print(f"  - {line}")


def _energy_rows(energy: dict[str, Any]) -> list[list[str]]:
    """The strict accounting and the published one, each with the ANN twin and the ratio."""
    published = energy["published"]
    rate = 100 * (published["rate"] or 0)
    return [
        ["energy of one inference, strict", _or(energy["snn_pj"], _microjoules)],
        ["its ANN twin, strict", _twin(energy)],
        *_all_spiking_row(energy),
        [
            "energy as published (flatters)",
            _or(published["snn_pj"], lambda v: f"{_microjoules(v)} at a rate of {rate:.1f} %"),
        ],
        ["its ANN twin as published", _twin(published)],
        [
            "which to believe",
            "the strict one charges accumulates only where a layer was seen to read 0 and 1; the published one charges "
            "them everywhere, and more for the ANN",
        ],
    ]


def _microjoules(picojoules: float) -> str:
    return f"{picojoules * 1e-6:.2f} uJ"


def _twin(accounting: dict[str, Any]) -> str:
    """Energy of the ANN twin, and how many times that of the spiking network it is."""
    told = _microjoules(accounting["ann_pj"])
    return told if accounting["ratio"] is None else f"{told}, {accounting['ratio']:.1f} times as much"


def _all_spiking_row(energy: dict[str, Any]) -> list[list[str]]:
    """The total in which analog inputs count as spikes, where there are any behind the first layer."""
    if not counts_analog_as_spikes(energy):
        return []
    total, rate = energy["all_spiking_pj"] * 1e-6, 100 * energy["all_spiking_rate"]
    return [["with accumulates only behind the first layer", f"{total:.2f} uJ at a firing rate of {rate:.1f} %"]]


def _membrane_rows(result: dict[str, Any]) -> list[list[str]]:
    """What the neurons alone hold, in forward and under every strategy."""
    if not result["lif_forward_bytes"]:
        return []  # no network of this library, or none of its neurons
    settings = result["settings"]
    rows = [["membranes in forward", f"{result['lif_forward_bytes'] / MIB:.2f} MiB"]]
    for name, kept in result["lif_backward_kept_bytes"].items():
        peak = result["lif_backward_peak_bytes"][name]
        text = (
            "does not apply"
            if kept is None
            else f"{kept / MIB:.2f} MiB kept, {peak / MIB:.2f} MiB with what is rebuilt{_assumed(name, settings)}"
        )
        rows.append([f"neurons for backward, {name}", text])
    return rows


def _assumed(strategy: str, settings: dict[str, Any]) -> str:
    """What the bytes of a strategy hold for, where that is a choice."""
    if strategy == "inverse" and settings["inverse_anchor_every"]:
        return f" (inverse:{' or '.join(map(str, settings['inverse_anchor_every']))})"
    return " (if the neurons had frac_bits)" if strategy == "integer" and settings["integer_assumes_grid"] else ""


def _or(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)
