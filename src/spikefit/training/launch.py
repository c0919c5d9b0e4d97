"""The verb `train`: checks, device, and one `Run` from its start or its newest checkpoint to its end."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spikefit.errors import CheckpointError
from spikefit.ops.dispatch import use_backend
from spikefit.training.build import build_data, make_fabric
from spikefit.training.checkpoint import checkpoints
from spikefit.training.files import check_folder
from spikefit.training.progress import ProgressBar
from spikefit.training.recipe import Recipe, load_recipe
from spikefit.training.record import TrainRecord
from spikefit.training.run import OnProgress, Run


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    progress: bool = False,
) -> TrainRecord:
    """Train the model of a recipe on its data.

    Args:
        recipe: path, dictionary or `Recipe`; `load_recipe(path).override({...})` changes keys.
        out: folder for checkpoints and record.json; None writes nothing.
        resume: go on from the newest checkpoint in `out`, or start if there is none. On CPU the final weights are those
            of an uninterrupted run, bit for bit.
        on_progress: called with a `ProgressEvent` at the start, after every update and epoch, and at the end.
        progress: draw a progress bar on standard error.

    Returns:
        TrainRecord; in a run of several processes each returns it, the first one writes.

    Raises:
        RecipeError, OptionError, DataError: the recipe or its data make no sense.
        CheckpointError: `out` holds checkpoints and `resume` is False, or they are damaged or of another run.
        TrainingError: this machine lacks the device or precision, the loss or a gradient is not finite, or no batch is
            left to train on.

    Example:
        record = spikefit.train("recipes/demo.toml", out="runs/demo", progress=True)
        print(record.accuracy)
    """
    recipe = load_recipe(recipe)
    if resume and out is None:
        raise CheckpointError("train: resume=True needs out=FOLDER, the folder of the run to go on with.")
    if out is not None and not resume and checkpoints(out):
        raise CheckpointError(
            f"train: {out} already holds checkpoints; go on with resume=True (--resume on the command line), or "
            "choose another folder."
        )
    fabric = make_fabric("train", recipe, devices=recipe.train.devices)
    fabric.launch()
    devices = [fabric.device.index or 0] if fabric.device.type == "cuda" else []
    listeners = [on_progress] if on_progress else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(use_backend(recipe.backend))
        if progress and fabric.is_global_zero:
            listeners.append(
                stack.enter_context(ProgressBar(f"{recipe.model.name} {recipe.strategy.name or ''}".rstrip()))
            )
        run = Run(recipe, build_data(recipe), fabric, out, listeners if fabric.is_global_zero else [])
        if out is not None and fabric.is_global_zero:
            check_folder(out)
        if resume:
            run.restore()
        return run.finish()


def check(recipe: Recipe) -> None:
    """Make all that a run of `recipe` is made of and drop it, so that what cannot work is told without training.

    Raises:
        RecipeError, OptionError, DataError, TrainingError: as `train`, before its first update.
    """
    fabric = make_fabric("train", recipe, devices=recipe.train.devices)
    with torch.random.fork_rng(devices=[]), use_backend(recipe.backend):
        Run(recipe, build_data(recipe), fabric, None, [])
