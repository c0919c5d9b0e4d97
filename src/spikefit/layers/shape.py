"""Layers without a neuron: flatten, pool, dropout and the read-out; (sequence, state) in and out, like units."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError
from spikefit.layers.applying import applier_now
from spikefit.layers.packed import PackedSpikes, Spikes
from spikefit.layers.weight import apply_weight, check_floating, check_input
from spikefit.neurons import LeakyReadout


class Stateless(nn.Module):
    """Base of layers that keep nothing between steps."""

    consumes_time = False

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, tuple[int, ...]]:
        """(None, shape of one output sample)."""
        return None, tuple(self(torch.empty((1, 1, *shape), device="meta"))[0].shape[2:])


class Flatten(Stateless):
    """[T, B, ...] -> [T, B, features], channels first."""

    takes_packed = True

    def forward(self, x: Spikes, state: None = None, *, packed: bool = False) -> tuple[Any, None]:
        if len(x.shape) < 3:
            raise ShapeError(
                f"Flatten: expected [T, B, C, ...], got {tuple(x.shape)}. "
                "Time comes first: encoding.repeat(x, timesteps=T) adds it to a static input."
            )
        if isinstance(x, PackedSpikes):
            return x.flatten() if packed else x.flatten().dense(), None
        return x.flatten(2), None


class GlobalAveragePool(Stateless):
    """Mean over space: [T, B, C, ...] -> [T, B, C]."""

    takes_packed = True

    def forward(self, x: Spikes, state: None = None, *, packed: bool = False) -> tuple[Tensor, None]:
        if len(x.shape) < 4:
            raise ShapeError(
                f"GlobalAveragePool: expected [T, B, C, L] or [T, B, C, H, W], got {tuple(x.shape)}. "
                "Put it where the sequence still has space axes."
            )
        if isinstance(x, PackedSpikes):
            return x.mean_over_space(), None
        check_floating("GlobalAveragePool", x)
        return x.mean(tuple(range(3, x.ndim))), None


class Pool2d(Stateless):
    """Pooling over space with overlapping windows: [T, B, C, H, W] -> [T, B, C, H', W'], nn.MaxPool2d or nn.AvgPool2d.

    Args:
        kind: "max" or "avg".
        kernel_size, stride, padding: as there; zeros of the padding count in the mean.

    Raises:
        OptionError: unknown kind.
    """

    def __init__(self, kind: str, kernel_size: int = 3, *, stride: int = 2, padding: int = 1) -> None:
        super().__init__()
        if kind not in ("max", "avg"):
            raise OptionError(f"Pool2d: kind must be 'max' or 'avg', got {kind!r}.")
        make = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
        self.pool = make(kernel_size, stride, padding)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        if x.ndim != 5:
            raise ShapeError(f"Pool2d: expected [T, B, C, H, W], got {tuple(x.shape)}. Put it where there are images.")
        check_floating("Pool2d", x)
        return self.pool(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None


class Twice(Stateless):
    """The same channels twice, side by side: [T, B, C, ...] -> [T, B, 2C, ...]; two streams that start equal."""

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return torch.cat([x, x], 2), None


class AveragePoolTime(Stateless):
    """Mean over neighbouring time steps: [T, B, C] -> [T', B, C]; consumes time.

    Args:
        kernel_size, stride, padding: as in nn.AvgPool1d, along T.
    """

    consumes_time = True

    def __init__(self, kernel_size: int = 2, *, stride: int | None = None, padding: int = 0) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(kernel_size, kernel_size if stride is None else stride, padding)
        self.reach, self.padding = kernel_size, padding

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        _check_over_time("AveragePoolTime", x)
        if x.shape[0] + 2 * self.padding < self.reach:
            raise ShapeError(
                f"AveragePoolTime: expected at least {self.reach - 2 * self.padding} time steps, got T = {x.shape[0]}. "
                "Give it a longer sequence or a smaller kernel."
            )
        return self.pool(x.permute(1, 2, 0)).permute(2, 0, 1), None

    def init_state(self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype=torch.float32):
        return None, shape


class FlattenTime(Stateless):
    """All steps as features of one: [T, B, C] -> [1, B, C * T], channel by channel; consumes time."""

    consumes_time = True

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        _check_over_time("FlattenTime", x)
        return x.permute(1, 2, 0).flatten(1).unsqueeze(0), None

    def init_state(self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype=torch.float32):
        return None, shape


class Dropout(Stateless):
    """Zero single elements with probability `p` in training and scale the rest by 1 / (1 - p).

    Args:
        p: probability, 0 <= p < 1.

    Raises:
        OptionError: p outside the range.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise OptionError(f"Dropout: p must lie in [0, 1), got {p}.")
        self.p = p

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        applier = applier_now() if self.training else None
        if applier is not None:
            return applier.drop(self, x, self.p), None
        return nn.functional.dropout(x, self.p, self.training), None


class Readout(nn.Module):
    """Linear map to the logits of every step, with or without a leaky membrane behind it.

        logits_t = W s_t + b,   or the membrane of a `LeakyReadout` driven by it

    Args:
        in_features: C.
        num_classes: K.
        tau: time constant of the membrane in steps; None for no membrane.

    Shapes:
        [T, B, C] -> logits [T, B, K]; state: the membrane [B, K], or None.
    """

    consumes_time = False

    def __init__(self, in_features: int, num_classes: int, *, tau: float | None = None) -> None:
        super().__init__()
        if not is_count(num_classes):
            raise OptionError(f"Readout: num_classes must be at least 1, a whole number, got {num_classes!r}.")
        self.linear = nn.Linear(in_features, num_classes)
        self.membrane = None if tau is None else LeakyReadout(tau=tau)

    def forward(self, x: Tensor, v_0: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sequence [T, B, C] and membrane [B, K] -> (logits [T, B, K], membrane)."""
        check_input(self.linear, x, who="Readout")
        logits = apply_weight(self.linear, x)
        return (logits, None) if self.membrane is None else self.membrane(logits, v_0)

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, tuple[int, ...]]:
        """(zero membrane or None, shape of one output sample)."""
        sample = torch.empty((1, 1, *shape), dtype=self.linear.weight.dtype, device="meta")
        check_input(self.linear, sample, who="Readout")
        classes = self.linear.out_features
        v = None if self.membrane is None else torch.zeros((batch_size, classes), device=device, dtype=dtype)
        return v, (classes,)


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _check_over_time(who: str, x: Tensor) -> None:
    if x.ndim != 3:
        hint = (
            "Flatten() in front of it makes one axis of features."
            if x.ndim > 3
            else "Time comes first, then the batch."
        )
        raise ShapeError(f"{who}: expected x as [T, B, C], got {tuple(x.shape)}. {hint}")
    check_floating(who, x)
