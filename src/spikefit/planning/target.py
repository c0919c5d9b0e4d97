"""What is profiled: a model, and one training step on a batch of it."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError
from spikefit.losses.model_loss import LossFunction
from spikefit.models import MODELS, create_model
from spikefit.models.table import model_options
from spikefit.rules.table import WHOLE, Driver, parse_driver


@dataclass(frozen=True)
class Target:
    """A model that can be made again in another process, and the size of its batch.

    Attributes:
        model: a name of the zoo, or "package.module:factory" of your own, importable from the working directory.
        options: keyword options of the model.
        strategy: a strategy or a rule; None for the strategy with which the model is made.
        backend: of all operations.
        timesteps, batch: T and B; None for the only T that the model works in, or 8.
        input_shape: shape of one sample; None takes that of the model.
        encoding: "repeat" shows one sample at every step (static images), "sequence" makes a dense one; None takes
            "repeat" for images.
        dtype: "float32", "float64", or "bfloat16" for autocast.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    backend: str = "auto"
    timesteps: int | None = None
    batch: int = 64
    input_shape: tuple[int, ...] | None = None
    encoding: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("timesteps", self.steps), ("batch", self.batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"profile: {name} must be a whole number of at least 1, got {value!r}.")
        if self.encoding not in (None, "repeat", "sequence"):
            raise OptionError(f"profile: encoding must be 'repeat' or 'sequence', got {self.encoding!r}.")
        if self.dtype not in ("float32", "float64", "bfloat16"):
            raise OptionError(f"profile: dtype must be float32, float64 or bfloat16, got {self.dtype!r}.")

    @property
    def steps(self) -> int:
        """T."""
        if self.timesteps is not None:
            return self.timesteps
        return (self.model in MODELS and MODELS[self.model].timesteps) or 8

    @property
    def driver(self) -> Driver:
        """How a batch is trained."""
        return parse_driver(self.strategy)

    def build(self) -> nn.Module:
        """Make the model, in training mode, with strategy and dtype set."""
        options = dict(self.options)
        if self.input_shape is not None:
            options.setdefault("input_shape", tuple(self.input_shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if ":" in self.model:
                model = make_own(self.model, options, optional=("input_shape",))
            else:
                # a network of fixed length gets that of the sample
                if self.model in MODELS and "timesteps" in model_options(self.model):
                    options.setdefault("timesteps", self.steps)
                model = create_model(self.model, **options)
        return in_dtype(self.driver.apply(model), torch.float64 if self.dtype == "float64" else torch.float32)

    def sample(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Random input [T, B, ...] and targets [B] of the right shapes."""
        shape = self.input_shape or getattr(model, "input_shape", None)
        if shape is None:
            raise OptionError(f"profile: {self.model} has no input_shape; give image=CxHxW or input_shape=C.")
        repeated = None if self.encoding is None else self.encoding == "repeat"
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        return random_sample(tuple(shape), self.steps, self.batch, repeated=repeated, dtype=dtype)

    def step(self, loss: "LossFunction | None" = None, *, shapes_only: bool = False) -> "Step":
        """Its training step; with `shapes_only` of tensors that have no memory, enough for all that is predicted."""
        with no_memory(shapes_only):
            model = self.build()
            x, y = self.sample(model)
        return Step(model, x, y, loss or mean_cross_entropy, self.backend, self.dtype == "bfloat16", driver=self.driver)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def named(cls, model: str, **settings: Any) -> "Target":
        """A target from words as the command line has them.

        Args:
            model: as above.
            **settings: the fields above; `image` or `shape`, "3x32x32" or (3, 32, 32), for `input_shape`; every other
                word is an option of the model, such as width.

        Raises:
            OptionError: a recipe file, a shape that cannot be read, or one given twice.
        """
        if model.endswith(".toml"):
            raise OptionError(
                f"profile: {model} is a recipe, which says more than a model; make its step with "
                f'spikefit.training.build_step("{model}") and profile that.'
            )
        shapes = {k: settings.pop(k) for k in ("image", "shape", "input_shape") if settings.get(k) is not None}
        if len(shapes) > 1:
            raise OptionError(f"profile: {' and '.join(shapes)} mean the same; give one of them.")
        own = {f.name for f in fields(cls)} - {"model", "options"}
        options = {**(settings.pop("options", None) or {}), **{k: v for k, v in settings.items() if k not in own}}
        shape = read_shape(next(iter(shapes.values()))) if shapes else None
        return cls(model, options=options, input_shape=shape, **{k: v for k, v in settings.items() if k in own})


@dataclass(frozen=True)
class Step:
    """One training step: a model with a batch of the right shape, and how and where it runs."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: LossFunction
    backend: str = "auto"
    autocast: bool = False
    device: str | None = None  # where the step is to run, if not where its tensors are
    driver: Driver = WHOLE  # what runs it; its strategy is set on the model already

    @property
    def sample(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets)."""
        return self.x, self.y


def read_shape(value: Any) -> tuple[int, ...]:
    """(3, 32, 32) of "3x32x32", of a whole number or of whole numbers.

    Raises:
        OptionError: anything else.
    """
    sides = value.split("x") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        shape = tuple(int(side) for side in sides)
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(f"profile: expected a shape like 3x32x32 or (3, 32, 32), got {value!r}.")
    return shape


def random_sample(
    shape: tuple[int, ...],
    timesteps: int,
    batch: int,
    *,
    repeated: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Random input [T, B, *shape] in [0, 1) and targets [B].

    Args:
        shape: of one sample.
        timesteps, batch: T and B.
        repeated: one sample at every step, as static images are shown; None does so for images (C, H, W).
        dtype: of the input.
    """
    generator = torch.Generator().manual_seed(0)
    if repeated is None:
        repeated = len(shape) == 3
    x = torch.rand((1 if repeated else timesteps, batch, *shape), generator=generator, dtype=dtype)
    return x.expand(timesteps, *x.shape[1:]), torch.zeros(batch, dtype=torch.int64)


def with_targets(sample: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a sample; where there are no targets, class 0 for everyone.

    Raises:
        OptionError: anything but a tensor with axes of time and batch, or a pair of tensors.
    """
    parts = sample if isinstance(sample, tuple) else (sample,)
    if len(parts) > 2 or not all(isinstance(part, Tensor) for part in parts) or parts[0].ndim < 2:
        got = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        raise OptionError(
            f"sample: expected an input tensor [T, B, ...], or a pair (input, targets) of tensors, got {got}; "
            "torch.as_tensor(x) makes a tensor of an array."
        )
    if len(parts) == 2:
        return parts
    x = parts[0]
    return x, torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)


def check_model(who: str, model: nn.Module) -> None:
    """Raise OptionError, in the name of `who`, unless `model` is a torch module."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{who}: expected a torch module as model, got {type(model).__name__}; spikefit.create_model makes one of "
            "a name."
        )


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """`model` in training mode for the time of the block."""
    training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(training)


def load_factory(text: str) -> Callable[..., Any]:
    """The object behind "package.module:name", from the working directory too.

    Raises:
        OptionError: it cannot be imported or called.
    """
    module, _, name = text.partition(":")
    # an installed program does not look for modules where it was started
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"model {text}: cannot find the factory ({error}); write package.module:function, importable from here."
        ) from None
    if not callable(found):
        raise OptionError(f"model {text}: expected a function that returns a model, got {type(found).__name__}.")
    return found


def make_own(text: str, options: Mapping[str, Any], *, optional: Collection[str] = ()) -> nn.Module:
    """The model that "package.module:name" makes of `options`; those in `optional` only where it takes them.

    Raises:
        OptionError: no such factory, it does not take the options, or it returns no torch module.
    """
    factory = load_factory(text)
    signature = inspect.signature(factory)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    chosen = {k: v for k, v in options.items() if k not in optional or takes_all or k in signature.parameters}
    try:
        signature.bind(**chosen)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise OptionError(f"model {text}: it refused the options; {error}. It takes: {known}.") from None
    model = factory(**chosen)
    if not isinstance(model, nn.Module):
        raise OptionError(f"model {text}: expected a torch module from the factory, got {type(model).__name__}.")
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)`, also for tensors without memory, which `to` cannot exchange."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None and t.is_floating_point() and t.dtype != dtype:
                    cast = t.detach().to(dtype)
                    cast = nn.Parameter(cast, t.requires_grad) if isinstance(t, nn.Parameter) else cast
                    table[name] = made.setdefault(id(t), cast)  # type: ignore[assignment]
    return model


@contextmanager
def no_memory(wanted: bool = True) -> Iterator[None]:
    """Tensors made in the block have a shape and a device but no memory, unless `wanted` is False."""
    if not wanted:
        yield
        return
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, because torch then loads its compiler

    with FakeTensorMode():
        yield


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the logits averaged over time; the default loss of a profile."""
    return F.cross_entropy(logits.float().mean(0), targets)


mean_cross_entropy.reads_mean = True  # type: ignore[attr-defined]


def training_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: LossFunction = mean_cross_entropy,
    *,
    autocast: bool = False,
    driver: Driver = WHOLE,
    backward: Callable[[Tensor], Any] = torch.autograd.backward,
) -> Tensor:
    """Forward, loss and backward as `driver` runs them; gradients stay in `.grad`. Returns the loss, detached.

    A rule that moves weights behind every step is run without moving them.
    """

    def around() -> torch.autocast:
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast)

    return driver.run(model, x, y, loss, backward=backward, update=lambda: None, around=around)
