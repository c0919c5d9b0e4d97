"""`compare`: one recipe under several strategies, from the same weights, on the same batches."""

import contextlib
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spikefit.errors import OptionError, StrategyError
from spikefit.ops.dispatch import use_backend
from spikefit.reporting.measure import (
    FirstBatch,
    check_measurable,
    gradient_error,
    interleaved_seconds,
    profile_of,
    settings_of,
)
from spikefit.reporting.report import write_report
from spikefit.rules import parse_driver
from spikefit.training import ProgressEvent, Recipe, build_driver, load_recipe, train
from spikefit.training.files import check_folder, write_json

Row = dict[str, Any]
# what goes on (a strategy that is training, or what is being measured), and the event of the training
OnProgress = Callable[[str, ProgressEvent | None], None]


def compare(
    recipe: str | Path | dict[str, Any] | Recipe,
    strategies: Sequence[str] = ("bptt", "checkpoint"),
    *,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
    progress: bool = False,
    resume: bool = False,
) -> list[Row]:
    """Train one recipe under several strategies and measure what each one costs.

    Every strategy starts from the same weights and meets the same batches. Before training, gradients of the first
    batch are compared with plain bptt (bptt itself with a second run of it) and training steps are timed taking turns.
    A strategy that the network refuses, at once or in the middle of its training, keeps its row and the others go on.

        max_gradient_error = max over parameters of  max |g - g_bptt| / max |g_bptt|

    Args:
        recipe: path, dictionary or `Recipe`; its own strategy counts if it is among `strategies`, with its options.
        strategies: "bptt", "checkpoint", "checkpoint:3", ...
        out: folder for compare.json (the rows), report.html and the checkpoints of training; None writes nothing.
        on_progress: called with (what goes on, None) when a measurement starts, and (strategy, `ProgressEvent`) during
            training.
        progress: draw a progress bar of every training on standard error.
        resume: go on with the trainings in `out`; False starts them anew and drops their checkpoints there.

    Returns:
        one row per strategy: strategy, exact, accuracy (share of the test split), loss, peak_bytes (measured in a fresh
        process), predicted_peak_bytes, saved_bytes, step_seconds [s] (median), max_gradient_error, parameters, history
        (per epoch), layers, energy, rates (share of neurons that fire per step, test split), memory_against_T (list of
        timesteps, saved_bytes, predicted_peak_bytes), settings, recipe, environment, refused (why the strategy could
        not run to its end, else None; what was not measured is None or absent then).

    Raises:
        StrategyError: unknown strategy or option, or all strategies are refused.
        OptionError: no strategy, one twice, several devices, a precision that cannot be measured, or `out` cannot be
            written.
        RecipeError, DataError, TrainingError, CheckpointError: as `spikefit.train`.

    Example:
        rows = spikefit.compare("recipes/demo.toml", ["bptt", "checkpoint:2"], out="runs/demo")
    """
    base = load_recipe(recipe)
    names = _names(strategies)
    check_measurable("compare", base)
    # options of the recipe's own strategy belong to that alone
    plain, own = base.override({"strategy": "bptt"}), base.strategy.name
    recipes = {name: base if name == own else plain.override({"strategy": name}) for name in names}
    tell: OnProgress = on_progress or (lambda what, event: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_backend(base.backend))
        tell("comparing gradients and step times", None)
        batch = FirstBatch(base)
        if out is not None:
            check_folder(out)
        rows = _measured_steps(batch, recipes)
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(out) / "checkpoints"
        for name, row in rows.items():
            place = folder / name.replace(":", "-")
            if not resume and place.exists():
                shutil.rmtree(place)
            if row["refused"] is not None:
                continue
            try:
                record = train(
                    recipes[name],
                    out=place,
                    resume=resume,
                    progress=progress,
                    on_progress=partial(tell, name),
                )
                tell(f"measuring memory of {name}", None)
                row |= _outcome(record.to_dict())
                row |= profile_of(recipes[name], batch, batch.plain_model(recipes[name], place))
            except StrategyError as error:
                row["refused"] = str(error)
                continue
            for layer in row["layers"]:
                layer["spike_rate"] = record.spike_rates.get(layer["name"])
    listed = list(rows.values())
    if all(row["refused"] for row in listed):
        raise StrategyError(f"compare: no strategy could run. {listed[0]['refused']}")
    if out is not None:
        write_json(Path(out) / "compare.json", listed)
        write_report(Path(out) / "report.html", _report(recipe, base, listed, Path(out)))
    return listed


def _names(strategies: Sequence[str]) -> list[str]:
    """The strategies as they are written, checked."""
    if isinstance(strategies, str):
        strategies = strategies.split(",")
    names = [str(parse_driver(strategy)) for strategy in strategies]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"compare: expected at least one strategy and each once, got {', '.join(names) or 'none'}.")
    return names


def _measured_steps(batch: FirstBatch, recipes: dict[str, Recipe]) -> dict[str, Row]:
    """Rows with gradient errors and step times, from the initial weights, without an update."""
    plain = next(iter(recipes.values())).override({"strategy": "bptt"})
    reference = batch.gradients(batch.model(plain))
    steps: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, recipe in recipes.items():
        try:
            model, driver = batch.model(recipe), build_driver(recipe)
            found = batch.gradients(model, driver)
            if driver.rule is not None:
                # steps that a rule leaves out may be the only ones that a parameter has
                found = {**{n: torch.zeros_like(r) for n, r in reference.items()}, **found}
            errors[name] = gradient_error(found, reference)
            steps[name] = partial(batch.step, model, driver)
        except StrategyError as error:
            refused[name] = str(error)
    seconds = interleaved_seconds(steps) if steps else {}
    return {
        name: {
            "strategy": name,
            "exact": parse_driver(name).exact,
            "accuracy": None,
            "loss": None,
            "peak_bytes": None,
            "saved_bytes": None,
            "step_seconds": seconds.get(name),
            "max_gradient_error": errors.get(name),
            "refused": refused.get(name),
            "settings": settings_of(recipes[name], timesteps=batch.x.shape[0], device=batch.x.device.type),
        }
        for name in recipes
    }


def _outcome(record: dict[str, Any]) -> Row:
    """What a row takes from the record of its training."""
    kept = {key: record[key] for key in ("accuracy", "loss", "parameters", "history", "recipe", "environment", "note")}
    return {**kept, "rates": record["spike_rates"]}


def _report(recipe: Any, base: Recipe, rows: list[Row], out: Path) -> dict[str, Any]:
    ran = next(row for row in rows if row["refused"] is None)
    source = Path(recipe).name if isinstance(recipe, str | Path) else f"{base.model.name} on {base.data.name}"
    return {
        "title": f"What each strategy costs: {source}",
        "command": command_line(
            [
                "compare",
                *([str(recipe)] if isinstance(recipe, str | Path) else []),
                f"strategies={','.join(row['strategy'] for row in rows)}",
                "--out",
                str(out),
            ]
        ),
        "recipe": {key: value for key, value in ran["recipe"].items() if key != "strategy"},
        "environment": ran["environment"],
        "rows": rows,
    }


def command_line(verb: Sequence[str]) -> str:
    """The command of this process if it is spikefit's, which holds all overrides; else the one that does the same."""
    if Path(sys.argv[0]).name == "spikefit":
        return shlex.join(["spikefit", *sys.argv[1:]])
    return shlex.join(["spikefit", *verb])
