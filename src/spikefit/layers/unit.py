"""The unit: weight -> norm -> neuron (-> pool), the stretch of a network that one strategy choice applies to."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers.applying import Tracer, applier_now
from spikefit.layers.branch import Branch
from spikefit.layers.lean import run_lean
from spikefit.layers.norm import BatchNorm, Normal, create_norm
from spikefit.layers.packed import PackedSpikes, Spikes, dense, packed_or_dense
from spikefit.layers.shape import is_count
from spikefit.layers.weight import (
    StandardizedConv1d,
    StandardizedConv2d,
    StandardizedLinear,
    Weight,
    apply_weight,
    autocasting,
    check_input,
    check_weight,
    map_of,
    parameters_of,
    zero_membrane,
)
from spikefit.neurons import SpikingNeuron
from spikefit.neurons.table import as_neuron
from spikefit.ops.lif.op import dynamics_of
from spikefit.ops.norm import Moments

POOLS: tuple[str, ...] = ("max", "avg")

# What a unit keeps between forward and backward: all that autograd keeps, z and the spikes as bits, or the bits alone.
KEEPS: tuple[str, ...] = ("all", "input", "spikes")

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

    Attributes:
        keep: what is kept for backward, one of `KEEPS`; set by `spikefit.use_strategy` or a plan. Results do not
            depend on it.

    Raises:
        OptionError: unknown pool, chunk below 1, or a synapse that does more than its map.
    """

    consumes_time = False
    takes_packed = True

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
        check_weight(synapse)
        if pool is not None and pool not in POOLS:
            raise OptionError(f"{type(self).__name__}: pool must be None, 'max' or 'avg', got {pool!r}.")
        if chunk is not None and not is_count(chunk):
            raise OptionError(
                f"{type(self).__name__}: chunk must be a whole number of rows, at least 1, or None, got {chunk!r}."
            )
        self.synapse, self.norm, self.neuron = synapse, norm, neuron
        self.pool, self.chunk = pool, chunk
        self.keep = "all"

    def forward(
        self,
        x: Spikes,
        v_0: Tensor | None = None,
        *,
        shortcut: "Spikes | LaterCurrent | None" = None,
        packed: bool = False,
    ) -> tuple[Any, Any]:
        """Run the unit over a sequence.

        Args:
            x: input [T, B, C, ...], dense or packed.
            v_0: membrane [B, C_out, ...], or None for zeros.
            shortcut: current added behind the norm, [T, B, C_out, ...].
            packed: hand the spikes on as `PackedSpikes` if the unit keeps bits.

        Returns:
            (spikes [T, B, C_out, ...] after the pool, last membrane before the pool); (current, None) without a neuron.

        Raises:
            ShapeError: no time axis, T = 0, another number of channels or dtype, or sides too small for kernel or pool.
            StateError: a membrane of another batch.
            StrategyError: `keep` is not "all" and norm or neuron are of a kind that cannot be rebuilt.
        """
        self._check_input(x)
        applier = applier_now()
        if self.keep != "all" and self.neuron is not None:
            tracer = None if applier is None else applier.check_lean(self)
            bits, v_T = self._run_lean(x, v_0, shortcut, tracer)
            return bits if packed else bits.dense(), v_T
        current = self.current(x, shortcut)
        if self.neuron is None:
            return current, None
        fire = self.neuron if applier is None else partial(applier.fire, self.neuron)
        spikes, v_T = fire(current, v_0)
        return pool_spikes(spikes, self.pool), v_T

    def later(self, x: Spikes) -> "Tensor | LaterCurrent":
        """The current of a unit without a neuron, as the shortcut of another one, which rebuilds both if it is lean."""
        return LaterCurrent(self, x) if self.keep != "all" else self(x)[0]

    def current(self, x: Spikes, shortcut: "Spikes | LaterCurrent | None" = None) -> Tensor:
        """norm(W * x) + shortcut, [T, B, C_out, ...], by plain autograd: what the neuron gets."""
        current = self._current(dense(x))
        if shortcut is None:
            return current
        return current + (shortcut.dense() if isinstance(shortcut, LaterCurrent) else dense(shortcut))

    def spiking_layers(self) -> "list[Layer]":
        """The unit as the layers of neurons it consists of."""
        return [] if self.neuron is None else [Layer(self, 0)]

    def _check_channels(self, x: Tensor) -> None:
        check_input(self.synapse, x, who=type(self).__name__)

    def _current(self, x: Tensor) -> Tensor:
        """norm(W * x)."""
        T = x.shape[0]
        repeats = T if T > 1 and x.stride(0) == 0 else 1
        z = self._weighted(x[:1] if repeats > 1 else x)
        current = z if self.norm is None else self.norm(z, repeats=repeats)
        return current.expand(T, *current.shape[1:]) if repeats > 1 else current

    def _weighted(self, x: Tensor) -> Tensor:
        """z = W * x."""
        return apply_weight(self.synapse, x, chunk=self.chunk)

    def _run_lean(
        self, x: Spikes, v_0: Tensor | None, shortcut: "Spikes | LaterCurrent | None", tracer: Tracer | None
    ) -> tuple[PackedSpikes, Tensor]:
        neuron, units, inputs = self.neuron, [self], [x]
        if neuron is None or type(neuron).forward is not SpikingNeuron.forward:
            raise StrategyError(
                f"{type(neuron).__name__} has a forward of its own, which a lean unit cannot rebuild; use "
                "strategy='bptt' or 'checkpoint', or keep='all' for this unit."
            )
        if neuron.groups > 1:
            raise StrategyError(
                f"{type(self).__name__}: a lean unit cannot rebuild a membrane that {neuron.groups} groups of channels "
                "share; use strategy='replay', which keeps bits as well, or 'bptt'."
            )
        if isinstance(shortcut, LaterCurrent):
            units, inputs, shortcut = [self, shortcut.unit], [x, shortcut.x], None
        branches = [unit.branch(i) for unit, i in zip(units, inputs, strict=True)]
        if tracer is not None:
            traced = [tracer.trace(unit, i) for unit, i in zip(units, inputs, strict=True)]
            branches = [b._replace(traced=t) for b, t in zip(branches, traced, strict=True)]
        spikes, v_T, statistics = run_lean(
            branches,
            None if shortcut is None else packed_or_dense(shortcut),
            v_0 if tracer is None else tracer.start(neuron, v_0),
            dynamics_of(branches[0].weight, **neuron.options()),
            pool=self.pool,
            keep=self.keep,
            backend=neuron.backend,
        )
        _check_pool(tuple(v_T.shape[2:]), self.pool)
        if tracer is not None:
            tracer.fired(neuron, replace(spikes, pool=""), v_0, v_T)
        for unit, branch, pair in zip(units, branches, statistics, strict=True):
            if pair is not None and isinstance(unit.norm, BatchNorm):
                mean, var = (t.to(v_T.dtype) for t in pair)
                steps = 1 if branch.repeats > 1 else spikes.shape[0]
                elements = steps * v_T.numel() // (v_T.shape[1] * mean.shape[0])
                unit.norm.track(Moments(mean, var, elements), branch.repeats)
        return spikes, v_T

    def branch(self, x: Spikes) -> Branch:
        """norm(W * x) as a term of a lean unit's current."""
        x = packed_or_dense(x)
        as_tensor = x.carrier if isinstance(x, PackedSpikes) else x
        if self.norm is not None and not isinstance(self.norm, BatchNorm):
            raise StrategyError(
                f"{type(self.norm).__name__} is a norm that a lean unit cannot rebuild; known are BatchNorm and "
                "StepBatchNorm. Use strategy='bptt' or 'checkpoint', or keep='all' for this unit."
            )
        weight, bias = parameters_of(self.synapse, as_tensor.device.type)
        if not isinstance(x, PackedSpikes) and autocasting(x.device.type):
            x = x.to(weight.dtype)
        normal = Normal() if self.norm is None else self.norm.normal()
        return Branch(x, map_of(self.synapse), weight, bias, normal, self.chunk)

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """(zero membrane [B, ...], shape of one output sample), for input samples of `shape`."""
        membrane = self.output_shape(shape)
        out = pool_spikes(torch.empty((1, 1, *membrane), device="meta"), self.pool).shape[2:]
        if self.neuron is None:
            return None, tuple(out)
        state = self.neuron.state_shape(membrane)
        return zero_membrane(batch_size, state, device=device, dtype=dtype), tuple(out)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample of the current, for input samples of `shape`."""
        weight = torch.empty_like(self.synapse.weight, device="meta")
        x = weight.new_empty((1, 1, *shape))
        self._check_channels(x)
        return tuple(map_of(self.synapse)(x[0], weight, None).shape[1:])

    def _check_input(self, x: Spikes) -> None:
        x = x.carrier if isinstance(x, PackedSpikes) else x
        self._check_channels(x)
        if x.shape[0] == 0:
            raise ShapeError(f"{type(self).__name__}: expected at least one time step, got T = 0 in {tuple(x.shape)}.")

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (("pool", self.pool), ("chunk", self.chunk)) if v is not None)


class SpikingConv2d(SpikingUnit):
    """2-d convolution, norm, neuron and pool as one unit.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in nn.Conv2d; padding None keeps
            the side at stride 1.
        norm: "bn", "tdbn", "step_bn", "osr", "ws" or "none".
        neuron: a module, a name, {"name": ..., option: ...}, or None for a unit that returns the current.
        pool: None, "max" or "avg" (2x2).
        bias: whether the weight has one; None for one where no norm has it ("ws", "none").
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
        bias: bool | None = None,
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
            bias=norm in ("ws", "none") if bias is None else bias,
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
        neuron = _neuron(neuron)
        make = StandardizedConv1d if norm == "ws" else nn.Conv1d
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
        self.over = over
        self.consumes_time = over == "time"

    def _weighted(self, x: Tensor) -> Tensor:
        if self.over == "space":
            return super()._weighted(x)
        return apply_weight(self.synapse, _time_as_length(x))[0].permute(2, 0, 1).contiguous()

    def _check_channels(self, x: Tensor) -> None:
        check_input(self.synapse, x, who=type(self).__name__, over_time=self.over == "time")

    def _current(self, x: Tensor) -> Tensor:
        if self.over == "space":
            return super()._current(x)
        z = self._weighted(x)
        return z if self.norm is None else self.norm(z)

    def branch(self, x: Spikes) -> Branch:
        return super().branch(x)._replace(over_time=self.over == "time")

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return super().output_shape(shape) if self.over == "space" else (int(self.synapse.weight.shape[0]),)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"over={self.over}", super().extra_repr())))


class SpikingLinear(SpikingUnit):
    """Linear map, norm and neuron as one unit.

    Args:
        in_features, out_features: as in nn.Linear.
        norm: "bn", "tdbn", "step_bn", "osr", "ws" or "none".
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


def _time_as_length(x: Tensor) -> Tensor:
    """[T, B, C] -> [1, B, C, T]."""
    return x.permute(1, 2, 0).unsqueeze(0)


class Layer(NamedTuple):
    """One layer of neurons in a block: which unit fires, on what.

    Attributes:
        unit: weight, norm, neuron and pool.
        source: what the weight reads, 0 for the input of the block, k for the output of its k-th layer.
        shortcut: what is added to the current, counted the same way; None for nothing.
        short: unit without a neuron that the shortcut goes through; None adds it as it is.
    """

    unit: SpikingUnit
    source: int
    shortcut: int | None = None
    short: SpikingUnit | None = None

    def current(self, source: Tensor, shortcut: Tensor | None) -> Tensor:
        """What the neurons get, [T, B, C, ...], of the dense sequences that the layer reads."""
        if shortcut is not None and self.short is not None:
            shortcut = self.short.current(shortcut)
        return self.unit.current(source, shortcut)


@dataclass(frozen=True)
class LaterCurrent:
    """The current of a unit without a neuron, computed by the unit that adds it to its own."""

    unit: SpikingUnit
    x: Spikes

    def dense(self) -> Tensor:
        """The current now, by plain autograd."""
        return self.unit(dense(self.x))[0]


def pool_spikes(s: Tensor, pool: str | None) -> Tensor:
    """2x2 pooling (2 for one space axis) of every step: [T, B, C, H, W] -> [T, B, C, H/2, W/2]; None returns `s`."""
    if pool is None:
        return s
    if s.ndim not in (4, 5):
        raise ShapeError(f"pool: expected [T, B, C, L] or [T, B, C, H, W], got {tuple(s.shape)}.")
    _check_pool(tuple(s.shape[3:]), pool)
    functions = {("max", 4): F.max_pool1d, ("max", 5): F.max_pool2d, ("avg", 4): F.avg_pool1d, ("avg", 5): F.avg_pool2d}
    return functions[pool, s.ndim](s.flatten(0, 1), 2).unflatten(0, s.shape[:2])  # type: ignore[operator]


def _check_pool(space: tuple[int, ...], pool: str | None) -> None:
    if pool is not None and min(space, default=2) < 2:
        raise ShapeError(
            f"pool: expected at least 2 pixels a side, got {'x'.join(map(str, space))}. "
            "Give the network larger samples, or take a pool out."
        )


def _neuron(neuron: NeuronLike) -> SpikingNeuron | None:
    return None if neuron is None else as_neuron(neuron)


def _norm(name: str, channels: int, neuron: SpikingNeuron | None) -> nn.Module | None:
    return create_norm(name, channels, v_threshold=1.0 if neuron is None else neuron.v_threshold)
