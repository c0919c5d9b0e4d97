"""From the sections of a recipe to the objects of a run."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikefit.data import Dataset, horizontal_flip, load_dataset, random_crop
from spikefit.encoding import Encoding, create_encoding
from spikefit.errors import DataError, OptionError, RecipeError
from spikefit.losses import create_loss
from spikefit.losses.losses import UNLABELLED, Loss
from spikefit.models import MODELS, create_model, use_strategy
from spikefit.models.table import model_options
from spikefit.training.options import near
from spikefit.training.recipe import Recipe, load_recipe

Augment = Callable[[Tensor, torch.Generator], Tensor]
AUGMENTS: dict[str, Callable[..., Augment]] = {"crop": random_crop, "flip": horizontal_flip}
# Kind of data -> the encodings that make sequences of it.
ENCODING_OF = {"image": ("repeat", "rate", "latency"), "sequence": ("sequence",), "events": ("event_frames",)}


class Data(NamedTuple):
    """The two splits of a data set."""

    train: Dataset
    test: Dataset


def derive_seed(seed: int, *parts: object) -> int:
    """A seed for one purpose and moment, in [0, 2^63); it depends on all arguments and on nothing else."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def build_data(recipe: Recipe) -> Data:
    """Read both splits of the data set of a recipe.

    Raises:
        RecipeError: the recipe names no data set.
        OptionError: an option out of range.
        DataError: a file is missing, truncated, unsafe or empty.
    """
    return Data(load_split(recipe, "train"), load_split(recipe, "test"))


def load_split(recipe: Recipe, split: str) -> Dataset:
    """Read one split, "train" or "test".

    Raises:
        RecipeError, OptionError, DataError: as `build_data`; also if the encoding is for another kind of data, if no
            sample has a label, or if the recipe writes fewer classes than the labels need.
    """
    section = recipe.data
    if section.name is None:
        raise RecipeError("recipe: data.name is missing; add data=digits, or the name of another data set.")
    dataset = load_dataset(section.name, section.root, split, **(section.model_extra or {}))
    fitting = ENCODING_OF[dataset.kind]
    if recipe.encoding.name not in fitting:
        raise OptionError(
            f"encoding {recipe.encoding.name}: expected {' or '.join(fitting)} for {dataset.name}, which holds data of "
            f"kind {dataset.kind!r}, got {recipe.encoding.name!r}; {_encoding_hint(dataset)}."
        )
    if int(dataset.targets.max()) == UNLABELLED:
        raise DataError(f"{dataset.name}: expected at least one label, got only {UNLABELLED}, which means none.")
    check_classes(recipe, dataset)
    return dataset


def check_classes(recipe: Recipe, dataset: Dataset) -> None:
    """Check that the classes a recipe writes hold all labels of `dataset`.

    Raises:
        OptionError: a label is no class of the model.
    """
    top = int(dataset.targets.max())
    if recipe.model.num_classes is not None and top >= recipe.model.num_classes:
        raise OptionError(
            f"model.num_classes: {dataset.name} has labels up to {top} and needs at least {top + 1} classes, got "
            f"{recipe.model.num_classes}; leave it out to take the classes of the training data, or give {top + 1}."
        )


def _encoding_hint(dataset: Dataset) -> str:
    """What to write for data of this kind."""
    if dataset.kind == "sequence":
        return "encoding=sequence takes the time steps of the data"
    if dataset.kind == "image":
        return "give encoding=repeat timesteps=8"
    return f"give encoding=event_frames timesteps=10 height={dataset.shape[1]} width={dataset.shape[2]}"


def build_augmentation(recipe: Recipe, dataset: Dataset) -> list[Augment]:
    """The functions of `data.augment`: "crop", "crop:2" (pixels), "flip", "flip:0.3" (probability).

    Raises:
        OptionError: unknown name, unreadable option, or data that are no images.
    """
    functions = []
    for text in recipe.data.augment:
        name, _, option = text.partition(":")
        if name not in AUGMENTS:
            raise OptionError(
                f"data.augment: expected some of {', '.join(AUGMENTS)}, got {text!r}.{near(name, AUGMENTS)}"
            )
        if dataset.kind != "image":
            raise OptionError(f"data.augment: {name} is for images, got {dataset.name} of kind {dataset.kind!r}.")
        try:
            functions.append(AUGMENTS[name](*([int(option) if name == "crop" else float(option)] if option else [])))
        except ValueError as error:
            raise OptionError(f"data.augment: cannot use {text!r}; {error}") from None
    return functions


def build_encoding(recipe: Recipe) -> Encoding:
    """The encoding of a recipe: `encoding(inputs, generator)` -> [T, B, ...]."""
    return create_encoding(recipe.encoding.name, **recipe.encoding.options())


def build_loss(recipe: Recipe) -> Loss:
    """The loss of a recipe: `loss(logits [T, B, K], targets [B])` -> scalar."""
    return create_loss(recipe.loss.name, **recipe.loss.options())


def build_model(recipe: Recipe, dataset: Dataset | None = None) -> nn.Module:
    """Make the model of a recipe with its neuron, norm, strategy and initial weights.

    Input shape, number of classes and length of the sequence are those of the encoded data, unless the recipe writes
    them. Weights depend on the seed alone; torch's global random numbers are left as they were.

    Args:
        recipe: the recipe; `model.name` is one of the zoo or `package.module:factory`.
        dataset: its data; None reads them, if the recipe names any and does not write the shapes itself.

    Returns:
        The model, sequence [T, B, ...] -> logits [T, B, K].

    Raises:
        RecipeError: the factory cannot be imported or refuses its options.
        OptionError: an option out of range.
    """
    options = _model_options(recipe, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        if recipe.model.name in MODELS:
            model: nn.Module = create_model(recipe.model.name, **options)
        else:
            model = _from_factory(recipe.model.name, options)
    return use_strategy(model, recipe.strategy.model_dump())


def written_out(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with the shapes that follow from its data written into it; its model can then be made without them."""
    options = _model_options(recipe, dataset)
    shapes = {k: options[k] for k in ("input_shape", "num_classes", "timesteps") if k in options}
    values = recipe.to_dict()
    values["model"] |= {k: list(v) if isinstance(v, tuple) else v for k, v in shapes.items()}
    return load_recipe(values)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters that need a gradient.

    Weight decay holds for weights of two or more axes; biases, norms and time constants have none.
    """
    section = recipe.train
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    return torch.optim.AdamW(groups, lr=section.lr, betas=(section.betas[0], section.betas[1]))


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a norm of the model takes statistics over the batch."""
    batch_norms = (nn.modules.batchnorm._BatchNorm,)
    return any(getattr(m, "time_scope", "none") != "none" or isinstance(m, batch_norms) for m in model.modules())


def _model_options(recipe: Recipe, dataset: Dataset | None) -> dict[str, Any]:
    section, options = recipe.model, recipe.model.options()
    options["norm"] = recipe.norm.name
    options["neuron"] = {"name": recipe.neuron.name, **recipe.neuron.options()}
    wants_timesteps = section.name in MODELS and "timesteps" in model_options(section.name)
    written = section.input_shape is not None and section.num_classes is not None
    if wants_timesteps and "timesteps" not in options:
        if recipe.encoding.timesteps is not None:
            options["timesteps"] = recipe.encoding.timesteps
        else:
            written = False
    if dataset is None and recipe.data.name is not None and not written:
        dataset = load_split(recipe, "test")
    if dataset is not None:
        sequence = build_encoding(recipe)(dataset.batch([0])[0], torch.Generator())
        options.setdefault("num_classes", len(dataset.classes))
        options.setdefault("input_shape", tuple(sequence.shape[2:]))
        if wants_timesteps:
            options.setdefault("timesteps", int(sequence.shape[0]))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _from_factory(path: str, options: dict[str, Any]) -> nn.Module:
    """Call `package.module:factory` with those of `options` it takes, and with all that the recipe wrote for it."""
    module, _, name = path.partition(":")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"model {path}: expected an importable package.module:factory; {error}.") from error
    parameters: Sequence[inspect.Parameter] = list(inspect.signature(factory).parameters.values())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    derived = {"num_classes", "input_shape", "timesteps", "norm", "neuron"}
    names = {p.name for p in parameters}
    chosen = {k: v for k, v in options.items() if k in names or takes_all or k not in derived}
    try:
        model = factory(**chosen)
    except TypeError as error:
        raise RecipeError(f"model {path}: it refused the options {', '.join(chosen) or 'none'}; {error}.") from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model {path}: expected an nn.Module from the factory, got {type(model).__name__}.")
    return model
