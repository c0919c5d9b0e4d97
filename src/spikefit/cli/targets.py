"""From the words of the command line to recipes, models and samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikefit.data import Dataset
from spikefit.data.images import SUFFIXES, read_image
from spikefit.data.nmnist import read_events
from spikefit.engines import Plan
from spikefit.errors import DataError, OptionError
from spikefit.models import MODELS, use_strategy
from spikefit.ops.dispatch import use_backend
from spikefit.planning import (
    Diagnosis,
    MemoryReport,
    Profile,
    Target,
    Verdict,
    doctor,
    plan,
    profile,
    random_sample,
    report,
    verify,
)
from spikefit.planning.target import LossFunction, training_step
from spikefit.training import Recipe, build_loss, build_model, load_recipe
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


@dataclass(frozen=True)
class Step:
    """One training step of a target: its model, a random batch of the right shape, and how it runs."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: LossFunction
    backend: str
    autocast: bool

    @property
    def sample(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets)."""
        return self.x, self.y


def read_step(verb: str, target: str, changes: dict[str, str]) -> Step:
    """The step that `target` and the settings describe; keys as in a recipe.

    Raises:
        OptionError: the target does not say what it takes.
    """
    recipe = read_recipe(target, changes)
    model = _model(recipe)
    shape = getattr(model, "input_shape", None) or recipe.model.input_shape
    if shape is None:
        raise OptionError(f"{verb}: {target} has no input_shape; give image=CxHxW or shape=C.")
    timesteps = getattr(model, "timesteps", None) or recipe.encoding.timesteps
    if timesteps is None:
        raise OptionError(f"{verb}: the recipe takes the time steps from its data; give encoding=repeat timesteps=T.")
    repeated = len(shape) == 3 and recipe.encoding.name == "repeat"
    x, y = random_sample(tuple(shape), timesteps, recipe.data.batch_size, repeated=repeated)
    precision = recipe.train.precision
    if precision == "64-true":
        # only the first step is converted, so that a repeated one stays a view
        model, x = model.double(), x[:1].double().expand(x.shape) if x.stride(0) == 0 else x.double()
    return Step(model, x, y, build_loss(recipe), recipe.backend, precision == "bf16-mixed")


def _model(recipe: Recipe) -> nn.Module:
    """The model of a recipe; unlike for training, a factory may return any torch module."""
    if ":" not in recipe.model.name:
        return build_model(recipe)
    options = {k: v for k, v in recipe.model.options().items() if k != "input_shape"}
    model = Target(recipe.model.name, options=options).build()
    return model if recipe.strategy.name == "bptt" else use_strategy(model, recipe.strategy.model_dump())


def profile_target(target: str, changes: dict[str, str], *, predict_only: bool) -> Profile:
    """Profile one training step of `target` on random input of the right shape."""
    step = read_step("profile", target, changes)
    return profile(
        step.model,
        step.sample,
        predict_only=predict_only,
        backend=step.backend,
        loss=step.loss,
        autocast=step.autocast,
    )


def plan_target(target: str, changes: dict[str, str]) -> Plan:
    """Plan `target` for the setting `budget`; `optimizer` counts its slots, none without it.

    Raises:
        OptionError: no budget.
    """
    settings = dict(changes)
    if "budget" not in settings:
        raise OptionError("plan: give the memory there is, budget=4GB (or budget=least).")
    budget = settings.pop("budget")
    optimizer = settings.get("optimizer")
    step = read_step("plan", target, settings)
    limit = None if budget == "least" else budget
    return plan(step.model, step.sample, limit, optimizer=optimizer, loss=step.loss, autocast=step.autocast)


def verify_target(target: str, changes: dict[str, str]) -> Verdict:
    """Verify the strategy of `target` on random input."""
    step = read_step("verify", target, changes)
    return verify(step.model, step.sample, loss=step.loss, backend=step.backend, autocast=step.autocast)


def report_target(target: str, changes: dict[str, str]) -> MemoryReport:
    """Report the strategy of `target`, or the plan for the setting `budget`."""
    settings = dict(changes)
    budget, optimizer = settings.pop("budget", None), settings.get("optimizer")
    step = read_step("report", target, settings)
    options: dict[str, Any] = {"optimizer": optimizer, "loss": step.loss, "autocast": step.autocast}
    made = None if budget is None else plan(step.model, step.sample, budget, **options)
    return report(step.model, step.sample, made, **options)


def doctor_target(target: str, changes: dict[str, str]) -> Diagnosis:
    """Run `doctor` over three SGD steps of `target` on random input.

    Raises:
        Exception: what the model raises.
    """
    step = read_step("doctor", target, changes)
    model = step.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train_once() -> None:
        if callable(reset := getattr(model, "reset", None)):
            reset()
        optimizer.zero_grad()
        training_step(model, step.x, step.y, step.loss, autocast=step.autocast)
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
    """The first array of a .npy or .npz, as [n, ...]."""
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return torch.from_numpy(np.array(content))
        with content:
            return torch.from_numpy(np.array(content[content.files[0]]))
    except (ValueError, OSError, EOFError, IndexError, TypeError) as error:
        raise DataError(f"predict: {file} cannot be read as a plain array ({error}).") from None
