"""The loop over time outside the network, with backward inside the loop."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers.chain import State
from spikefit.losses.losses import Loss, labels_per_step
from spikefit.models import SpikingNetwork
from spikefit.ops.dtype import compute_dtype
from spikefit.rules.activity import spikes_per_step
from spikefit.rules.resolve import resolve, warn_once
from spikefit.rules.sampler import GivenSteps, TopActivity
from spikefit.rules.sequence import Sequence
from spikefit.rules.step import Traces
from spikefit.rules.trace import StepRule, TraceRule


class Outcome(NamedTuple):
    """What a sequence gave; nothing of it holds a graph.

    Attributes:
        loss: mean of the losses of the chosen steps, whatever the gradient is scaled by.
        logits: sum of the logits over all steps, [B, K].
        steps: numbers of the steps that called backward.
    """

    loss: Tensor
    logits: Tensor
    steps: tuple[int, ...]


def drive(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    loss: Loss,
    rule: StepRule,
    *,
    backward: Callable[[Tensor], Any] = torch.autograd.backward,
    update: Callable[[], Any] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    generator: torch.Generator | None = None,
) -> Outcome:
    """Run a sequence under a rule; gradients are added to `.grad` of the parameters.

        for t = 1..T:   logits, state = model.step(x[t], state)
                        if t is chosen:  backward(grad_scale loss.step(logits, targets) / N)
                        state = detached(state)

    N is the number of chosen steps, or T with loss_norm="T".

    Held between steps are the state, the traces and what is computed once for the sequence, so memory does not grow
    with T. Steps that are not chosen run without a graph, and move states, traces and statistics of norms all the same.

    Args:
        model: a `SpikingNetwork`, or a module with its `init_state` and `step`. Nothing in it may need all steps at
            once.
        x: [T, B, ...]; a view with stride 0 along T (`encoding.repeat`) passes the first synapse once.
        targets: classes [B], or [T, B] for labels of every step.
        loss: one that splits over steps.
        rule: `sltt()`, `ottt()`, `ndot()`, `tbptt(k)`, ...
        backward: called with the loss of a step, or of a window; a scaler, or Fabric's `backward`.
        update: called behind every backward for `update_every="step"`: optimiser step and `zero_grad`.
        around: entered around forward and loss of each step; `lambda: torch.autocast("cpu")`.
        generator: of the random choice of steps.

    Returns:
        Outcome of detached tensors.

    Raises:
        StrategyError: model or loss do not go with the rule, see `resolve`; all that clashes is named. Also a state
            that cannot be cut, or a part that the first step shows to be used past the traces.
        OptionError: `update` is missing, or given for one update per sequence; a rule that does not go step by step.
        ShapeError: x or targets of another shape.

    Warns:
        RuleWarning: each note of `resolve`, once per model.

    Example:
        outcome = drive(model, encoding.repeat(images, 6), labels, create_loss("tet"), sltt())
        optimizer.step()
    """
    if not isinstance(rule, StepRule):
        raise OptionError(
            f"drive: expected a rule that calls backward step by step (sltt, ottt, ndot, tbptt), got {rule!r}; rate() "
            "goes with drive_rate."
        )
    notes = resolve(model, loss, rule, timesteps=x.shape[0], world_size=world_size())
    _check(model, x, targets, rule, update)
    warn_once(model, notes, f"rule {rule.name}")
    rule = _with_steps(model, rule, x, around)
    steps, count = rule.draw(x.shape[0], generator)
    share = _shares(loss, targets)
    sequence = Sequence(model, rule, x)
    sequence.begin(x, around)
    state, traces = cast(Any, model).init_state(x.shape[1], tuple(x.shape[2:])), Traces()
    total: Tensor | None = None
    logits_sum: Tensor | None = None
    window: Tensor | None = None
    for t in range(x.shape[0]):
        chosen = t in steps
        with torch.set_grad_enabled(chosen), around():
            logits, state, traces = sequence.step(x[t], state, traces)
            _check_logits(model, rule, logits, t)
            if chosen:
                value = share(logits, t)
                check_trained(f"rule {rule.name}", value)
                total = value.detach() if total is None else total + value.detach()
                value = value / count * rule.grad_scale
                window = value if window is None else window + value
                del value
        if not chosen:
            # casts of a step without a graph would go to the next one, where autocast is entered around the loop
            torch.clear_autocast_cache()
        wide = logits.detach().to(compute_dtype(logits.dtype), copy=True)
        logits_sum = wide if logits_sum is None else logits_sum + wide
        del logits, wide
        if (t + 1) % rule.window == 0 or t + 1 == x.shape[0]:
            if window is not None:
                backward(window)
                window = None  # its graph goes before the next step makes one
                if update is not None:
                    update()
            state = detached(state, f"rule {rule.name}")
    sequence.finish()
    assert total is not None, "a sampler chooses at least one step"
    assert logits_sum is not None
    return Outcome(total / len(steps), logits_sum, steps)


def _shares(loss: Loss, targets: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The share of step t in the loss, of its logits [B, K]."""
    if targets.ndim == 1:
        return lambda logits, t: loss.step(logits, targets)
    labels = labels_per_step(targets)
    return lambda logits, t: loss.step(logits, targets[t], labels=labels)


def _with_steps(
    model: nn.Module, rule: StepRule, x: Tensor, around: Callable[[], AbstractContextManager[Any]]
) -> StepRule:
    """`rule`, with the most active steps given where it ranks them."""
    if not (isinstance(rule, TraceRule) and isinstance(rule.sampler, TopActivity)):
        return rule
    steps = rule.sampler.most_active(spikes_per_step(model, rule, x, around))
    return dataclasses.replace(rule, sampler=GivenSteps(steps))


def _check_logits(model: nn.Module, rule: StepRule, logits: Any, t: int) -> None:
    if not isinstance(logits, Tensor):
        raise StrategyError(
            f"rule {rule.name}: expected logits [B, K] of every step, got {type(logits).__name__} at step {t + 1} of "
            f"{type(model).__name__}, which has a read-out at some steps only; use an exact strategy."
        )


def detached(state: State, who: str) -> State:
    """`state` without its graph, all of it.

    Raises:
        StrategyError: an entry that is neither a tensor nor a plain value, and may hold tensors that stay in the graph.
    """

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach()
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        raise StrategyError(
            f"{who}: expected a state of tensors, numbers and None in tuples, lists and dicts, got "
            f"{type(leaf).__name__}, in which tensors could stay in the graph of every step; let step return its "
            "tensors in a tuple."
        )

    return tree_map(cut, state)


def _check(model: nn.Module, x: Tensor, targets: Tensor, rule: StepRule, update: Callable[[], Any] | None) -> None:
    who = f"rule {rule.name}"
    check_sequence(who, model, x)
    if tuple(targets.shape) not in ((x.shape[1],), (x.shape[0], x.shape[1])):
        raise ShapeError(
            f"{who}: expected targets {(x.shape[1],)}, or {(x.shape[0], x.shape[1])} for labels of every step, got "
            f"{tuple(targets.shape)}."
        )
    if (update is None) == (rule.update_every == "step"):
        wanted = "update=..., a function that steps the optimiser" if update is None else "no update"
        raise OptionError(f"{who}: update_every={rule.update_every!r} goes with {wanted}; change one of the two.")


def check_sequence(who: str, model: nn.Module, x: Tensor) -> None:
    """Raise ShapeError unless `x` is a sequence [T, B, ...] that the model takes."""
    if isinstance(model, SpikingNetwork):
        model.check_input(x)
    elif x.ndim < 3 or x.shape[0] == 0:
        raise ShapeError(f"{who}: expected x as [T, B, ...] with T of at least 1, got {tuple(x.shape)}.")


def check_trained(who: str, loss: Tensor) -> None:
    """Raise OptionError if a loss has no gradient to give."""
    if not loss.requires_grad:
        raise OptionError(
            f"{who}: expected a loss that depends on a parameter with requires_grad, got one that depends on none; "
            "free a parameter with requires_grad_(), or evaluate with model(x)."
        )


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
