"""Studies: many training runs from one file, restartable run by run, summed up in one table."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spikefit.errors import SpikefitError
from spikefit.reporting.analyses import Trained, check_pruning, check_transfer, has_weights, train_and_keep
from spikefit.reporting.analyses_page import (
    mean_by_layer,
    pruning_rows,
    pruning_section,
    pruning_text,
    transfer_rows,
    transfer_section,
    transfer_text,
)
from spikefit.reporting.measure import check_measurable, measure_memory, settings_of
from spikefit.reporting.membranes import (
    check_membranes,
    measure_membranes,
    membrane_page,
    membrane_rows,
    membrane_text,
)
from spikefit.reporting.page import Section
from spikefit.reporting.study_file import Cell, StudyFile, make_cells, once, read_study
from spikefit.reporting.study_page import study_page, study_text
from spikefit.training import ProgressEvent, Recipe, load_recipe, train
from spikefit.training.files import check_folder, write_json, write_text
from spikefit.training.launch import check

Row = dict[str, Any]
# which run it is (run, runs, variant, data, seed, reused), and the event of its training
OnProgress = Callable[[dict[str, Any], ProgressEvent | None], None]

# what one run gives, summed up over seeds
NUMBERS = ("accuracy", "loss", "step_seconds")


def study(
    path: str | Path, *, out: str | Path | None = None, on_progress: OnProgress | None = None, progress: bool = False
) -> list[Row]:
    """Train every variant on every data set with every seed, and sum up in one table.

    A finished run is one file `cells/KEY.json`, KEY a hash of its full recipe: a study that was stopped goes on where
    it stopped, and a changed recipe runs again. Analyses of trained weights keep them as a checkpoint in
    `weights/KEY`, and write their own rows to transfer.json and pruning.json.

    Args:
        path: the study file; `docs/studies.md` shows its keys.
        out: folder for cells/, study.json (the rows), table.txt and report.html; default runs/NAME.
        on_progress: called with ({"run", "runs", "variant", "data", "seed", "reused"}, None) before each run, and with
            the same and a `ProgressEvent` during it.
        progress: draw a progress bar of every training on standard error.

    Returns:
        one row per variant and data set: variant, data, n (number of seeds), seeds; for accuracy, loss and
        step_seconds [s] the mean under the name itself, the sample standard deviation under NAME_spread (None for
        n = 1) and all values under NAME_values; with memory = true saved_bytes, peak_bytes, predicted_peak_bytes
        [bytes] of the first seed; history and spike_rates (layer -> share per step; means over seeds), settings,
        parameters, cells (names of the files).
        With train = false the bytes of `spikefit.reporting.membranes.membrane_rows` instead.

    Raises:
        RecipeError, OptionError, DataError, TrainingError: a study file, or a row whose recipe, data, model or device
            cannot work (all rows are made before the first one trains); or `out` cannot be written.
        DataError: a file of a finished run is damaged.

    Example:
        spikefit.study("studies/demo_tau.toml")
    """
    source = read_study(path)
    cells = make_cells(source, load_recipe)
    out = Path("runs", source.name) if out is None else Path(out)
    if not source.train:
        return _count_membranes(source, cells, out, on_progress or (lambda where, event: None))
    finished = {cell.key for cell in cells if _is_finished(source, cell, out)}
    _check_rows([cell for cell in cells if cell.key not in finished])
    if source.transfer:
        check_transfer(cells)
    if source.pruning:
        check_pruning(cells)
    check_folder(out)
    records: dict[str, dict[str, Any]] = {}
    memory: dict[str, dict[str, Any]] = {}
    tell: OnProgress = on_progress or (lambda where, event: None)
    for i, cell in enumerate(cells):
        file = out / "cells" / f"{cell.key}.json"
        where = _place(i, cells, reused=cell.key in finished)
        tell(where, None)
        run = partial(_run, source, cell, out, partial(tell, where), progress)
        records[cell.key] = once(file, cell, run, again=cell.key not in finished)
        # memory does not depend on the seed
        if source.memory and cell.seed == source.seeds[0]:
            file = out / "memory" / f"{cell.key}.json"
            memory[cell.key] = once(file, cell, partial(measure_memory, cell.recipe))
    rows = summarise(cells, records, memory)
    environments = [record["environment"] for record in records.values()]
    texts, sections = _analyse(source, cells, out)
    write_json(out / "study.json", rows)
    write_text(out / "table.txt", "\n".join([study_text(source.name, rows), *texts]))
    write_text(out / "report.html", study_page(source.name, rows, environments, source.text, sections))
    return rows


def _analyse(source: StudyFile, cells: Sequence[Cell], out: Path) -> tuple[list[str], list[Section]]:
    """The analyses of trained weights that the study asks for, as texts and sections; their rows go into files."""
    trained, texts, sections = Trained(), [], []
    if source.transfer:
        moved = {}
        for a, b in [(a, b) for b in cells for a in cells if (a.data, a.seed) == (b.data, b.seed)]:
            file = out / "transfer" / f"{a.key}-{b.key}.json"
            moved[a.key, b.key] = once(file, b, partial(trained.transfer, out / "weights" / a.key, b.recipe))
        rows = transfer_rows(cells, moved)
        write_json(out / "transfer.json", rows)
        texts.append(transfer_text(rows))
        sections.append(transfer_section(rows))
    if source.pruning:
        pruned = {}
        for cell, share in [(cell, share) for cell in cells for share in source.pruning]:
            file = out / "pruning" / f"{cell.key}-{share}.json"
            run = partial(trained.prune, out / "weights" / cell.key, cell.recipe, share)
            pruned[cell.key, share] = once(file, cell, run)
        rows = pruning_rows(cells, source.pruning, pruned)
        write_json(out / "pruning.json", rows)
        texts.append(pruning_text(rows))
        sections.append(pruning_section(rows))
    return texts, sections


def _count_membranes(source: StudyFile, cells: Sequence[Cell], out: Path, tell: OnProgress) -> list[Row]:
    """The study with train = false: `membranes/KEY.json` for every row instead of training runs."""
    files = {cell.key: out / "membranes" / f"{cell.key}.json" for cell in cells}
    _check_rows([cell for cell in cells if not files[cell.key].exists()], check_membranes)
    check_folder(out)
    results = {}
    for i, cell in enumerate(cells):
        tell(_place(i, cells, reused=files[cell.key].exists()), None)
        results[cell.key] = once(files[cell.key], cell, partial(measure_membranes, cell.recipe))
    rows = membrane_rows(cells, results)
    write_json(out / "study.json", rows)
    write_text(out / "table.txt", membrane_text(source.name, rows))
    write_text(out / "report.html", membrane_page(source.name, rows, source.text))
    return rows


def _place(i: int, cells: Sequence[Cell], *, reused: bool) -> dict[str, Any]:
    """Which run comes now, for whoever listens."""
    cell = cells[i]
    where = {"run": i + 1, "runs": len(cells), "variant": cell.variant, "data": cell.data, "seed": cell.seed}
    return {**where, "reused": reused}


def _check_run(recipe: Recipe) -> None:
    """Make data, model and optimiser of a run."""
    check_measurable("study", recipe)
    check(recipe)


def _check_rows(cells: Sequence[Cell], check_row: Callable[[Recipe], None] = _check_run) -> None:
    """Check every row once, so that no mistake waits for hours; seeds change none of it."""
    rows = {(cell.variant, cell.data): cell for cell in reversed(cells)}
    for cell in reversed(rows.values()):
        try:
            check_row(cell.recipe)
        except SpikefitError as error:
            raise type(error)(f"study: {cell.variant} / {cell.data}: {error}") from error


def summarise(
    cells: Sequence[Cell], records: dict[str, dict[str, Any]], memory: dict[str, dict[str, Any]]
) -> list[Row]:
    """One row per variant and data set, in the order of the cells; see `study` for the keys."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.variant), []).append(cell)
    rows = []
    for (data, variant), group in groups.items():
        runs = [records[cell.key] for cell in group]
        row: Row = {"data": data, "variant": variant, "n": len(group), "seeds": [cell.seed for cell in group]}
        for name in NUMBERS:
            values = [run[name] for run in runs]
            row[name] = statistics.fmean(values)
            row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{name}_values"] = values
        row |= next((memory[cell.key] for cell in group if cell.key in memory), {})
        row["history"] = _mean_history([run["history"] for run in runs])
        row["spike_rates"] = mean_by_layer([run["spike_rates"] for run in runs])
        row["parameters"] = runs[0]["parameters"]
        trained = runs[0]["recipe"]
        row["settings"] = settings_of(
            group[0].recipe, timesteps=trained["encoding"].get("timesteps"), device=runs[0]["environment"]["device"]
        )
        row["cells"] = [cell.key for cell in group]
        rows.append(row)
    return rows


def _is_finished(source: StudyFile, cell: Cell, out: Path) -> bool:
    """Whether all that is needed of a run is there."""
    kept = not (source.transfer or source.pruning) or has_weights(out / "weights" / cell.key)
    return kept and (out / "cells" / f"{cell.key}.json").exists()


def _run(
    source: StudyFile, cell: Cell, out: Path, listen: Callable[[ProgressEvent], None], progress: bool
) -> dict[str, Any]:
    if source.transfer or source.pruning:
        return train_and_keep(cell.recipe, out / "weights" / cell.key, listen, progress)
    return train(cell.recipe, on_progress=listen, progress=progress).to_dict()


def _mean_history(histories: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean over runs, epoch by epoch, of the numbers that all of them have."""
    mean = []
    for epochs in zip(*histories, strict=False):
        row = {"epoch": epochs[0]["epoch"]}
        for key in epochs[0]:
            values = [epoch.get(key) for epoch in epochs]
            if key != "epoch" and all(isinstance(value, int | float) for value in values):
                row[key] = statistics.fmean(values)
        mean.append(row)
    return mean
