"""Norms. Each declares `time_scope`: "none", "step" (can be used step by step) or "sequence" (needs all T together)."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError
from spikefit.layers.applying import applier_now
from spikefit.ops.dispatch import Backend, check_backend
from spikefit.ops.norm import Moments, affine, channel_norm

TimeScope = Literal["none", "step", "sequence"]


class Normal(NamedTuple):
    """How a branch is normalised.

    Attributes:
        kind: "batch" for statistics of the sequence, "affine" for a given map x = z first + second, "none".
        first, second: weight and bias of the norm, or scale and shift of the map, [C]; None for "none".
        per_step, eps, backend: of the norm.
    """

    kind: str = "none"
    first: Tensor | None = None
    second: Tensor | None = None
    per_step: bool = False
    eps: float = 0.0
    backend: Backend = "auto"


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
        x, moments = channel_norm(z, weight, bias, eps=self.eps, per_step=per_step, backend=self.backend)
        self.track(moments, repeats)
        return x, moments.mean, moments.var

    def normal(self) -> Normal:
        """What `forward` would do now, as a value."""
        if not self.training:
            return Normal("affine", *self._evaluation_map(self.weight, self.bias), backend=self.backend)
        return Normal("batch", self.weight, self.bias, self.time_scope == "step", self.eps, self.backend)

    def _evaluation_map(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) [C] of the running statistics."""
        scale = weight * torch.rsqrt(self.running_var + self.eps)
        return scale, bias - self.running_mean * scale

    @torch.no_grad()
    def track(self, moments: Moments, repeats: int = 1) -> None:
        """Move the running statistics once per row of the moments, unless they are frozen."""
        if self.frozen:
            return
        rows = moments.mean.shape[0]
        # a repeated step counts T times in one sequence, but is T batches of its own in per-step statistics
        count, times = (moments.elements, repeats) if self.time_scope == "step" else (moments.elements * repeats, 1)
        unbiased = moments.var * (count / max(count - 1, 1))
        for row in range(rows):
            for _ in range(times):
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else self._equal_share()
                self.running_mean.lerp_(moments.mean[row].to(self.running_mean.dtype), share)
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


NORMS: tuple[str, ...] = ("bn", "tdbn", "step_bn", "ws", "none")


def create_norm(name: str, channels: int, *, v_threshold: float = 1.0, **options) -> BatchNorm | None:
    """Make a norm by name.

    Args:
        name: "bn" (over time and batch), "tdbn" (the same, weight starting at `v_threshold`), "step_bn" (per step),
            "ws" (no norm; the unit standardises its weight) or "none".
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
    return StepBatchNorm(channels, **options) if name == "step_bn" else BatchNorm(channels, **options)
