"""The unit: weight -> norm -> neuron (-> pool), the stretch of a network that one strategy choice applies to."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError
from spikefit.layers.norm import create_norm
from spikefit.layers.weight import StandardizedConv2d, StandardizedLinear, Weight, _call, apply_weight
from spikefit.neurons import SpikingNeuron, create_neuron

POOLS: tuple[str, ...] = ("max", "avg")

# A neuron as users write it: a module, a name, or a name with options.
NeuronLike = SpikingNeuron | str | dict[str, Any] | None


class SpikingUnit(nn.Module):
    """weight -> norm -> neuron (-> pool) over a sequence; the membrane goes in and comes out.

        z_t = W * i_t,   x = norm(z) (+ shortcut),   (s, v_T) = neuron(x, v_0),   out = pool(s)

    A unit has one forward, the same under every strategy: the weight sees one time step per call (`chunk` rows of it at
    most), the norm reads z once for its statistics and once for its affine map. A sequence that repeats one step (a
    view with stride 0 along T, as `encoding.repeat` makes) goes through weight and norm once.

    Args:
        synapse: nn.Conv1d, nn.Conv2d, nn.Linear or their standardised forms.
        norm: a norm of `spikefit.layers.norm`, or None.
        neuron: a `SpikingNeuron`, or None for a unit that returns the current x.
        pool: None, "max" or "avg": 2x2 (or 2) pooling of the spikes.
        chunk: batch rows per call of the weight; None for all.

    Raises:
        OptionError: unknown pool, or chunk below 1.
    """

    consumes_time = False

    def __init__(
        self,
        synapse: Weight,
        norm: nn.Module | None,
        neuron: SpikingNeuron | None,
        *,
        pool: str | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if pool is not None and pool not in POOLS:
            raise OptionError(f"{type(self).__name__}: pool must be None, 'max' or 'avg', got {pool!r}.")
        if chunk is not None and chunk < 1:
            raise OptionError(f"{type(self).__name__}: chunk must be at least 1 batch row, or None, got {chunk}.")
        self.synapse, self.norm, self.neuron = synapse, norm, neuron
        self.pool, self.chunk = pool, chunk

    def forward(self, x: Tensor, v_0: Tensor | None = None, *, shortcut: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run the unit over a sequence.

        Args:
            x: input [T, B, C, ...].
            v_0: membrane [B, C_out, ...], or None for zeros.
            shortcut: current added behind the norm, [T, B, C_out, ...].

        Returns:
            (spikes [T, B, C_out, ...] after the pool, last membrane before the pool); (current, None) without a neuron.

        Raises:
            ShapeError: no time axis, T = 0, or another number of channels.
            StateError: a membrane of another batch.
        """
        self._check_time(x)
        T = x.shape[0]
        repeats = T if T > 1 and x.stride(0) == 0 else 1
        z = apply_weight(self.synapse, x[:1] if repeats > 1 else x, chunk=self.chunk)
        current = z if self.norm is None else self.norm(z, repeats=repeats)
        if repeats > 1:
            current = current.expand(T, *current.shape[1:])
        if shortcut is not None:
            current = current + shortcut
        if self.neuron is None:
            return current, None
        spikes, v_T = self.neuron(current, v_0)
        return pool_spikes(spikes, self.pool), v_T

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """(zero membrane [B, ...], shape of one output sample), for input samples of `shape`."""
        membrane = self.output_shape(shape)
        out = pool_spikes(torch.empty((1, 1, *membrane), device="meta"), self.pool).shape[2:]
        if self.neuron is None:
            return None, tuple(out)
        return torch.zeros((batch_size, *membrane), device=device, dtype=dtype), tuple(out)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample of the current, for input samples of `shape`."""
        weight = torch.empty(self.synapse.weight.shape, device="meta")
        geometry = None
        if not isinstance(self.synapse, nn.Linear):
            s = self.synapse
            geometry = (s.stride, s.padding, s.dilation, s.groups)
        return tuple(_call(torch.empty((1, *shape), device="meta"), weight, None, geometry).shape[1:])

    def _check_time(self, x: Tensor) -> None:
        if x.ndim < 3:
            raise ShapeError(
                f"{type(self).__name__}: expected x as [T, B, C, ...], got {tuple(x.shape)}. "
                "Time comes first: encoding.repeat(x, timesteps=T) adds it."
            )
        if x.shape[0] == 0:
            raise ShapeError(f"{type(self).__name__}: expected at least one time step, got T = 0 in {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ShapeError(f"{type(self).__name__}: expected floating point input, got {x.dtype}; call x.float().")

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (("pool", self.pool), ("chunk", self.chunk)) if v is not None)


class SpikingConv2d(SpikingUnit):
    """2-d convolution, norm, neuron and pool as one unit.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in nn.Conv2d; padding None keeps
            the side at stride 1.
        norm: "bn", "tdbn", "step_bn", "ws" or "none".
        neuron: a module, a name, {"name": ..., option: ...}, or None for a unit that returns the current.
        pool: None, "max" or "avg" (2x2).
        chunk: batch rows per call of the weight.

    Shapes:
        [T, B, C_in, H, W] -> [T, B, C_out, H', W'], membrane [B, C_out, H, W] before the pool.

    Raises:
        OptionError: unknown norm, neuron or pool.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        norm: str = "bn",
        neuron: NeuronLike = "lif",
        pool: str | None = None,
        chunk: int | None = None,
    ) -> None:
        neuron = _neuron(neuron)
        make = StandardizedConv2d if norm == "ws" else nn.Conv2d
        synapse = make(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            dilation=dilation,
            groups=groups,
            bias=norm in ("ws", "none"),
        )
        super().__init__(synapse, _norm(norm, out_channels, neuron), neuron, pool=pool, chunk=chunk)


class SpikingConv1d(SpikingUnit):
    """1-d convolution, norm, neuron and pool as one unit, along a space axis or along time.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in nn.Conv1d.
        over: "space" for [T, B, C, L]; "time" for [T, B, C], where the kernel reaches over neighbouring time steps.
            Then the unit consumes time: it needs the whole sequence at once and may change its length.
        norm, neuron, pool, chunk: as in `SpikingConv2d`; a pool is along L and not available over time.

    Shapes:
        [T, B, C_in, L] -> [T, B, C_out, L'], or over time [T, B, C_in] -> [T', B, C_out].

    Raises:
        OptionError: unknown option; a pool or a chunk over time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        over: str = "space",
        norm: str = "bn",
        neuron: NeuronLike = "lif",
        pool: str | None = None,
        chunk: int | None = None,
    ) -> None:
        if over not in ("space", "time"):
            raise OptionError(f"SpikingConv1d: over must be 'space' or 'time', got {over!r}.")
        if over == "time" and (pool is not None or chunk is not None):
            raise OptionError("SpikingConv1d: over='time' takes no pool and no chunk; use AveragePoolTime behind it.")
        if norm == "ws":
            raise OptionError(
                "SpikingConv1d: norm 'ws' exists for SpikingConv2d and SpikingLinear; use 'bn' or 'none'."
            )
        neuron = _neuron(neuron)
        synapse = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            dilation=dilation,
            groups=groups,
            bias=norm == "none",
        )
        super().__init__(synapse, _norm(norm, out_channels, neuron), neuron, pool=pool, chunk=chunk)
        self.over = over
        self.consumes_time = over == "time"

    def forward(self, x: Tensor, v_0: Tensor | None = None, *, shortcut: Tensor | None = None) -> tuple[Tensor, Any]:
        if self.over == "space":
            return super().forward(x, v_0, shortcut=shortcut)
        self._check_time(x)
        # [T, B, C] -> [1, B, C, T] -> [T', B, C_out]: time takes the place of the length
        z = apply_weight(self.synapse, x.permute(1, 2, 0).unsqueeze(0))[0].permute(2, 0, 1).contiguous()
        current = z if self.norm is None else self.norm(z)
        if shortcut is not None:
            current = current + shortcut
        return (current, None) if self.neuron is None else self.neuron(current, v_0)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return super().output_shape(shape) if self.over == "space" else (int(self.synapse.weight.shape[0]),)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"over={self.over}", super().extra_repr())))


class SpikingLinear(SpikingUnit):
    """Linear map, norm and neuron as one unit.

    Args:
        in_features, out_features: as in nn.Linear.
        norm: "bn", "tdbn", "step_bn", "ws" or "none".
        neuron: as in `SpikingConv2d`.
        chunk: batch rows per call of the weight.

    Shapes:
        [T, B, C_in] -> [T, B, C_out], membrane [B, C_out].

    Raises:
        OptionError: unknown norm or neuron.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: str = "bn",
        neuron: NeuronLike = "lif",
        chunk: int | None = None,
    ) -> None:
        neuron = _neuron(neuron)
        make = StandardizedLinear if norm == "ws" else nn.Linear
        synapse = make(in_features, out_features, bias=norm in ("ws", "none"))
        super().__init__(synapse, _norm(norm, out_features, neuron), neuron, chunk=chunk)


def pool_spikes(s: Tensor, pool: str | None) -> Tensor:
    """2x2 pooling (2 for one space axis) of every step: [T, B, C, H, W] -> [T, B, C, H/2, W/2]; None returns `s`."""
    if pool is None:
        return s
    if s.ndim not in (4, 5):
        raise ShapeError(f"pool: expected [T, B, C, L] or [T, B, C, H, W], got {tuple(s.shape)}.")
    functions = {("max", 4): F.max_pool1d, ("max", 5): F.max_pool2d, ("avg", 4): F.avg_pool1d, ("avg", 5): F.avg_pool2d}
    return functions[pool, s.ndim](s.flatten(0, 1), 2).unflatten(0, s.shape[:2])  # type: ignore[operator]


def _neuron(neuron: NeuronLike) -> SpikingNeuron | None:
    if neuron is None or isinstance(neuron, SpikingNeuron):
        return neuron
    return create_neuron(neuron) if isinstance(neuron, str) else create_neuron(**neuron)


def _norm(name: str, channels: int, neuron: SpikingNeuron | None) -> nn.Module | None:
    return create_norm(name, channels, v_threshold=1.0 if neuron is None else neuron.v_threshold)
