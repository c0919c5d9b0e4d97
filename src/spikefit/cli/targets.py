"""From the words of the command line to recipes, models and samples."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikefit.data import Dataset
from spikefit.data.images import SUFFIXES, read_image
from spikefit.data.nmnist import read_events
from spikefit.engines import Plan
from spikefit.errors import DataError, OptionError, StrategyError
from spikefit.models import MODELS
from spikefit.ops.dispatch import use_backend
from spikefit.planning import (
    Diagnosis,
    MemoryReport,
    Profile,
    Verdict,
    doctor,
    plan,
    profile,
    report,
    verify,
)
from spikefit.planning.target import Step, training_step
from spikefit.training import Recipe, build_step, load_recipe
from spikefit.training.options import near


def read_recipe(target: str, changes: dict[str, str]) -> Recipe:
    """The recipe that `target` names (a file, a model or a factory), with `changes` made.

    Raises:
        OptionError: the target is none of the three; near model names are listed.
        RecipeError: the file or a key is wrong.
    """
    if target.endswith(".toml") or Path(target).is_file():
        recipe = load_recipe(target)
    elif target in MODELS or ":" in target:
        recipe = load_recipe({"model": {"name": target}})
    else:
        raise OptionError(
            f"expected a model ({', '.join(MODELS)}), a recipe file (.toml) or package.module:factory, "
            f"got {target!r}.{near(target, MODELS)}"
        )
    return recipe.override(changes) if changes else recipe


def read_step(target: str, changes: dict[str, str], *, shapes_only: bool = False) -> Step:
    """The step that `target` and the settings describe; keys as in a recipe."""
    return build_step(read_recipe(target, changes), shapes_only=shapes_only)


# What to do where a verb is about backward over a whole sequence, and a rule runs the step.
INSTEAD = {
    "plan": "its memory does not grow with T, and strategy.inside=lean:spikes takes less of it within a step",
    "verify": "its gradient is not that of BPTT, and spikefit compare tells how far it is",
    "report": "nothing is kept over the sequence, and spikefit profile tells the bytes of a step",
}


def _whole_step(verb: str, target: str, changes: dict[str, str], *, shapes_only: bool = False) -> Step:
    """As `read_step`, for a verb about whole sequences.

    Raises:
        StrategyError: a rule runs the step.
    """
    step = read_step(target, changes, shapes_only=shapes_only)
    if step.driver.rule is not None:
        raise StrategyError(
            f"{verb}: expected a strategy that trains whole sequences, got the rule {step.driver}; {INSTEAD[verb]}."
        )
    return step


def profile_target(target: str, changes: dict[str, str], *, predict_only: bool) -> Profile:
    """Profile one training step of `target` on random input of the right shape."""
    return profile(read_step(target, changes, shapes_only=predict_only), predict_only=predict_only)


def plan_target(target: str, changes: dict[str, str]) -> Plan:
    """Plan `target` for the setting `budget`; `optimizer` counts its slots, none without it.

    Raises:
        OptionError: no budget.
    """
    settings = dict(changes)
    if "budget" not in settings:
        raise OptionError("plan: give the memory there is, budget=4GB (or budget=least).")
    limit = _limit(settings.pop("budget"))
    optimizer = settings.get("optimizer")
    step = _whole_step("plan", target, settings, shapes_only=True)
    with use_backend(step.backend):
        return plan(
            step.model,
            step.sample,
            limit,
            optimizer=optimizer,
            loss=step.loss,
            autocast=step.autocast,
            device=step.device,
        )


def _limit(budget: str) -> str | None:
    """A budget as it is written; None for the least memory there is."""
    return None if budget == "least" else budget


def verify_target(target: str, changes: dict[str, str]) -> Verdict:
    """Verify the strategy of `target` on random input."""
    step = _whole_step("verify", target, changes)
    return verify(step.model, step.sample, loss=step.loss, backend=step.backend, autocast=step.autocast)


def report_target(target: str, changes: dict[str, str]) -> MemoryReport:
    """Report the strategy of `target`, or the plan for the setting `budget`."""
    settings = dict(changes)
    budget, optimizer = settings.pop("budget", None), settings.get("optimizer")
    step = _whole_step("report", target, settings, shapes_only=True)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "loss": step.loss,
        "autocast": step.autocast,
        "device": step.device,
    }
    with use_backend(step.backend):
        made = None if budget is None else plan(step.model, step.sample, _limit(budget), **options)
        return report(step.model, step.sample, made, **options)


def doctor_target(target: str, changes: dict[str, str]) -> Diagnosis:
    """Run `doctor` over three SGD steps of `target` on random input.

    Raises:
        Exception: what the model raises.
    """
    step = read_step(target, changes)
    model = step.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train_once() -> None:
        if callable(reset := getattr(model, "reset", None)):
            reset()
        optimizer.zero_grad()
        training_step(model, step.x, step.y, step.loss, autocast=step.autocast, driver=step.driver)
        optimizer.step()

    with use_backend(step.backend):
        return doctor(model, train_once)


def checkpoint_recipe(checkpoint: Path) -> Recipe:
    """The recipe that the weights in `checkpoint` were trained with."""
    from spikefit.training.evaluation import open_checkpoint

    return load_recipe(open_checkpoint(checkpoint).state["recipe"])


def read_samples(file: Path, recipe: Recipe) -> Any:
    """Samples of a file, scaled and normalised as the recipe's data are.

    Raises:
        DataError: no such file, an unknown kind, or nothing readable in it.
    """
    if not file.is_file():
        raise DataError(f"predict: expected a file with samples, found none at {file}.")
    if file.suffix == ".bin":
        return [read_events(file)]
    shape = tuple(recipe.model.input_shape or ())
    if file.suffix.lower() in SUFFIXES:
        if len(shape) != 3:
            raise DataError(f"predict: {file} is an image, but the model takes samples of shape {shape}.")
        x = read_image(file, side=shape[1], channels=shape[0]).unsqueeze(0)
    elif file.suffix in (".npy", ".npz"):
        x = _array(file)
    else:
        raise DataError(f"predict: expected .npy, .npz, an image or .bin, got {file.name}.")
    options = recipe.data.model_extra or {}
    mean, std = options.get("mean"), options.get("std")
    samples = Dataset(
        name=str(file),
        inputs=x,
        targets=torch.zeros(len(x), dtype=torch.int64),
        classes=["unknown"],
        kind="image" if x.ndim == 4 else "sequence",
        shape=tuple(x.shape[1:]) if x.ndim == 4 else (x.shape[-1],),
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
    )
    return samples.batch(range(len(samples)))[0]


def _array(file: Path) -> torch.Tensor:
    """The first array of a .npy or .npz, as [n, ...] of finite numbers.

    Raises:
        DataError: nothing in it, or something else than such numbers.
    """
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            array = content
        else:
            with content:
                if not content.files:
                    raise DataError(f"predict: expected an array of samples in {file}, found none.")
                array = content[content.files[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"predict: {file} cannot be read as a plain array ({error}).") from None
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"predict: expected real numbers in {file}, got {array.dtype}; save them with numpy.save as float32."
        )
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"predict: expected samples [n, ...] in {file}, got an array of shape {array.shape}.")
    if not np.isfinite(array).all():
        raise DataError(f"predict: expected finite numbers in {file}, got some that are NaN or infinite.")
    # bytes are pixels of 0 to 255; the others torch may not know (uint32), so they become what the model takes
    return torch.from_numpy(array.copy() if array.dtype == np.uint8 else array.astype(np.float32))
