"""From the sections of a recipe to the objects of a run."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from spikefit.data import Dataset, horizontal_flip, load_dataset, random_crop
from spikefit.data.batches import Augment
from spikefit.encoding import Encoding, create_encoding
from spikefit.errors import DataError, OptionError, RecipeError, TrainingError
from spikefit.layers import BatchNorm
from spikefit.losses import CrossEntropyHeads, create_loss
from spikefit.losses.losses import UNLABELLED, Loss
from spikefit.losses.model_loss import auxiliary_heads
from spikefit.models import MODELS, create_model
from spikefit.models.table import model_options
from spikefit.planning.target import Step, in_dtype, make_own, no_memory, random_sample
from spikefit.rules.table import Driver, parse_driver
from spikefit.training.options import fixed_parts, near
from spikefit.training.recipe import Recipe, load_recipe

AUGMENTS: dict[str, Callable[..., Augment]] = {"crop": random_crop, "flip": horizontal_flip}
# Kind of data -> the encodings that make sequences of it.
ENCODING_OF = {"image": ("repeat", "rate", "latency"), "sequence": ("sequence",), "events": ("event_frames",)}

# Options that follow from other sections; a factory of the user's own gets those that it takes.
DERIVED = ("num_classes", "input_shape", "timesteps", "norm", "neuron")
# Precisions in which one step is profiled: dtype of weights and input, and whether bfloat16 autocast is on.
STEP_PRECISIONS = {
    "32-true": (torch.float32, False),
    "64-true": (torch.float64, False),
    "bf16-mixed": (torch.float32, True),
}
# Accelerator -> the device whose memory is predicted; a step runs on the CPU only.
STEP_DEVICES = {"auto": "cpu", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}


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


def build_loss(recipe: Recipe, model: nn.Module | None = None) -> Loss:
    """The loss of a recipe: `loss(logits [T, B, K], targets [B])` -> scalar, with auxiliary logits if it reads them.

    A recipe without one takes "ce_heads" for a model with auxiliary heads, and "ce_mean" for any other.
    """
    usual = "ce_heads" if model is not None and auxiliary_heads(model) else "ce_mean"
    return create_loss(recipe.loss.name or usual, **recipe.loss.options())


def build_driver(recipe: Recipe) -> Driver:
    """How the batches of a recipe are trained: under a strategy, or by a rule."""
    return parse_driver(None if recipe.strategy.name is None else recipe.strategy.model_dump())


def build_model(recipe: Recipe, dataset: Dataset | None = None, *, learns: bool = True) -> nn.Module:
    """Make the model of a recipe with its neuron, norm, strategy and initial weights.

    Input shape, number of classes and length of the sequence are those of the encoded data, unless the recipe writes
    them. Weights depend on the seed alone; torch's global random numbers are left as they were.

    Args:
        recipe: the recipe; `model.name` is one of the zoo or `package.module:factory`.
        dataset: its data; None reads them, if the recipe names any and does not write the shapes itself.
        learns: whether it will be trained; one that is only evaluated or looked at may have auxiliary heads that the
            loss does not read.

    Returns:
        The model, sequence [T, B, ...] -> logits [T, B, K].

    Raises:
        OptionError: an option out of range, a factory that cannot be imported or refuses its options, or a loss that
            does not fit the auxiliary heads of the model.
        StrategyError: the strategy does not apply to the model; any torch module runs under bptt.
    """
    options = _model_options(recipe, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "weights"))
        if recipe.model.name in MODELS:
            model: nn.Module = create_model(recipe.model.name, **options)
        else:
            model = make_own(recipe.model.name, options, optional=DERIVED)
    _check_heads(recipe, model, learns)
    if recipe.norm.momentum is not None:
        _set_momentum(model, recipe.norm.momentum)
    return build_driver(recipe).apply(model)


def _set_momentum(model: nn.Module, momentum: float) -> None:
    norms = [m for m in model.modules() if isinstance(m, BatchNorm | nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise OptionError(
            f"norm: momentum={momentum:g} is of running statistics, and {type(model).__name__} has a norm with none; "
            "leave it out, or use norm=bn or step_bn."
        )
    for norm in norms:
        norm.momentum = momentum


def _check_heads(recipe: Recipe, model: nn.Module, learns: bool) -> None:
    """Raise OptionError unless the loss reads the auxiliary heads that the model has, and no others."""
    name, loss, heads = recipe.model.name, build_loss(recipe, model), auxiliary_heads(model)
    if loss.reads_auxiliary and not heads:
        off = recipe.model.options().get("auxiliary") is False
        raise OptionError(
            f"loss {recipe.loss.name}: expected a model with auxiliary heads, got {name}, which has none; use "
            f"loss=ce_mean{', or model.auxiliary=true' if off else ''}."
        )
    if heads and learns and not loss.reads_auxiliary:
        without = "model.auxiliary=false" if name in MODELS else "make the model without them"
        raise OptionError(
            f"model {name}: expected a loss that reads its {heads} auxiliary heads, got loss={recipe.loss.name}, with "
            f"which they would never learn; use loss=ce_heads, or {without}."
        )
    if isinstance(loss, CrossEntropyHeads):
        loss.weights_for(heads)


def build_step(source: str | Path | Mapping[str, Any] | Recipe, *, shapes_only: bool = False) -> Step:
    """One training step of a recipe on a random batch of the right shape, on the CPU.

    Args:
        source: path, dictionary or `Recipe`.
        shapes_only: make tensors that have shapes but no memory, enough for all that is predicted.

    Raises:
        OptionError: the recipe does not say the shape of a sample or the number of steps, or its precision or device
            is none that a step is profiled in.
        RecipeError, DataError: the recipe or its data make no sense.

    Example:
        spikefit.profile(build_step("recipes/demo.toml")).measured_peak_bytes
    """
    recipe = load_recipe(source)
    who, section = recipe.model.name, recipe.train
    if section.precision not in STEP_PRECISIONS:
        raise OptionError(
            f"step of {who}: expected train.precision as one of {', '.join(STEP_PRECISIONS)}, got "
            f"{section.precision!r}; bytes and gradients are known for these only."
        )
    device = STEP_DEVICES.get(section.accelerator)
    if device is None or (device != "cpu" and not shapes_only):
        raise OptionError(
            f"step of {who}: it is run on the CPU, got train.accelerator={section.accelerator!r}; add accelerator=cpu, "
            "or only predict it. In Python, profile(model.cuda(), x.cuda()) runs on a GPU."
        )
    dtype, autocast = STEP_PRECISIONS[section.precision]
    # files are read before tensors lose their memory
    if recipe.data.name is not None and not _shapes_are_written(recipe):
        recipe = written_out(recipe, load_split(recipe, "test"))
    with no_memory(shapes_only):
        model = in_dtype(build_model(recipe), dtype)
        shape = getattr(model, "input_shape", None) or recipe.model.input_shape
        if shape is None:
            raise OptionError(f"step of {who}: the model has no input_shape; give image=CxHxW or shape=C.")
        timesteps = getattr(model, "timesteps", None) or recipe.encoding.timesteps
        if timesteps is None:
            raise OptionError(
                f"step of {who}: the recipe takes the time steps from its data; give encoding=repeat timesteps=T."
            )
        repeated = len(shape) == 3 and recipe.encoding.name == "repeat"
        x, y = random_sample(tuple(shape), timesteps, recipe.data.batch_size, repeated=repeated, dtype=dtype)
    return Step(model, x, y, build_loss(recipe, model), recipe.backend, autocast, device, build_driver(recipe))


def written_out(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with the shapes that follow from its data written into it; its model can then be made without them."""
    options = _model_options(recipe, dataset)
    shapes = {k: options[k] for k in ("input_shape", "num_classes", "timesteps") if k in options}
    values = recipe.to_dict()
    values["model"] |= {k: list(v) if isinstance(v, tuple) else v for k, v in shapes.items()}
    return load_recipe(values)


def make_fabric(who: str, recipe: Recipe, *, devices: int = 1) -> Fabric:
    """Device and precision of a recipe, for the verb `who`.

    Raises:
        TrainingError: this machine lacks them.
    """
    section = recipe.train
    try:
        return Fabric(accelerator=section.accelerator, devices=devices, precision=section.precision)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainingError(
            f"{who}: this machine cannot give accelerator, devices or precision asked for ({section.accelerator}, "
            f"{devices}, {section.precision}); {error}"
        ) from error


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
    options = recipe.model.options()
    if recipe.norm.name is not None:
        options["norm"] = recipe.norm.name
    if "neuron" not in fixed_parts(recipe.model.name):
        options["neuron"] = {"name": recipe.neuron.name, **recipe.neuron.options()}
    wants_timesteps = _wants_timesteps(recipe)
    if wants_timesteps and recipe.encoding.timesteps is not None:
        options.setdefault("timesteps", recipe.encoding.timesteps)
    if dataset is None and recipe.data.name is not None and not _shapes_are_written(recipe):
        dataset = load_split(recipe, "test")
    if dataset is not None:
        sequence = build_encoding(recipe)(dataset.batch([0])[0], torch.Generator())
        options.setdefault("num_classes", len(dataset.classes))
        options.setdefault("input_shape", tuple(sequence.shape[2:]))
        if wants_timesteps:
            options.setdefault("timesteps", int(sequence.shape[0]))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _wants_timesteps(recipe: Recipe) -> bool:
    return recipe.model.name in MODELS and "timesteps" in model_options(recipe.model.name)


def _shapes_are_written(recipe: Recipe) -> bool:
    """Whether the model can be made without a look at the data."""
    section = recipe.model
    length = "timesteps" in section.options() or recipe.encoding.timesteps is not None
    return (
        section.input_shape is not None and section.num_classes is not None and (length or not _wants_timesteps(recipe))
    )
