"""Bytes of a training step: what is held between forward and backward, and the peak, both without allocating.

The step runs on fake tensors (shapes without memory), so a network that does not fit this machine can be measured too.
"""

import contextlib
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefit.errors import SpikefitError
from spikefit.layers import SpikingUnit
from spikefit.layers.packed import PackedSpikes
from spikefit.layers.stage_function import Watcher, watched
from spikefit.losses.model_loss import LossFunction
from spikefit.ops.fire.reference import SCRATCH
from spikefit.ops.node.op import generic_scratch_bytes
from spikefit.planning.held import SavedBytes, Watch, watching
from spikefit.planning.target import mean_cross_entropy, training_step, with_targets
from spikefit.rules.table import WHOLE, Driver

# What live tensors do not show: buffers inside oneDNN, rounding to pages, small blocks of the heap. Chosen so that the
# measured peak of the networks in tests/planning lies below the prediction.
MARGIN, CONSTANT = 0.10, 1 << 18
# Rows of a factor that MKL packs at a time, at most.
PACKED_ROWS = 512
# The CUDA allocator rounds up to blocks of so many bytes.
CUDA_BLOCK = 512
# Dense values that firing in pieces makes for every value of a piece: current, spikes, gradients, places of a max pool.
PIECES = 12
# Peak from which a prediction is a promise: below, the heap of the process and the stacks of threads count too. Steps
# of a sequence take heap as well, some 3 MiB for 512 of them, which the margin covers from here on.
PROMISED_FROM = 1 << 25

# Kept bytes by what keeps them; "segment" is the input of a checkpointed run of units.
CATEGORIES = ("packed spikes", "membranes", "weight input", "norm input", "neuron input", "pool", "segment", "other")


@dataclass
class _Life:
    """One storage: its bytes, what made it, and the operations between which it lives."""

    size: int
    label: str
    birth: int
    death: float = math.inf


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the block that are alive, and their peak in every stage of the step."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.now, self.stage, self.packed = device, 0, "forward", 0
        self.reserves = False
        self.peaks: dict[str, int] = {}
        self.known: dict[int, weakref.finalize] = {}
        self.lives: list[_Life] = []
        # operations so far, the highest level, the operation of that level and its working memory
        self.clock, self.top, self.top_at, self.top_scratch = 0, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::mkldnn_rnn_layer":
            out, self.reserves = _with_workspace(args, out), True
        self.clock += 1
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self._add(t.untyped_storage(), func._schema.name)
        scratch = self._scratch(func, args)
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), self.now + scratch)
        if self.now + scratch > self.top:
            self.top, self.top_at, self.top_scratch = self.now + scratch, self.clock, scratch
        return out

    def enter(self, stage: str) -> None:
        """What follows belongs to `stage`."""
        self.stage = stage

    def alive_at_peak(self) -> dict[str, int]:
        """What is alive when most is, by the stage and the operation that made it, largest first."""
        found: dict[str, int] = defaultdict(int)
        for life in self.lives:
            if life.birth <= self.top_at <= life.death:
                found[life.label] += life.size
        if self.top_scratch:
            found["working memory inside operations"] += self.top_scratch
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _scratch(self, func: Any, args: tuple[Any, ...]) -> int:
        if self.device != "cpu":
            return device_scratch_bytes(func, args)
        self.packed = max(self.packed, packing_bytes(func, args))
        return self.packed + scratch_bytes(func, args)

    def _add(self, storage: torch.UntypedStorage, operation: str) -> None:
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes() if self.device == "cpu" else -(-storage.nbytes() // CUDA_BLOCK) * CUDA_BLOCK
            self.now += size
            self.lives.append(_Life(size, f"{self.stage}: {operation}", self.clock))
            self.known[key] = weakref.finalize(storage, self._drop, key, self.lives[-1])

    def _drop(self, key: int, life: _Life) -> None:
        self.now -= life.size
        life.death = self.clock
        self.known.pop(key, None)


def _with_workspace(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of an LSTM of oneDNN, with a workspace of the size it has with values."""
    (T, B, inputs), hidden = args[0].shape, args[2].shape[1]
    # oneDNN keeps gates, states and their gradients of every step, in rows of whole cache lines
    row = -(-max(inputs, hidden) // 16) * 16
    return (*out[:3], out[3].new_empty(4 * B * row * (15 * T + 10)))


def scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Working memory inside an operation that no tensor shows, on CPU.

    oneDNN reorders the weight, and in the weight gradient sums one copy of it per thread.
    """
    name = func._schema.name
    if name == "aten::convolution":
        return _bytes(args[1])
    if name == "aten::convolution_backward":
        return _bytes(args[2]) * (1 + torch.get_num_threads())
    if name == "spikefit::two_group_backward":
        return generic_scratch_bytes(args)
    return 0


def device_scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """The same on CUDA: firing is composed of pieces there, and its norms sum in float64, step by step."""
    name = func._schema.name
    if name.startswith("spikefit::fire"):
        z = args[0][0] if name == "spikefit::fire" else args[2][0]
        return min(PIECES * z.numel(), PIECES * SCRATCH) * 4
    if name in ("spikefit::moments", "spikefit::channel_norm", "spikefit::channel_norm_backward"):
        return 3 * args[0].numel() // len(args[0]) * 8
    if name == "spikefit::two_group_backward":
        return generic_scratch_bytes(args)
    return 0


def packing_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Memory that a matrix product [M, K] x [K, N] takes on CPU to pack its second factor, and keeps for the next.

    MKL packs some hundred of the K rows at a time.
    """
    if func._schema.name not in ("aten::mm", "aten::addmm"):
        return 0
    K, N = args[-1].shape
    return min(K, PACKED_ROWS) * N * args[-1].element_size()


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


@dataclass(frozen=True)
class PredictedBytes:
    """What `predicted_bytes` returns.

    Attributes:
        peak: above the level before the step.
        saved: what is held between forward and backward.
        stages: "forward UNIT", "loss" and "backward UNIT" -> peak of the live tensors in it, without margin.
        alive: what is alive at the peak, "STAGE: OPERATION" that made it -> bytes, largest first.
        reserves: whether an operation reserves a workspace of which it writes a part alone.
    """

    peak: int
    saved: SavedBytes
    stages: dict[str, int] = field(default_factory=dict)
    alive: dict[str, int] = field(default_factory=dict)
    reserves: bool = False

    @property
    def peak_stage(self) -> str:
        """The stage that sets the peak."""
        return max(self.stages, key=lambda stage: self.stages[stage])

    @staticmethod
    def with_margin(live: int) -> int:
        """What is predicted for a step whose live tensors peak at so many bytes."""
        return int((1 + MARGIN) * live) + CONSTANT


def reliability(
    x: Tensor, predicted: PredictedBytes, *, autocast: bool, device: str | None = None, driver: Driver = WHOLE
) -> str:
    """What the predicted peak of a step is worth: a promise, or an estimate with the reason why it is no more."""
    peak = predicted.peak
    reasons = {
        "an LSTM reserves memory of which it writes about half, so the step takes less": predicted.reserves,
        "half precision: float32 copies inside kernels are not counted": autocast or x.element_size() < 4,
        f"below {PROMISED_FROM >> 20} MiB the heap of the process counts too": peak < PROMISED_FROM,
        "under a rule, gradients of several steps are added in place, and the prediction has both": driver.rule
        is not None,
        "on CUDA, workspaces of cuDNN are not known": (device or x.device.type) != "cpu",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"estimate ({'; '.join(found)})" if found else "measured <= predicted <= 1.15 measured"


def predicted_bytes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction = mean_cross_entropy,
    autocast: bool = False,
    device: str | None = None,
    driver: Driver = WHOLE,
) -> PredictedBytes:
    """Peak and saved bytes of one training step of `model` on `x` and `y`, without allocating them.

    Parameters and buffers are replaced by fake tensors for the time of the call; the real ones are untouched.

    Args:
        model: any module, in training mode.
        x: input [T, B, ...]; only shape, strides and dtype matter.
        y: targets.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        autocast: run under bfloat16 autocast.
        device: "cpu" or "cuda", where the step will run, which need not be here; that of `x` if None.
        driver: what runs the step; the choices of a rule that takes some steps at random are made once.

    Returns:
        PredictedBytes; the peak counts activations, gradients and working memory, but not weights, buffers and input,
        which exist before the step. Without autocast, on the CPU and from 32 MiB on, measured <= peak
        <= 1.15 measured; `reliability` says for a step whether it is such a one.

    Raises:
        SpikefitError: the model's forward depends on values of tensors, which fake tensors do not have.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, because torch then loads its compiler

    mode = FakeTensorMode(allow_non_fake_inputs=False)
    # fake tensors have no random values, and those of the caller stay as they are
    driver = driver.drawn(x.shape[0], torch.Generator().manual_seed(0))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        fake = {key: _fake(mode, t) for key, t in state.items()}
        fake_x, fake_y = _fake(mode, x), _fake(mode, y)
        with (
            _swapped(model, fake),
            mode,
            _LiveBytes(device or x.device.type) as live,
            watched(_Stages(model, live)),
            watching(model, None if driver.rule is None else fake_x) as watch,
            _staged(model, live, watch),
        ):
            training_step(model, fake_x, fake_y, loss, autocast=autocast, driver=driver, backward=watch.backward)
    except RuntimeError as error:
        if isinstance(error, SpikefitError):
            raise
        raise SpikefitError(
            f"predict: {type(model).__name__} cannot run on fake tensors, which have shapes but no values "
            f"({str(error).splitlines()[0]}); remove .item() and the like, or measure a real step."
        ) from error
    peak = PredictedBytes.with_margin(live.top)
    return PredictedBytes(peak, watch.saved, live.peaks, live.alive_at_peak(), live.reserves)


class _Stages(Watcher):
    """Tells `live` which unit of a rebuilt stage runs."""

    def __init__(self, model: nn.Module, live: _LiveBytes) -> None:
        self.live, self.names = live, {module: name for name, module in model.named_modules()}

    def entered(self, unit: SpikingUnit, phase: str) -> None:
        self.live.enter(f"{phase} {self.names[unit]}")


@contextlib.contextmanager
def _staged(model: nn.Module, live: _LiveBytes, watch: Watch) -> Iterator[None]:
    """Tell `live` which unit runs, forward from hooks of the module, backward from hooks of its spikes, or the loss."""

    def before(name: str):
        # what backward runs again belongs to backward
        return lambda module, inputs: None if watch.in_backward else live.enter(f"forward {name}")

    def after(name: str):
        def hook(module, inputs, output):
            spikes = output[0]
            spikes = spikes.carrier if isinstance(spikes, PackedSpikes) else spikes
            if isinstance(spikes, Tensor) and spikes.requires_grad and not watch.in_backward:
                spikes.register_hook(lambda g: live.enter(f"backward {name}"))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, SpikingUnit) and module.neuron is not None:
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name)))
    # what follows the forward of the whole is the loss
    handles.append(model.register_forward_hook(lambda *given: None if watch.in_backward else live.enter("loss")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fake(mode: Any, t: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensor  # here, because torch then loads its compiler

    if isinstance(t, FakeTensor):  # of another mode
        with mode:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    else:
        made = mode.from_tensor(t.detach(), static_shapes=True)
    return made.requires_grad_(t.requires_grad)


@contextlib.contextmanager
def _swapped(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """`model` with its parameters and buffers replaced, shared ones once, for the time of the block."""
    real: list[tuple[nn.Module, str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    key = f"{prefix}.{name}" if prefix else name
                    replacement = made.setdefault(id(t), tensors.get(key, t))
                    real.append((module, name, t))
                    table[name] = replacement
    try:
        yield
    finally:
        for module, name, t in real:
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = t  # type: ignore[assignment]


def saved_bytes(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    loss: LossFunction = mean_cross_entropy,
    driver: Driver = WHOLE,
) -> SavedBytes:
    """Bytes that autograd holds between forward and backward of `model` on `x`, by layer and category.

    Args:
        model: any module, in training mode.
        x: input [T, B, ...]; only shape, strides and dtype matter.
        y: targets [B]; zeros if None.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        driver: what runs the step; under a rule the most that is held at any time counts.

    Returns:
        SavedBytes.
    """
    x, y = with_targets(x if y is None else (x, y))
    return predicted_bytes(model, x, y, loss=loss, driver=driver).saved
