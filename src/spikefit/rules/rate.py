"""The rate rule: the gradient of firing rates, by one pass over time without a graph and one backward without time.

The passes and their equations stand in `rate_passes`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError, check_choice
from spikefit.layers.applying import applied_by
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.rules.driver import Outcome, check_sequence, check_trained
from spikefit.rules.rate_passes import First, Second, StepPass, WholePass, given
from spikefit.rules.resolve import resolve, warn_once
from spikefit.rules.trace import check_scale

# How the first pass runs, by the mode of the rule.
MODES: dict[str, type[First]] = {"step": StepPass, "sequence": WholePass}


@dataclass(frozen=True, kw_only=True)
class RateRule:
    """The rate rule as a value, for `drive_rate`.

    Args:
        mode: "step" runs the first pass step by step, in memory that does not grow with T; "sequence" layer by layer,
            each over all T, which is faster, takes the memory of one layer's sequences, and allows norms over the
            whole sequence. Without such norms both give the same gradient.
        grad_scale: factor on all gradients, > 0.

    Raises:
        OptionError: unknown mode, or grad_scale out of range.
    """

    mode: str = "step"
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self.name, "mode", self.mode, MODES)
        check_scale(self.name, self.grad_scale)

    @property
    def name(self) -> str:
        """The name of the rule in recipes and messages."""
        return "rate"


def rate(mode: str = "step", *, grad_scale: float = 1.0) -> RateRule:
    """Gradients of firing rates: `RateRule` with these options.

    Exact at T = 1, and for one spiking layer whose input is the same at every step, for every reset. Rates do not know
    the order of events, so inputs that change over time give other gradients than BPTT.

    Args:
        mode, grad_scale: as in `RateRule`.

    Raises:
        OptionError: unknown mode, or grad_scale out of range.

    Source: Yu et al. 2024, arXiv:2410.11488, without the division of the gradient by T in its release.
    """
    return RateRule(mode=mode, grad_scale=grad_scale)


def drive_rate(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    loss: Loss,
    rule: RateRule,
    *,
    backward: Callable[[Tensor], Any] = torch.autograd.backward,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Run a sequence under the rate rule; gradients are added to `.grad` of the parameters.

        t = 1..T, no graph:   logits[t] of the model, r and k of every neuron
        once, with a graph:   o = model of mean_t x[t], whose neurons return r with derivative k
        backward(grad_scale loss(o, targets)),   o with the value of mean_t logits[t]

    Held for backward are two numbers per neuron and the graph of one step, whatever T is. With mode="step" the first
    pass goes through `model.step` and keeps one more number per neuron and the state; with mode="sequence" it is one
    forward of the model, of which the sequences of one layer exist at a time.

    Running statistics of norms move in the first pass alone, as often as in a forward. In training, a norm passes
    gradients with its mean and 1 / sqrt(var + eps), or their means over steps where it has statistics of each step,
    which in turn have the derivatives of the statistics of the second pass.

    Args:
        model: a `SpikingNetwork` of units, residual blocks, and layers and a read-out that are linear.
        x: [T, B, ...].
        targets: classes [B].
        loss: one that reads nothing but the mean of the logits over time.
        rule: `rate()`.
        backward: called once, with the loss; a scaler, or Fabric's `backward`.
        around: entered around each step of the first pass, or all of it with mode="sequence", and around the second
            pass and the loss; `lambda: torch.autocast("cpu")`.

    Returns:
        Outcome of detached tensors: the loss of the mean logits, the sum of the logits, and all steps.

    Raises:
        StrategyError: model or loss do not go with the rule, see `resolve`; all that clashes is named. Also a layer
            that is used twice in a step.
        OptionError: another rule.
        ShapeError: x or targets of another shape.

    Example:
        outcome = drive_rate(model, encoding.repeat(images, 4), labels, create_loss("ce_mean"), rate())
        optimizer.step()
    """
    if not isinstance(rule, RateRule):
        raise OptionError(
            f"drive_rate: expected rate(), got {rule!r}; rules that call backward step by step go with drive."
        )
    notes = resolve(model, loss, rule, timesteps=x.shape[0])
    _check(model, x, targets, rule)
    warn_once(model, notes, f"rule {rule.name}")
    first, T = MODES[rule.mode](cast(SpikingNetwork, model), f"rule {rule.name}"), x.shape[0]
    total = first.run(x, around)
    with torch.enable_grad(), around(), applied_by(Second(first)):
        # in the dtype of the sum, so that the loss reads the mean unrounded
        mean = given(first.again(x.mean(0)).to(total.dtype), total / T)
        value = loss(mean.unsqueeze(0), targets)
        check_trained(f"rule {rule.name}", value)
        found, value = value.detach(), value * rule.grad_scale
    backward(value)
    return Outcome(found, total, tuple(range(T)))


def _check(model: nn.Module, x: Tensor, targets: Tensor, rule: RateRule) -> None:
    who = f"rule {rule.name}"
    check_sequence(who, model, x)
    if tuple(targets.shape) != (x.shape[1],):
        raise ShapeError(
            f"{who}: expected targets {(x.shape[1],)}, one class per sample, got {tuple(targets.shape)}; labels of "
            "every step need a rule that goes step by step, such as sltt."
        )
