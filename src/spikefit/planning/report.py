"""`report`: the bytes of a training step before and after, per unit and category, without running it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.engines import Plan
from spikefit.errors import OptionError
from spikefit.losses.model_loss import LossFunction
from spikefit.models.network import plain_bptt, restored_strategy
from spikefit.planning.memory import PredictedBytes, predicted_bytes
from spikefit.planning.plan import largest_size, show_bytes, static_bytes
from spikefit.planning.target import check_model, in_training, mean_cross_entropy, with_targets

LONGEST = 16
# Rows of what is alive at the peak.
SHOWN = 10


@dataclass(frozen=True)
class Side:
    """One of the two columns of a report.

    Attributes:
        peak_bytes: predicted peak of the step above weights, buffers, optimiser and input.
        categories: "weights", "gradients", "optimiser", "buffers and input", "kept spikes", "kept floats", "transient".
        units: unit -> category -> bytes held between forward and backward.
        stage: "forward UNIT", "loss" or "backward UNIT", in which the peak is.
        alive: what is alive at the peak, "STAGE: OPERATION" that made it -> bytes, largest first; without margin.
    """

    peak_bytes: int
    categories: dict[str, int]
    units: dict[str, dict[str, int]]
    stage: str
    alive: dict[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a training step, plain and as the model is set up.

    Attributes:
        before: under plain BPTT.
        after: under the plan given, or the strategy the model has.
        ratio: peak before over peak after.
        slowdown: predicted by the plan; None without one.
        largest_batch: what would fit the budget of the plan; None without one.
        largest_timesteps: the same for T, looked for up to 16 times the T of the sample.
    """

    before: Side
    after: Side
    ratio: float
    slowdown: float | None
    largest_batch: int | None
    largest_timesteps: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        sides = (self.before, self.after)
        rows = [["", "before", "after"]]
        rows += [[name, *(show_bytes(s.categories[name]) for s in sides)] for name in self.before.categories]
        rows += [["peak of a step", *(show_bytes(s.peak_bytes) for s in sides)], ["", "", ""]]
        names = dict.fromkeys([*self.before.units, *self.after.units])
        rows += [[n, *(show_bytes(sum(s.units.get(n, {}).values())) for s in sides)] for n in names]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}".rstrip() for a, b, c in rows]
        lines += ["", f"alive at the peak after, in {self.after.stage}:"]
        largest = list(self.after.alive.items())
        lines += [f"  {show_bytes(size).rjust(9)}  {label}" for label, size in largest[:SHOWN]]
        lines += [f"  {show_bytes(sum(size for _, size in largest[SHOWN:])).rjust(9)}  all others", ""]
        slower = f", step {self.slowdown:.2f} times as long" if self.slowdown else ""
        lines.append(f"peak {self.ratio:.1f} times smaller{slower}")
        if self.largest_batch is not None:
            lines.append(
                f"within the budget: batch up to {self.largest_batch}, or T up to {self.largest_timesteps} "
                f"(looked for up to {LONGEST} times the given T)"
            )
        return "\n".join(lines)


def report(
    model: nn.Module,
    sample: Tensor | tuple[Tensor, Tensor],
    plan: Plan | None = None,
    *,
    optimizer: str | torch.optim.Optimizer | None = None,
    loss: LossFunction = mean_cross_entropy,
    autocast: bool = False,
    device: str | None = None,
) -> MemoryReport:
    """Bytes of a training step before and after, per unit and category; nothing is allocated.

    Args:
        model: a network of spikefit units; it is left as it was.
        sample: input [T, B, ...], or (input, targets); only shapes, strides and dtype matter.
        plan: the choice to report; None for the strategy that `model` has now.
        optimizer: as in `spikefit.plan`.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        autocast: under bfloat16 autocast.
        device: as in `spikefit.plan`.

    Returns:
        MemoryReport.

    Raises:
        OptionError: model, sample or plan is of another kind.
        PlanError: the plan belongs to another model, or the forward cannot be traced.
    """
    check_model("report", model)
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(
            f"report: expected what spikefit.plan returned as plan, or None, got {type(plan).__name__}; "
            "Plan.load(path) reads a saved one."
        )
    x, y = with_targets(sample)
    predict = partial(predicted_bytes, model, loss=loss, autocast=autocast, device=device)
    with in_training(model):
        with plain_bptt(model):
            before = predict(x, y)
        with restored_strategy(model):
            if plan is not None:
                plan.apply(model)
            after = predict(x, y)
            sizes = _sizes(model, x, y, plan, optimizer, predict)
    return MemoryReport(
        before=_side(model, x, before, optimizer),
        after=_side(model, x, after, optimizer),
        ratio=before.peak / after.peak,
        slowdown=None if plan is None else plan.predicted_slowdown,
        largest_batch=sizes[0],
        largest_timesteps=sizes[1],
    )


def _sizes(
    model, x, y, plan: Plan | None, optimizer, predict: Callable[[Tensor, Tensor], PredictedBytes]
) -> tuple[int | None, int | None]:
    """The largest batch and T that fit the budget of the plan."""
    if plan is None or plan.budget_bytes is None:
        return None, None

    def peak(timesteps: int, batch: int) -> int:
        # memory that is never touched: only shapes and strides matter
        big = x.new_empty(1 if x.stride(0) == 0 else timesteps, batch, *x.shape[2:]).expand(
            timesteps, batch, *x.shape[2:]
        )
        static, _ = static_bytes(model, big, optimizer)
        return static + predict(big, y[:1].expand(batch)).peak

    steps = x.shape[0]
    batch = largest_size(lambda n: peak(steps, n), plan.budget_bytes, x.shape[1])
    if getattr(model, "timesteps", None) is not None:
        return batch, steps
    most = LONGEST * steps  # a prediction goes through every step, so its time bounds how far to look
    return batch, largest_size(lambda n: peak(n, x.shape[1]), plan.budget_bytes, steps, most)


def _side(model: nn.Module, x: Tensor, predicted: PredictedBytes, optimizer) -> Side:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    others = sum(b.numel() * b.element_size() for b in model.buffers()) + x.untyped_storage().nbytes()
    spikes = predicted.saved.categories().get("packed spikes", 0)
    floats = predicted.saved.total - spikes
    return Side(
        predicted.peak,
        {
            "weights": weights,
            "optimiser": static_bytes(model, x, optimizer)[0] - weights - others,
            "buffers and input": others,
            "gradients": gradients,
            "kept spikes": spikes,
            "kept floats": floats,
            "transient": max(0, predicted.peak - gradients - spikes - floats),
        },
        predicted.saved.layers,
        predicted.peak_stage,
        predicted.alive,
    )
