"""From the words of the command line to recipes, models and samples."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikefit.data import Dataset
from spikefit.data.images import SUFFIXES, read_image
from spikefit.data.nmnist import read_events
from spikefit.errors import DataError, OptionError
from spikefit.models import MODELS
from spikefit.planning import Profile, profile, random_sample
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


def profile_target(target: str, changes: dict[str, str], *, predict_only: bool) -> Profile:
    """Profile one training step of `target` on random input of the right shape; keys as in a recipe."""
    recipe = read_recipe(target, changes)
    model = build_model(recipe)
    shape = getattr(model, "input_shape", None) or recipe.model.input_shape
    if shape is None:
        raise OptionError(f"profile: {target} has no input_shape; give image=CxHxW or shape=C.")
    fixed = getattr(model, "timesteps", None)
    timesteps = fixed or recipe.encoding.timesteps
    if timesteps is None:
        raise OptionError("profile: the recipe takes the time steps from its data; give encoding=repeat timesteps=T.")
    repeated = len(shape) == 3 and recipe.encoding.name == "repeat"
    x, y = random_sample(tuple(shape), timesteps, recipe.data.batch_size, repeated=repeated)
    precision = recipe.train.precision
    if precision == "64-true":
        model, x = model.double(), x.double()
    return profile(
        model,
        (x, y),
        predict_only=predict_only,
        backend=recipe.backend,
        loss=build_loss(recipe),
        autocast=precision == "bf16-mixed",
    )


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
