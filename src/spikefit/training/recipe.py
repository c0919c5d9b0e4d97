"""Recipes: one run as a TOML file, read from top to bottom in the order the data flows, checked before it starts."""

import inspect
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spikefit.data import DATASETS, load_dataset
from spikefit.encoding import ENCODINGS, create_encoding
from spikefit.encoding.table import ALIASES
from spikefit.errors import OptionError, RecipeError
from spikefit.layers import NORMS
from spikefit.layers.window_block import NORMS as WINDOW_NORMS
from spikefit.losses import LOSSES, create_loss
from spikefit.models import MODELS
from spikefit.neurons import NEURONS, create_neuron
from spikefit.neurons.table import neuron_options
from spikefit.rules import parse_driver
from spikefit.training.options import (
    annotations,
    check_options,
    check_types,
    describe,
    fixed_parts,
    near,
    preset_for,
    takes_none,
    unknown_key,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of the sections: immutable, strict about types, closed unless `extra` is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    def options(self) -> dict[str, Any]:
        """What is written besides the name, without empty entries."""
        return {k: v for k, v in self.model_dump().items() if k != "name" and v is not None}


class OpenSection(Section):
    """A section whose further keys are options of the thing it names."""

    model_config = ConfigDict(extra="allow")


class DataSection(OpenSection):
    """Which data set, where it lies, how it is cut into batches; further keys are options of `load_dataset`."""

    name: str | None = None
    root: str | None = None
    batch_size: Count = 64
    drop_last: bool = False
    augment: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is None:
            return self
        if self.name not in DATASETS:
            raise OptionError(
                f"data: expected one of {', '.join(DATASETS)}, got {self.name!r}.{near(self.name, DATASETS)}"
            )
        check_types(f"data {self.name}", data_options(self.name), self.model_extra or {})
        return self


def data_options(name: str) -> dict[str, Any]:
    """Name -> type of the options that `load_dataset(name, ...)` takes besides root and split."""
    known = annotations(load_dataset) | annotations(DATASETS[name].load)
    return {k: v for k, v in known.items() if k not in ("name", "root", "split")}


class EncodingSection(OpenSection):
    """How samples become sequences; further keys are options of the encoding."""

    name: Annotated[str, BeforeValidator(lambda name: ALIASES.get(name, name) if isinstance(name, str) else name)] = (
        "repeat"
    )
    timesteps: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name in ENCODINGS:
            check_options(f"encoding {self.name}", ENCODINGS[self.name], self.options())
        create_encoding(self.name, **self.options())
        return self


class ModelSection(OpenSection):
    """A model of the zoo or `package.module:factory`; further keys are its options.

    "none" means None for options of the zoo that can be None and are no texts, as TOML has no word for it.
    """

    name: str
    num_classes: Count | None = None
    input_shape: list[Count] | None = None

    def options(self) -> dict[str, Any]:
        known = annotations(MODELS[self.name].make) if self.name in MODELS else {}
        return {k: None if v == "none" and takes_none(known.get(k)) else v for k, v in super().options().items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name in MODELS:
            check_options(f"model {self.name}", MODELS[self.name].make, self.options(), reserved={"norm", "neuron"})
        elif ":" not in self.name:
            raise OptionError(
                f"model: expected one of {', '.join(MODELS)}, or package.module:factory, "
                f"got {self.name!r}.{near(self.name, MODELS)}"
            )
        return self


class NeuronSection(Section):
    """The neuron of every unit, with all of its options; `v_reset = "soft"` subtracts the threshold."""

    name: str = "lif"
    tau: float | None = None
    decay_input: bool | None = None
    v_threshold: float = 1.0
    v_reset: Literal["soft"] | float = "soft"
    detach_reset: bool = True
    surrogate: str = "atan(2)"
    v_rest: float | None = None
    reset: bool = True
    strict: bool = False
    frac_bits: int | None = None
    alpha: float | None = None
    beta: float | None = None
    kappa: float | None = None
    check: Literal["off", "spikes"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        # not every neuron has them, so they cannot be plain defaults
        name = values.get("name", "lif") if isinstance(values, dict) else None
        if name not in NEURONS:
            return values
        own = inspect.signature(NEURONS[name]).parameters.values()
        return {p.name: p.default for p in own if p.name in cls.model_fields} | values

    def options(self) -> dict[str, Any]:
        """What is written besides the name; fields at the value of a neuron that does not take them are left out."""
        found = super().options()
        taken = neuron_options(NEURONS[self.name]) if self.name in NEURONS else set(found)
        untouched = {"reset": True, "strict": False}
        return {k: v for k, v in found.items() if k in taken or v != untouched.get(k)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        create_neuron(self.name, **self.options())
        return self


class NormSection(Section):
    """The norm of every unit; without a name that of the model, "bn", or "step_bn" where layers share a membrane.

    "rms" is one of blocks of windows, which refuse others. momentum is the share of a call in the running statistics,
    of a step under "step_bn", where running statistics reach back 1 / (T momentum) batches; 0.1 without it.
    """

    name: Literal[tuple(dict.fromkeys((*NORMS, *WINDOW_NORMS)))] | None = None  # type: ignore[valid-type]
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None


class StrategySection(OpenSection):
    """How gradients are obtained, `{ name = "checkpoint", every = 2 }` or `"checkpoint:2"`; or the rule that drives
    each step, `{ name = "sltt", inside = "lean" }`, inside being the strategy of one step.

    Without a name as the model is made: "replay" where it shares membranes, else "bptt".
    """

    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is not None:
            parse_driver(self.model_dump())
        elif self.model_extra:
            raise OptionError(f"strategy: {', '.join(self.model_extra)} belong to a strategy; add its name.")
        return self


class LossSection(OpenSection):
    """The loss; further keys are its options, such as label_smoothing.

    Without a name that of the model: "ce_heads" where it has auxiliary heads, else "ce_mean".
    """

    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        name = "ce_mean" if self.name is None else self.name
        if name in LOSSES:
            check_options(f"loss {name}", LOSSES[name], self.options())
        create_loss(name, **self.options())
        return self


class TrainSection(Section):
    """Optimiser, schedule and the rest of the loop.

    Units: lr per update; warmup_epochs in epochs; checkpoint_every in updates (0: at the end of every epoch only);
    accumulate in batches per update; ema is the decay of averaged weights, 0 for none; clip_norm 0 for none.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Positive = 1e-3
    momentum: Share = 0.9
    weight_decay: NotNegative = 0.0
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    epochs: Count = 10
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    clip_norm: NotNegative = 0.0
    ema: Share = 0.0
    accumulate: Count = 1
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: Count = 1
    checkpoint_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise OptionError(
                f"train.warmup_epochs: expected fewer than train.epochs = {self.epochs}, got {self.warmup_epochs}."
            )
        return self


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    """One run. Sections stand in the order the data flows; a section may be just a name, `norm = "bn"`.

    Attributes:
        status: "untested", or what was measured, where and when.
        seed: of weights, order of the data, augmentation, random encodings and dropout.
        backend: "auto", "reference", "numba" or "triton".
        data, encoding, model, neuron, norm, strategy, loss, train: see the sections of this file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    SECTIONS: ClassVar[tuple[str, ...]] = (
        "data",
        "encoding",
        "model",
        "neuron",
        "norm",
        "strategy",
        "loss",
        "train",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        """Write what `model.preset` stands for into the sections that the recipe leaves out."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or "preset" not in model:
            return values
        preset = preset_for(str(model.get("name")), model["preset"])
        rest = {k: v for k, v in model.items() if k != "preset"}
        return {"neuron": preset.neuron, "norm": preset.norm, **values, "model": rest}

    @model_validator(mode="before")
    @classmethod
    def _fill_steps(cls, values: Any) -> Any:
        """A recipe without an encoding shows images as often as its model can be run."""
        model = values.get("model") if isinstance(values, dict) else None
        only = _only_steps(model.get("name") if isinstance(model, dict) else model)
        if only is None or "encoding" in values:
            return values
        return {**values, "encoding": {"name": "repeat", "timesteps": only}}

    status: str = "untested"
    seed: Annotated[int, Field(ge=0)] = 0
    backend: Literal["auto", "reference", "numba", "triton"] = "auto"
    data: Annotated[DataSection, BeforeValidator(_named)] = DataSection()
    encoding: Annotated[EncodingSection, BeforeValidator(_named)] = EncodingSection(name="repeat", timesteps=8)
    model: Annotated[ModelSection, BeforeValidator(_named)]
    neuron: Annotated[NeuronSection, BeforeValidator(_named)] = NeuronSection()
    norm: Annotated[NormSection, BeforeValidator(_named)] = NormSection()
    strategy: Annotated[StrategySection, BeforeValidator(_named)] = StrategySection()
    loss: Annotated[LossSection, BeforeValidator(_named)] = LossSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        """Refuse a number of steps that the model does not work in."""
        only, given = _only_steps(self.model.name), self.encoding.timesteps
        if only is not None and given not in (None, only):
            raise OptionError(
                f"model {self.model.name}: it works in {only} time step{'s' * (only > 1)} only, got "
                f"encoding.timesteps={given}; write timesteps={only}."
            )
        return self

    @model_validator(mode="after")
    def _check_fixed_parts(self) -> Self:
        """Refuse a neuron or norm that the model has no place for."""
        name, fixed = self.model.name, fixed_parts(self.model.name)
        if "neuron" in fixed and self.neuron != NeuronSection():
            usual = NeuronSection(name=self.neuron.name).model_dump()
            given = {k: v for k, v in self.neuron.model_dump().items() if k == "name" or v != usual[k]}
            raise OptionError(
                f"model {name}: its neurons have one fixed form and take no options, got neuron={given}; leave the "
                "neuron section out."
            )
        if "norm" in fixed and self.norm != NormSection():
            raise OptionError(
                f"model {name}: its norms are part of it and cannot be chosen, got "
                f"norm={self.norm.model_dump(exclude_none=True)}; leave the norm section out."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able values; `load_recipe` reads it back."""
        return self.model_dump(mode="json", exclude_none=True)

    def override(self, changes: Mapping[str, Any]) -> "Recipe":
        """The recipe with some keys changed, as the command line writes them.

        Args:
            changes: key -> value; keys dotted ("train.lr"), or flat where only one section has them ("lr", "tau",
                "width"); "timesteps", "batch", "image" and the section names ("model", "strategy", ...) are short
                forms. Values are texts ("0.1", "3x32x32", "true") or Python values.

        A new name drops the options that only the thing before it had, for a model without a choice of neuron or norm
        these sections too; a new neuron also takes its own defaults, in the place of values that were the defaults of
        the one before.

        Raises:
            RecipeError: unknown key, with near ones, or a value of the wrong type.

        Example:
            recipe.override({"strategy": "checkpoint:2", "lr": "0.1", "image": "3x32x32"})
        """
        from spikefit.training.grammar import apply_changes  # here, because the grammar reads the sections above

        return load_recipe(apply_changes(self, changes))


def _only_steps(model: Any) -> int | None:
    """The only number of steps that a model of the zoo works in, if there is one."""
    return MODELS[model].timesteps if isinstance(model, str) and model in MODELS else None


def load_recipe(source: "str | Path | Mapping[str, Any] | Recipe") -> Recipe:
    """Read and check a recipe.

    Args:
        source: path of a TOML file, the same as a dictionary, or a `Recipe`.

    Raises:
        RecipeError: no such file, invalid TOML (with its line), unknown or missing key, or a wrong type.

    Example:
        recipe = load_recipe("recipes/demo.toml").override({"epochs": "3"})
    """
    if isinstance(source, Recipe):
        return source
    who, values = "recipe", source
    if not isinstance(source, Mapping):
        path = Path(source)
        who, values = f"recipe {path}", _read(path)
    return _checked(who, lambda: Recipe.model_validate(dict(values)))  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: expected a TOML file, found none at this path.") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path}: expected valid TOML; {error}. Texts need quotes, tables braces.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: expected a readable TOML file in UTF-8; {error}.") from None


def _checked(who: str, make: Callable[[], Recipe]) -> Recipe:
    """Run `make`; the first complaint of pydantic becomes one sentence."""
    try:
        return make()
    except ValidationError as error:
        raise RecipeError(f"{who}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    keys, first_loc = [str(part) for part in first["loc"]], list(first["loc"][:2])
    key = ".".join(keys[:2])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, OptionError | ValueError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        return unknown_key(key, _known(keys[:-1]))
    if first["type"] == "missing":
        return f'key {key!r} is missing; add it, for example model = {{ name = "vgg6" }}.'
    # a key that takes two types complains once about each
    same = [e["msg"].removeprefix("Input should be ") for e in error.errors() if list(e["loc"][:2]) == first_loc]
    return f"{key}: expected {' or '.join(same)}, got {describe(first['input'])}."


def _known(section: list[str]) -> list[str]:
    if not section:
        return list(Recipe.model_fields)
    annotation = Recipe.model_fields[section[0]].annotation
    return [f"{section[0]}.{k}" for k in annotation.model_fields]  # type: ignore[union-attr]
