"""The losses. `splits_per_step` says whether a loss is a mean over steps, to be taken one step at a time;
`reads_auxiliary` whether it also reads the logits of auxiliary heads; `reads_mean` whether it reads the mean of the
logits over time and nothing else.

Labels of -1 count nowhere: a mean over labels leaves them out, and a batch without any label adds nothing, 0.
"""

import difflib
import inspect
import math
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

    Attributes:
        splits_per_step: whether `step` gives shares whose mean over steps is the loss of the sequence.
        reads_auxiliary: whether it is called with the logits of auxiliary heads too, `loss(logits, targets,
            auxiliary)`, auxiliary [n, B, K] as `model(x, auxiliary=True)` returns them behind the logits.
        reads_mean: whether it depends on the logits through their mean over time alone.
    """

    splits_per_step: ClassVar[bool]
    reads_auxiliary: ClassVar[bool] = False
    reads_mean: ClassVar[bool] = False

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; logits [T, B, K], targets int64 [B] or [T, B].

        Raises:
            ShapeError: shapes or dtype do not fit, or a target is no class of the logits.
        """
        raise NotImplementedError

    def step(self, logits_t: Tensor, targets: Tensor, *, labels: Tensor | float | None = None) -> Tensor:
        """The share of one step; the mean of the shares over the steps is the loss of the sequence.

        Args:
            logits_t: [B, K].
            targets: of this step, [B].
            labels: labels per step, on average over the sequence: `labels_per_step(targets [T, B])`. Needed where some
                steps have fewer labels than others, which one step cannot know; None takes those of this step.

        Raises:
            ShapeError: the loss does not split over steps.
        """
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
        _check_classes(who, targets)


def _check_classes(who: str, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ShapeError(f"{who}: expected int64 classes as targets, got {targets.dtype}; call targets.long().")


def labels_per_step(targets: Tensor) -> Tensor:
    """How many labels a step has, on average over the sequence: targets [T, B] -> 0-d > 0, for `Loss.step`."""
    # where there is no label at all, the sum that this divides is 0
    return (targets != UNLABELLED).sum().clamp(min=1) / targets.shape[0]


def _cross_entropy(
    who: str, logits: Tensor, targets: Tensor, label_smoothing: float, labels: Tensor | float | None = None
) -> Tensor:
    """Mean cross-entropy of the labelled rows of [N, K], 0 if there is none; `labels`, if given, is the divisor."""
    try:
        mean = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, ignore_index=UNLABELLED)
    except IndexError:
        raise ShapeError(
            f"{who}: expected classes 0..{logits.shape[1] - 1} as targets (-1 for no label), because the logits have "
            f"{logits.shape[1]} classes, got {int(targets.min())}..{int(targets.max())}; make the model with as many "
            "classes as the data have."
        ) from None
    count = (targets != UNLABELLED).sum()
    # the mean of nothing is NaN
    mean = torch.where(count > 0, mean, 0)
    return mean if labels is None else mean * count / labels


def _check_smoothing(who: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"{who}: label_smoothing must lie in [0, 1), got {label_smoothing}.")


class CrossEntropyMean(Loss):
    """Cross-entropy of the logits averaged over time: CE(mean_t o_t, y).

    Args:
        label_smoothing: share spread evenly over all classes, in [0, 1).

    Raises:
        OptionError: label_smoothing out of range.
        ShapeError: logits not [T, B, K], targets not [B], or no classes of the logits.

    Source: Deng et al. 2022, arXiv:2202.11946 (there L_SDT).
    """

    splits_per_step = False
    reads_mean = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing("CrossEntropyMean", label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=False)
        return _cross_entropy("CrossEntropyMean", logits.float().mean(0), targets, self.label_smoothing)


class CrossEntropySteps(Loss):
    """Mean over steps of the cross-entropy of each: mean_t CE(o_t, y); with labels of every step, mean over all labels.

    Args:
        label_smoothing: share spread evenly over all classes, in [0, 1).

    Raises:
        OptionError: label_smoothing out of range.
        ShapeError: logits not [T, B, K], targets neither [B] nor [T, B], or no classes of the logits.

    Source: Deng et al. 2022, arXiv:2202.11946 (L_TET without its second term).
    """

    splits_per_step = True

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing(type(self).__name__, label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=True)
        rows = targets if targets.ndim == 2 else targets.expand(logits.shape[0], -1)
        return self._entropy(logits.flatten(0, 1), rows.reshape(-1))

    def step(self, logits_t: Tensor, targets: Tensor, *, labels: Tensor | float | None = None) -> Tensor:
        _check_classes(type(self).__name__, targets)
        return self._entropy(logits_t, targets, labels)

    def _entropy(self, logits: Tensor, targets: Tensor, labels: Tensor | float | None = None) -> Tensor:
        return _cross_entropy(type(self).__name__, logits, targets, self.label_smoothing, labels)


class TET(CrossEntropySteps):
    """Temporal efficient training: mean_t [(1 - a) CE(o_t, y) + a MSE(o_t, m)]; the second term needs no label.

    Args:
        mse_weight: a, in [0, 1].
        mse_target: m, the level every logit is drawn to; finite.
        label_smoothing: of the cross-entropy.

    Raises:
        OptionError: mse_weight, mse_target or label_smoothing out of range.
        ShapeError: logits not [T, B, K], targets neither [B] nor [T, B], or no classes of the logits.

    Source: Deng et al. 2022, arXiv:2202.11946.
    """

    def __init__(self, *, mse_weight: float = 0.05, mse_target: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        if not 0 <= mse_weight <= 1:
            raise OptionError(f"TET: mse_weight must lie in [0, 1], got {mse_weight}.")
        if not math.isfinite(mse_target):
            raise OptionError(f"TET: mse_target must be a finite number, got {mse_target}.")
        self.mse_weight, self.mse_target = mse_weight, mse_target

    def _entropy(self, logits: Tensor, targets: Tensor, labels: Tensor | float | None = None) -> Tensor:
        distance = (logits.float() - self.mse_target).square().mean()
        return (1 - self.mse_weight) * super()._entropy(logits, targets, labels) + self.mse_weight * distance


class RateMSE(Loss):
    """Squared distance of the mean output from the one-hot target: mean_{b,k} (mean_t o_t - onehot(y))^2.

    Raises:
        ShapeError: logits not [T, B, K], or targets not [B].

    Source: Fang et al. 2021, arXiv:2007.05785 (mean squared error on firing rates).
    """

    splits_per_step = False
    reads_mean = True

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check(logits, targets, per_step=False)
        labelled, rate = targets != UNLABELLED, logits.float().mean(0)
        wanted = F.one_hot(targets.clamp(min=0), logits.shape[2]).to(rate.dtype)
        distance = (rate - wanted).square().mean(1)
        return (distance * labelled).sum() / labelled.sum().clamp(min=1)


class CrossEntropyHeads(Loss):
    """Cross-entropy of auxiliary heads and the final one: sum_i w_i CE(a_i, y) + w_{n+1} CE(mean_t o_t, y).

    a_i are the logits of auxiliary head i = 1..n in the order of the steps that they read, o those of the final head.
    Without `weights`, w_i = i / (n + 1) and w_{n+1} = 2: 0.25, 0.5, 0.75 and 2 for three auxiliary heads.

    Args:
        weights: w_1 .. w_{n+1}, each positive; None for those above.
        label_smoothing: share spread evenly over all classes, in [0, 1).

    Raises:
        OptionError: label_smoothing or a weight out of range, or not n + 1 weights for n auxiliary heads.
        ShapeError: logits not [T, B, K], auxiliary logits missing or not [n, B, K], targets not [B], or no classes of
            the logits.

    Source: Hu et al. 2024, arXiv:2405.16466; weights of its public release (BICLab/T-RevSNN).
    """

    splits_per_step = False
    reads_auxiliary = True

    def __init__(self, *, weights: tuple[float, ...] | list[float] | None = None, label_smoothing: float = 0.0) -> None:
        _check_smoothing("CrossEntropyHeads", label_smoothing)
        if weights is not None and not (
            isinstance(weights, tuple | list) and len(weights) > 1 and all(map(_is_positive, weights))
        ):
            raise OptionError(
                "CrossEntropyHeads: weights must list positive numbers, one for each auxiliary head and one for the "
                f"final head, got {weights!r}."
            )
        self.weights = None if weights is None else tuple(weights)
        self.label_smoothing = label_smoothing

    def weights_for(self, heads: int) -> tuple[float, ...]:
        """w_1 .. w_{n+1} for n = `heads` auxiliary heads.

        Raises:
            OptionError: the weights given are not so many.
        """
        usual = (*(i / (heads + 1) for i in range(1, heads + 1)), 2.0)
        if self.weights is not None and len(self.weights) != heads + 1:
            raise OptionError(
                f"CrossEntropyHeads: expected {heads + 1} weights, for {heads} auxiliary heads and the final one, got "
                f"{len(self.weights)}, {self.weights}; leave weights out for {', '.join(f'{w:g}' for w in usual)}."
            )
        return usual if self.weights is None else self.weights

    def __call__(self, logits: Tensor, targets: Tensor, auxiliary: Tensor | None = None) -> Tensor:
        """The loss of a batch; logits [T, B, K], targets int64 [B], auxiliary [n, B, K]."""
        self._check(logits, targets, per_step=False)
        if auxiliary is None:
            raise ShapeError(
                "CrossEntropyHeads: expected the logits of the auxiliary heads [n, B, K] as third argument, got none; "
                "call logits, auxiliary = model(x, auxiliary=True) and loss(logits, targets, auxiliary), or take "
                "CrossEntropyMean for the final head alone."
            )
        if auxiliary.ndim != 3 or auxiliary.shape[0] == 0 or auxiliary.shape[1:] != logits.shape[1:]:
            raise ShapeError(
                f"CrossEntropyHeads: expected auxiliary logits [n, {logits.shape[1]}, {logits.shape[2]}], n of at "
                f"least 1, as the logits are {tuple(logits.shape)}, got {tuple(auxiliary.shape)}."
            )
        *early, last = self.weights_for(auxiliary.shape[0])
        value = last * self._entropy(logits.float().mean(0), targets)
        for weight, head in zip(early, auxiliary, strict=True):
            value = value + weight * self._entropy(head, targets)
        return value

    def _entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy("CrossEntropyHeads", logits, targets, self.label_smoothing)


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


LOSSES: dict[str, Callable[..., Loss]] = {
    "ce_mean": CrossEntropyMean,
    "ce_steps": CrossEntropySteps,
    "tet": TET,
    "rate_mse": RateMSE,
    "ce_heads": CrossEntropyHeads,
}


def create_loss(name: str, **options: Any) -> Loss:
    """Make a loss by name.

    Args:
        name: "ce_mean", "ce_steps", "tet", "rate_mse" or "ce_heads".
        **options: those of the class, such as label_smoothing.

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
