"""Norms. Each declares `time_scope`: "none", "step" (can be used step by step) or "sequence" (needs all T together)."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError
from spikefit.layers.applying import applier_now
from spikefit.layers.running import SequenceStatistics, Start, Sums, statistics_now
from spikefit.ops.dispatch import Backend, check_backend
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.norm import Moments, affine, channel_norm, moments, renorm, running_map

TimeScope = Literal["none", "step", "sequence"]


class Normal(NamedTuple):
    """How a branch is normalised.

    Attributes:
        kind: "batch" for statistics of the sequence, "affine" for a given map x = z first + second, "none".
        first, second: weight and bias of the norm, or scale and shift of the map, [C]; None for "none".
        per_step, eps, backend: of the norm.
        start: for "batch", running statistics that the value uses, while the gradient is that of the statistics of the
            sequence; None for a value with these.
    """

    kind: str = "none"
    first: Tensor | None = None
    second: Tensor | None = None
    per_step: bool = False
    eps: float = 0.0
    backend: Backend = "auto"
    start: Start | None = None


@contextlib.contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the norms in `modules` normalise as usual but leave their running statistics alone.

    A forward that is run again for backward uses it, so that statistics are updated once.
    """
    norms = [m for module in modules for m in module.modules() if isinstance(m, BatchNorm)]
    before = [norm.frozen for norm in norms]
    for norm in norms:
        norm.frozen = True
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.frozen = value


class BatchNorm(nn.Module):
    """Batch norm over time, batch and space; buffers and keys are those of nn.BatchNorm2d.

        xh = (z - mean) / sqrt(var + eps),   x = weight xh + bias

    Training uses the statistics of the sequence and moves the running ones once per call; evaluation uses the running
    ones. Threshold-dependent batch norm (tdBN) is the same with a weight that starts at `v_threshold`.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: share of the current statistics in the running ones; None for their plain mean.
        initial_weight: first value of the weight; `v_threshold` for tdBN.
        backend: "auto", "reference" or "numba".

    Shapes:
        [T, B, C, ...] -> the same.

    Raises:
        OptionError: unknown backend.
        BackendError: in a call that the backend asked for cannot run.

    Source: Ioffe, Szegedy 2015, arXiv:1502.03167; tdBN: Zheng et al. 2021, arXiv:2011.05280.
    """

    time_scope: ClassVar[TimeScope] = "sequence"

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initial_weight: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.backend: Backend = backend
        # set by `frozen_statistics`
        self.frozen = False
        self.weight = nn.Parameter(torch.full((channels,), float(initial_weight)))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, z: Tensor, *, repeats: int = 1) -> Tensor:
        """Normalise `z`; `repeats` says how many equal steps each given step stands for."""
        applier = applier_now()
        if applier is not None:
            return applier.normalise(self, z, repeats)
        return self.normalised(z, self.weight, self.bias, repeats)[0]

    def normalised(self, z: Tensor, weight: Tensor, bias: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """(x, mean, var): `forward` with the weight and bias given, and the statistics it used, [C] or [1 or T, C]."""
        if not self.training:
            scale, shift = self._evaluation_map(weight, bias)
            return affine(z, scale, shift, backend=self.backend), self.running_mean, self.running_var
        per_step = self.time_scope == "step"
        x, found = channel_norm(z, weight, bias, eps=self.eps, per_step=per_step, backend=self.backend)
        self.track(found, repeats)
        return x, found.mean, found.var

    def normal(self) -> Normal:
        """What `forward` would do now, as a value."""
        if not self.training:
            return Normal("affine", *self._evaluation_map(self.weight, self.bias), backend=self.backend)
        return Normal("batch", self.weight, self.bias, self.time_scope == "step", self.eps, self.backend)

    def _evaluation_map(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) [C] of the running statistics."""
        return running_map(weight, bias, self.running_mean, self.running_var, self.eps)

    @torch.no_grad()
    def track(self, found: Moments, repeats: int = 1) -> None:
        """Move the running statistics once per row of the moments, unless they are frozen."""
        if self.frozen:
            return
        rows = found.mean.shape[0]
        # a repeated step counts T times in one sequence, but is T batches of its own in per-step statistics
        count, times = (found.elements, repeats) if self.time_scope == "step" else (found.elements * repeats, 1)
        unbiased = found.var * (count / max(count - 1, 1))
        for row in range(rows):
            for _ in range(times):
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else self._equal_share()
                self.running_mean.lerp_(found.mean[row].to(self.running_mean.dtype), share)
                self.running_var.lerp_(unbiased[row].to(self.running_var.dtype), share)

    def _equal_share(self) -> Tensor:
        """1 / batches so far, as a tensor: reading the number would stop a GPU and break a compiled graph."""
        return self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps:g}, momentum={self.momentum}, time_scope={self.time_scope}"


class StepBatchNorm(BatchNorm):
    """Batch norm with statistics of each time step: over batch and space only.

    As if nn.BatchNorm2d were applied step by step: running statistics move T times per sequence. Options and keys are
    those of `BatchNorm`.

    Shapes:
        [T, B, C, ...] -> the same.
    """

    time_scope: ClassVar[TimeScope] = "step"


class OnlineRenorm(BatchNorm):
    """Online spiking renormalisation (OSR): running statistics forward, batch norm of each step backward.

        xh = (z - m) / sqrt(w + eps),   p = sqrt((w + eps) / (w_r + eps)),   o = (m - m_r) / sqrt(w_r + eps)
        x = weight (xh p + o) + bias  =  weight (z - m_r) / sqrt(w_r + eps) + bias

    m and w are mean and variance of a step over batch and space, m_r and w_r the running ones at the start of the
    sequence. Training has the values of evaluation; backward differentiates xh, and p and o are constants of it.
    Options, buffers and keys are those of `BatchNorm`.

    Running statistics move once per sequence, by mean and (unbiased) variance of all its T B places values:

        mean = 1/T sum_t m_t,   var = 1/T sum_t (w_t + m_t^2) - mean^2

    A sequence is one call; under a rule it is all steps of `drive`, those without a gradient included. `model.step`
    outside a rule is a sequence of one step, so that steps fed one by one are not those of one call in training.

    The first sequence of all has no running statistics: a call starts from those of the sequence that it is given.
    `drive` runs the sequence once more before its first step, without a gradient, in which the norm takes statistics
    of each step while it sums up; random numbers and buffers are left as they were.

    Strategies that cut a sequence into pieces (step_checkpoint, inverse, integer), and layers that share a membrane,
    are refused, as for `BatchNorm`.

    Shapes:
        [T, B, C, ...] -> the same.

    Raises:
        as `BatchNorm`; StrategyError inside torch.compile under a rule.

    Source: Zhu et al., ICLR 2024, "Online stabilization of spiking neural networks"; the start, and the unbiased
    variance, are ours.
    """

    time_scope: ClassVar[TimeScope] = "step"

    def normalised(self, z: Tensor, weight: Tensor, bias: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """(x, mean, var): `forward` with the weight and bias given, and the statistics of the value, here [C]."""
        if not self.training or self._opens():
            return super().normalised(z, weight, bias, repeats)
        mean, var = moments(z.detach(), per_step=True, backend=self.backend)
        compute = compute_dtype(z.dtype)
        found = Moments(mean.to(compute), var.to(compute), z.numel() // mean.numel())
        running = self.start().settled(Sums.of(found, repeats))
        x = renorm(z, weight, bias, (mean, var), running, eps=self.eps, backend=self.backend)
        self.track(found, repeats)
        return x, *running

    def normal(self) -> Normal:
        normal = super().normal()
        return normal if not self.training or self._opens() else normal._replace(start=self.start())

    def is_unset(self) -> Tensor:
        """Whether there are no running statistics yet, 0-d bool."""
        return self.num_batches_tracked == 0

    def _opens(self) -> bool:
        """Whether this is the pass in which the first sequence gets its start."""
        held = statistics_now()
        return held is not None and self in held.opening

    @torch.no_grad()
    def start(self) -> Start:
        """Running statistics at the start of the sequence that a call belongs to."""
        held = statistics_now()
        if held is not None and self in held.starts:
            return held.starts[self]
        # copies, because backward reads them when the buffers have moved
        found = Start(self.running_mean.clone(), self.running_var.clone(), self.is_unset())
        if held is not None:
            held.starts[self] = found
        return found

    @torch.no_grad()
    def track(self, found: Moments, repeats: int = 1) -> None:
        """Steps of a sequence: they are summed up within one, else they are all of it."""
        held = statistics_now()
        if held is not None and (self in held.opening or not self.frozen):
            held.add(self, found, repeats)
        elif not self.frozen:
            self.move(self.start(), Sums.of(found, repeats))

    @torch.no_grad()
    def move(self, start: Start, sums: Sums) -> None:
        """Move the running statistics from `start` by one sequence."""
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else self._equal_share()
        before, now = start.settled(sums), (sums.mean, sums.unbiased)
        for running, old, new in zip((self.running_mean, self.running_var), before, now, strict=True):
            running.copy_(torch.lerp(old, new.to(old.dtype), share))


@contextlib.contextmanager
def again_from(starts: dict[OnlineRenorm, Start]) -> Iterator[None]:
    """Within the block, a forward that backward runs again finds the running statistics of the first time."""
    if not starts:
        yield
        return
    with SequenceStatistics(starts).open():
        yield


def starts_of(modules: Iterable[nn.Module]) -> dict[OnlineRenorm, Start]:
    """The running statistics that the norms in `modules` use now, for `again_from`."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, OnlineRenorm) and m.training]
    return {norm: norm.start() for norm in norms}


def needs_whole_calls(norm: nn.Module | None) -> bool:
    """Whether a call in training has to get a whole sequence: for statistics over it, or that move once by it."""
    return getattr(norm, "time_scope", "none") == "sequence" or isinstance(norm, OnlineRenorm)


NORMS: tuple[str, ...] = ("bn", "tdbn", "step_bn", "osr", "ws", "none")


def create_norm(name: str, channels: int, *, v_threshold: float = 1.0, **options) -> BatchNorm | None:
    """Make a norm by name.

    Args:
        name: "bn" (over time and batch), "tdbn" (the same, weight starting at `v_threshold`), "step_bn" (per step),
            "osr" (per step, on running statistics), "ws" (no norm; the unit standardises its weight) or "none".
        channels: C.
        v_threshold: threshold of the neuron behind it, for tdBN.
        **options: those of `BatchNorm`.

    Raises:
        OptionError: unknown name; near names are listed.
    """
    if name not in NORMS:
        near = difflib.get_close_matches(name, NORMS, n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"norm: expected one of {', '.join(NORMS)}, got {name!r}.{hint}")
    if name in ("ws", "none"):
        if options:
            raise OptionError(f"norm {name}: takes no options, got {', '.join(options)}.")
        return None
    if name == "tdbn":
        options = {"initial_weight": v_threshold, **options}
    kinds = {"step_bn": StepBatchNorm, "osr": OnlineRenorm}
    return kinds.get(name, BatchNorm)(channels, **options)
