"""What is profiled: a model, and one training step on a batch of it."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError
from spikefit.models import SpikingNetwork, create_model, use_strategy

# logits [T, B, K], targets [B] -> scalar
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A model that can be made again in another process, and the size of its batch.

    Attributes:
        model: a name of the zoo, or "package.module:factory" of your own, importable from the working directory.
        options: keyword options of the model.
        strategy, backend: how it runs.
        timesteps, batch: T and B.
        input_shape: shape of one sample; None takes that of the model.
        encoding: "repeat" shows one sample at every step (static images), "sequence" makes a dense one; None takes
            "repeat" for images.
        dtype: "float32", "float64", or "bfloat16" for autocast.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str = "bptt"
    backend: str = "auto"
    timesteps: int = 4
    batch: int = 8
    input_shape: tuple[int, ...] | None = None
    encoding: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("timesteps", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"profile: {name} must be a whole number of at least 1, got {value!r}.")
        if self.encoding not in (None, "repeat", "sequence"):
            raise OptionError(f"profile: encoding must be 'repeat' or 'sequence', got {self.encoding!r}.")
        if self.dtype not in ("float32", "float64", "bfloat16"):
            raise OptionError(f"profile: dtype must be float32, float64 or bfloat16, got {self.dtype!r}.")

    def build(self) -> nn.Module:
        """Make the model, in training mode, with strategy and dtype set."""
        options = dict(self.options)
        if self.input_shape is not None:
            options.setdefault("input_shape", tuple(self.input_shape))
        torch.manual_seed(0)
        if ":" in self.model:
            model = _factory(self.model)(**options)
            if not isinstance(model, nn.Module):
                raise OptionError(f"profile: {self.model} must return a torch module, got {type(model).__name__}.")
        else:
            model = create_model(self.model, **options)
        if self.strategy != "bptt" or any(isinstance(m, SpikingNetwork) for m in model.modules()):
            use_strategy(model, self.strategy)
        return model.double() if self.dtype == "float64" else model.float()

    def sample(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Random input [T, B, ...] and targets [B] of the right shapes."""
        shape = self.input_shape or getattr(model, "input_shape", None)
        if shape is None:
            raise OptionError(f"profile: {self.model} has no input_shape; give image=CxHxW or input_shape=C.")
        repeated = None if self.encoding is None else self.encoding == "repeat"
        x, y = random_sample(tuple(shape), self.timesteps, self.batch, repeated=repeated)
        if self.dtype == "float64":
            # only the first step is converted, so that a repeated one stays a view
            x = x[:1].double().expand(x.shape) if x.stride(0) == 0 else x.double()
        return x, y

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)


def random_sample(
    shape: tuple[int, ...], timesteps: int, batch: int, *, repeated: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Random input [T, B, *shape] in [0, 1) and targets [B].

    Args:
        shape: of one sample.
        timesteps, batch: T and B.
        repeated: one sample at every step, as static images are shown; None does so for images (C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    if repeated is None:
        repeated = len(shape) == 3
    x = torch.rand((1 if repeated else timesteps, batch, *shape), generator=generator)
    return x.expand(timesteps, *x.shape[1:]), torch.zeros(batch, dtype=torch.int64)


def _factory(text: str) -> Callable[..., Any]:
    """The object behind "package.module:name"."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"profile: cannot find the factory {text!r} ({error}); write package.module:function."
        ) from None
    if not callable(found):
        raise OptionError(f"profile: {text} is no function; expected a factory that returns a model.")
    return found


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the logits averaged over time; the default loss of a profile."""
    return F.cross_entropy(logits.float().mean(0), targets)


def training_step(
    model: nn.Module, x: Tensor, y: Tensor, loss: LossFunction = mean_cross_entropy, *, autocast: bool = False
) -> Tensor:
    """Forward, loss and backward; gradients stay in `.grad`. Returns the loss, detached."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        value = loss(model(x), y)
    value.backward()
    return value.detach()
