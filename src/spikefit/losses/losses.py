"""The losses. `splits_per_step` says whether a loss is a mean over steps, to be taken one step at a time."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError

# Target of a sample or a step without a label; it adds nothing to the loss.
UNLABELLED = -1


class Loss:
    """Base: `loss(logits [T, B, K], targets)` -> scalar.

    Targets are classes: [B], or [T, B] for labels of every step; -1 marks what has no label.
    """

    splits_per_step: ClassVar[bool]

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; logits [T, B, K], targets int64 [B] or [T, B]."""
        raise NotImplementedError

    def step(self, logits_t: Tensor, targets: Tensor) -> Tensor:
        """The share of one step; logits [B, K], targets [B]. The mean over steps is the loss of the sequence."""
        raise ShapeError(
            f"{type(self).__name__}: it needs the logits of all steps at once; use ce_steps or tet instead."
        )

    def _check(self, logits: Tensor, targets: Tensor, *, per_step: bool) -> None:
        who = type(self).__name__
        if logits.ndim != 3:
            raise ShapeError(f"{who}: expected logits [T, B, K], got {tuple(logits.shape)}.")
        allowed = [tuple(logits.shape[1:2])] + ([tuple(logits.shape[:2])] if per_step else [])
        if tuple(targets.shape) not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ShapeError(f"{who}: expected targets {wanted}, one class per sample, got {tuple(targets.shape)}.")
        if targets.dtype != torch.int64:
            raise ShapeError(f"{who}: expected int64 classes as targets, got {targets.dtype}; call targets.long().")


def _check_smoothing(who: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"{who}: label_smoothing must lie in [0, 1), got {label_smoothing}.")


class CrossEntropyMean(Loss):
    """Cross-entropy of the logits averaged over time: CE(mean_t o_t, y).

    Args:
        label_smoothing: share spread evenly over all classes, in [0, 1).

    Raises:
        OptionError: label_smoothing out of range.
        ShapeError: logits not [T, B, K], or targets not [B].
    """

    splits_per_step = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing("CrossEntropyMean", label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=False)
        return F.cross_entropy(
            logits.float().mean(0), targets, label_smoothing=self.label_smoothing, ignore_index=UNLABELLED
        )


class CrossEntropySteps(Loss):
    """Mean over steps of the cross-entropy of each: mean_t CE(o_t, y).

    Args:
        label_smoothing: share spread evenly over all classes, in [0, 1).

    Raises:
        OptionError: label_smoothing out of range.
        ShapeError: logits not [T, B, K], or targets neither [B] nor [T, B].
    """

    splits_per_step = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing(type(self).__name__, label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=True)
        rows = targets if targets.ndim == 2 else targets.expand(logits.shape[0], -1)
        return self._entropy(logits.flatten(0, 1), rows.reshape(-1))

    def step(self, logits_t: Tensor, targets: Tensor) -> Tensor:
        return self._entropy(logits_t, targets)

    def _entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing, ignore_index=UNLABELLED)


class TET(CrossEntropySteps):
    """Temporal efficient training: mean_t [(1 - a) CE(o_t, y) + a MSE(o_t, m)].

    Args:
        mse_weight: a, in [0, 1].
        mse_target: m, the level every logit is drawn to.
        label_smoothing: of the cross-entropy.

    Raises:
        OptionError: mse_weight or label_smoothing out of range.
        ShapeError: logits not [T, B, K], or targets neither [B] nor [T, B].

    Source: Deng et al. 2022, arXiv:2202.11946.
    """

    def __init__(self, *, mse_weight: float = 0.05, mse_target: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        if not 0 <= mse_weight <= 1:
            raise OptionError(f"TET: mse_weight must lie in [0, 1], got {mse_weight}.")
        self.mse_weight, self.mse_target = mse_weight, mse_target

    def _entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        distance = (logits.float() - self.mse_target).square().mean()
        return (1 - self.mse_weight) * super()._entropy(logits, targets) + self.mse_weight * distance


class RateMSE(Loss):
    """Squared distance of the mean output from the one-hot target: mean_{b,k} (mean_t o_t - onehot(y))^2.

    Raises:
        ShapeError: logits not [T, B, K], or targets not [B].

    Source: Fang et al. 2021, arXiv:2007.05785 (mean squared error on firing rates).
    """

    splits_per_step = False

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=False)
        labelled = targets != UNLABELLED
        rate = logits.float().mean(0)[labelled]
        return F.mse_loss(rate, F.one_hot(targets[labelled], logits.shape[2]).to(rate.dtype))


LOSSES: dict[str, Callable[..., Loss]] = {
    "ce_mean": CrossEntropyMean,
    "ce_steps": CrossEntropySteps,
    "tet": TET,
    "rate_mse": RateMSE,
}


def create_loss(name: str, **options: Any) -> Loss:
    """Make a loss by name: "ce_mean", "ce_steps", "tet" or "rate_mse".

    Raises:
        OptionError: unknown name or option; near names are listed.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}.{hint}")
    known = list(inspect.signature(LOSSES[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(f"loss {name}: unknown option {unknown[0]!r}; known: {', '.join(known) or 'none'}.")
    return LOSSES[name](**options)
