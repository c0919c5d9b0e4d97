"""`plan`: choose what every unit keeps, so that a training step fits a budget and loses as little time as possible.

    peak = static + max over stages j of [ base_j + sum of z_l kept by units l before j (and by j itself in backward) ]

`base_j` comes from one traced step in which every unit keeps bits alone; units behind j are freed when backward reaches
it. Among the choices that fit, the one that runs the fewest operations again is found exactly.
"""

import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spikefit.engines.plan import Plan, UnitPlan, planned_units
from spikefit.errors import BudgetError, OptionError, PlanError
from spikefit.layers.packed import PackedSpikes
from spikefit.layers.unit import LaterCurrent
from spikefit.losses.model_loss import LossFunction
from spikefit.models.network import restored_strategy, use_strategy
from spikefit.planning.memory import PredictedBytes, predicted_bytes
from spikefit.planning.target import check_model, in_training, mean_cross_entropy, with_targets

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Slots of an optimiser per weight, in values of float32.
SLOTS = {None: 0, "sgd": 1, "adam": 2, "adamw": 2}
# Work of norm, neuron and pool per neuron-step of plain BPTT, in multiply-accumulates of a convolution.
ELEMENTWISE = 800
# Without a budget a plan may take this factor of the least peak there is.
NEARLY = 1.01


class Unit(NamedTuple):
    """What the search knows of one unit.

    Attributes:
        name: its path.
        kept: bytes of z, which it holds if it keeps its input.
        bits: bytes it holds anyway.
        macs: multiply-accumulates of one forward of its weights, over the whole batch and sequence.
        forward, backward: live bytes at its two stages when no unit keeps z.
    """

    name: str
    kept: int
    bits: int
    macs: int
    forward: int
    backward: int

    @property
    def neuron_steps(self) -> int:
        """Neurons times steps, one bit each."""
        return 8 * self.bits


def plan(
    model: nn.Module,
    sample: Tensor | tuple[Tensor, Tensor],
    budget: int | float | str | None,
    *,
    optimizer: str | torch.optim.Optimizer | None = None,
    loss: LossFunction = mean_cross_entropy,
    autocast: bool = False,
    device: str | None = None,
) -> Plan:
    """Choose what every unit of `model` keeps for backward, without allocating anything.

    Args:
        model: a network of spikefit units; it is left as it was, `Plan.apply` sets it up.
        sample: input [T, B, ...], or (input, targets); only shapes, strides and dtype matter.
        budget: bytes of weights, buffers, optimiser, input and the peak of a step together: a number, "4GB" (10^9),
            "4GiB" (2^30), a fraction below 1 of the memory of the device, or None for the least memory there is, to
            one percent.
        optimizer: "sgd" (one slot per weight), "adam", "adamw" (two), an optimiser that has run, or None for none.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        autocast: plan for bfloat16 autocast.
        device: "cpu" or "cuda", where the step will run, which need not be here; that of the sample if None.

    Returns:
        Plan.

    Raises:
        OptionError: a budget or optimiser that cannot be read.
        PlanError: the model has no units, or its forward cannot be traced.
        BudgetError: nothing fits; the message says the smallest budget that does, and which batch or T would fit.
    """
    check_model("plan", model)
    x, y = with_targets(sample)
    where = x.device if device is None else torch.device(device)
    limit = None if budget is None else parse_budget(budget, where)
    if not planned_units(model):
        raise PlanError(
            f"plan: {type(model).__name__} has no spiking unit of this library, so there is nothing to choose; build "
            "it from SpikingConv2d and its like, or wrap the forward in spikefit.pack_saved_tensors()."
        )
    static, notes = static_bytes(model, x, optimizer)
    if where.type == "cuda":
        notes.append("on CUDA the prediction is an estimate: workspaces of cuDNN are not known before they are taken.")
    tracer = _Tracer(model, x, y, loss, autocast, where.type)
    units, around = tracer.units()
    if limit is None:
        # what the unit at the peak leaves room for costs no memory
        least = int(NEARLY * tracer.predict("spikes").peak)
        keeps = _fitting(tracer, units, around, static + least, static)
    else:
        plain = tracer.predict("all")
        if static + plain.peak <= limit:
            return _made(tracer, units, ["all"] * len(units), plain, limit, static, notes)
        keeps = _fitting(tracer, units, around, limit, static)
    return _made(tracer, units, keeps, tracer.predict(keeps), limit, static, notes)


def parse_budget(text: int | float | str, device: torch.device | None = None) -> int:
    """Bytes of 4000000000, "4GB", "1.5 GiB", "512MB" or 0.5 (a fraction of the memory of the device).

    Raises:
        OptionError: not readable, or not above zero.
    """
    hint = "write a positive number of bytes, or like 4GB, 4GiB, 512MB, or a fraction below 1 of the device."
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or math.isnan(number) or (match[3] and not match[2]):
            raise OptionError(f"budget: cannot read {text!r}; {hint}")
        unit = match[2].upper()
        value = number * (BINARY_UNITS[unit] if match[3] else UNITS[unit])
        fraction = not unit and "." in match[1] and number < 1
    elif isinstance(text, bool) or not isinstance(text, int | float):
        raise OptionError(f"budget: expected a number or a text, got {type(text).__name__}; {hint}")
    else:
        value, fraction = float(text), isinstance(text, float) and 0 < text < 1
    if not math.isfinite(value) or value <= 0:
        raise OptionError(f"budget: expected more than 0 bytes, got {text!r}; {hint}")
    return int(value * _device_memory(device)) if fraction else int(value)


def _device_memory(device: torch.device | None) -> int:
    if device is not None and device.type == "cuda":
        if not torch.cuda.is_available():
            raise OptionError("budget: a fraction of a GPU that is not here is no number; give bytes, like 24GB.")
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def static_bytes(model: nn.Module, x: Tensor, optimizer: str | torch.optim.Optimizer | None) -> tuple[int, list[str]]:
    """(bytes of weights, buffers, optimiser and input, what was assumed)."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rest = sum(b.numel() * b.element_size() for b in model.buffers()) + x.untyped_storage().nbytes()
    if isinstance(optimizer, torch.optim.Optimizer):
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        slots, note = sum(t.numel() * t.element_size() for t in tensors), "optimiser: its state as it is now."
    elif optimizer in SLOTS:
        slots = 4 * SLOTS[optimizer] * sum(p.numel() for p in model.parameters())
        note = (
            f"optimiser {optimizer}: {SLOTS[optimizer]} float32 per weight." if optimizer else "no optimiser counted."
        )
    else:
        raise OptionError(f"plan: optimizer must be sgd, adam, adamw, an optimiser or None, got {optimizer!r}.")
    return weights + rest + slots, [note]


class _Tracer:
    """Traces steps of one model on fake tensors under different choices; the model is left as it was."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: LossFunction, autocast: bool, device: str) -> None:
        self.model, self.x, self.y, self.loss = model, x, y, loss
        self.autocast, self.device = autocast, device
        self.names = [name for name, _ in planned_units(model)]
        self.weights = {name: tuple(unit.synapse.weight.shape) for name, unit in planned_units(model)}

    def predict(self, keeps: str | list[str], x: Tensor | None = None, y: Tensor | None = None) -> PredictedBytes:
        """Trace a step in which the units keep `keeps`."""
        chosen = [keeps] * len(self.names) if isinstance(keeps, str) else keeps
        with in_training(self.model), restored_strategy(self.model):
            use_strategy(self.model, _choices(self.names, chosen, self.weights))
            x, y = self.x if x is None else x, self.y if y is None else y
            return predicted_bytes(self.model, x, y, loss=self.loss, autocast=self.autocast, device=self.device)

    def units(self) -> tuple[list[Unit], int]:
        """(all units, live bytes of the loss), from a step with bits alone and one that keeps every z."""
        macs: dict[str, int] = {}
        handles = [
            unit.register_forward_hook(_count_macs(name, macs), with_kwargs=True)
            for name, unit in planned_units(self.model)
        ]
        try:
            lean = self.predict("spikes")
        finally:
            for handle in handles:
                handle.remove()
        full = self.predict("input")
        unseen = [name for name in self.names if f"forward {name}" not in lean.stages]
        if unseen:
            raise PlanError(f"plan: the forward of {type(self.model).__name__} never ran {unseen[0]}; remove the unit.")
        units = [
            Unit(
                name,
                sum(full.saved.layers.get(name, {}).values()) - sum(lean.saved.layers.get(name, {}).values()),
                sum(lean.saved.layers.get(name, {}).values()),
                macs[name],
                lean.stages[f"forward {name}"],
                lean.stages.get(f"backward {name}", 0),
            )
            for name in sorted(self.names, key=list(macs).index)
        ]
        return units, max(lean.stages.get("loss", 0), lean.stages.get("forward", 0))


def _count_macs(name: str, macs: dict[str, int]) -> Callable[..., None]:
    """A hook that notes the operations of one forward of a unit and of the current it adds."""

    def hook(unit, inputs, options, output) -> None:
        x, neurons, shortcut = inputs[0], output[1].numel(), options.get("shortcut")
        tensor = x.carrier if isinstance(x, PackedSpikes) else x
        repeated = isinstance(x, Tensor) and x.shape[0] > 1 and x.stride(0) == 0
        fan_in = unit.synapse.weight[0].numel()
        if isinstance(shortcut, LaterCurrent):
            fan_in += shortcut.unit.synapse.weight[0].numel()
        macs[name] = fan_in * neurons * (1 if repeated else tensor.shape[0])

    return hook


def _choices(names: list[str], keeps: list[str], weights: dict[str, tuple[int, ...]]) -> Plan:
    """A plan without numbers, to be applied."""
    units = [UnitPlan(n, k, 0, weights[n], "") for n, k in zip(names, keeps, strict=True)]
    return Plan(None, 0, 0, 1.0, units, (), "")


def choose(units: list[Unit], around: int, live: int) -> list[str] | None:
    """The choice with the fewest operations run again whose live bytes never exceed `live`; None if there is none.

    Dynamic programming over the units in forward order. A state is the sum of z kept so far; of two states the one that
    keeps no less and runs no less again is dropped, so the search is exact.
    """
    # (bytes of z kept before this unit, operations run again, choices)
    states: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]
    for unit in units:
        after = []
        for kept, cost, choices in states:
            if kept + unit.forward > live:
                continue
            if kept + unit.backward <= live:
                after.append((kept, cost + unit.macs, (*choices, "spikes")))
            if kept + unit.kept + unit.backward <= live:
                after.append((kept + unit.kept, cost, (*choices, "input")))
        after.sort()
        states, least = [], math.inf
        for state in after:
            if state[1] < least:
                states.append(state)
                least = state[1]
    fitting = [s for s in states if s[0] + around <= live]
    return list(min(fitting, key=lambda s: s[1])[2]) if fitting else None


def _fitting(tracer: _Tracer, units: list[Unit], around: int, limit: int, static: int) -> list[str]:
    """The best choice whose traced peak fits."""
    order = [tracer.names.index(u.name) for u in units]
    # what the margin of the prediction leaves for live tensors
    live = int((limit - static - PredictedBytes.with_margin(0)) / (PredictedBytes.with_margin(10**9) / 10**9))
    for _ in range(6):
        found = choose(units, around, live)
        if found is None:
            break
        keeps = [""] * len(order)
        for position, keep in zip(order, found, strict=True):
            keeps[position] = keep
        over = static + tracer.predict(keeps).peak - limit
        if over <= 0:
            return keeps
        # kept tensors also lengthen the life of others; the model of the search leaves that out
        live -= over
    bits_alone = ["spikes"] * len(order)
    if static + tracer.predict(bits_alone).peak <= limit:
        return bits_alone
    raise BudgetError(_infeasible(tracer, units, limit, static))


def _infeasible(tracer: _Tracer, units: list[Unit], limit: int, static: int) -> str:
    """What the smallest budget is, what sets it, and which batch or T would fit."""
    least = tracer.predict("spikes")
    batch = _largest(tracer, lambda n: (tracer.x[:, :n], tracer.y[:n]), tracer.x.shape[1], limit, static)
    advice = []
    if batch:
        advice.append(f"batch {batch} would fit at T = {tracer.x.shape[0]}")
    if getattr(tracer.model, "timesteps", None) is None:
        steps = _largest(tracer, lambda n: (tracer.x[:n], tracer.y), tracer.x.shape[0], limit, static)
        if steps:
            advice.append(f"T = {steps} would fit at batch {tracer.x.shape[1]}")
    return (
        f"plan: a budget of {show_bytes(limit)} cannot be met; the smallest is {show_bytes(static + least.peak)}, of "
        f"which {show_bytes(static)} are weights, buffers, optimiser and input, and {show_bytes(least.peak)} one step, "
        f"set by {least.peak_stage}. "
        + (f"Else: {' or '.join(advice)}." if advice else "Even one sample does not fit.")
    )


def _largest(tracer: _Tracer, cut: Callable[[int], tuple[Tensor, Tensor]], most: int, limit: int, static: int) -> int:
    """The largest size below `most` whose step fits; 0 if none does."""
    if most == 1:
        return 0
    return largest_size(lambda n: static + tracer.predict("spikes", *cut(n)).peak, limit, most // 2, most - 1)


def largest_size(peak: Callable[[int], int], limit: int, start: int, most: int | None = None) -> int:
    """The largest size up to `most` whose `peak` is within `limit`; 0 if none is.

    Looks at `start` and `2 * start` first and then along the line through the last two looks: bytes grow almost
    linearly with a batch or with time, so few looks are enough.
    """
    low, high = 0, None if most is None else most + 1
    looks: list[tuple[int, int]] = []
    size = start
    while high is None or high - low > 1:
        looks.append((size, peak(size)))
        if looks[-1][1] <= limit:
            low = max(low, size)
        else:
            high = size
        size = 2 * size if len(looks) == 1 and low else _along(looks, limit)
        size = max(size, low + 1) if high is None else min(max(size, low + 1), high - 1)
    return low


def _along(looks: list[tuple[int, int]], limit: int) -> int:
    """The size at which the line through the last two looks, or through the origin, meets the limit."""
    (m, at_m), (n, at_n) = looks[-2] if len(looks) > 1 else (0, 0), looks[-1]
    slope = (at_n - at_m) / (n - m)
    return n + int((limit - at_n) // slope) if slope > 0 else 2 * n


def share_of_step(units: list[Unit]) -> list[float]:
    """The time of running the weight of a unit once, over that of a step of plain BPTT, where it runs three times."""
    plain = sum(3 * u.macs + ELEMENTWISE * u.neuron_steps for u in units)
    return [u.macs / plain if plain else 0.0 for u in units]


def _made(
    tracer: _Tracer,
    units: list[Unit],
    keeps: list[str],
    predicted: PredictedBytes,
    limit: int | None,
    static: int,
    notes: list[str],
) -> Plan:
    """The plan with its reasons."""
    choice = dict(zip(tracer.names, keeps, strict=True))
    slowdown, made = 1.0, []
    for u, share in zip(units, share_of_step(units), strict=True):
        keep = choice[u.name]
        slowdown += share if keep == "spikes" else 0
        reason = {
            "all": "everything fits, so autograd keeps what it likes",
            "input": f"keeps z, {show_bytes(u.kept)}: spares {share:.1%} of the step",
            "spikes": f"runs its weight again: costs {share:.1%} of the step, frees {show_bytes(u.kept)}",
        }[keep]
        held = sum(predicted.saved.layers.get(u.name, {}).values())
        made.append(UnitPlan(u.name, keep, held, tracer.weights[u.name], reason))
    explanation = [f"peak {show_bytes(predicted.peak)} above weights, set by {predicted.peak_stage}."]
    explanation += _next_plan(units, [choice[u.name] for u in units], predicted, static)
    return Plan(
        budget_bytes=limit,
        static_bytes=static,
        predicted_peak_bytes=predicted.peak,
        predicted_slowdown=round(slowdown, 4),
        units=made,
        sample=tuple(tracer.x.shape),
        dtype=str(tracer.x.dtype).removeprefix("torch."),
        notes=notes,
        explanation=explanation,
    )


def _next_plan(units: list[Unit], keeps: list[str], predicted: PredictedBytes, static: int) -> list[str]:
    """The next faster plan: which unit would keep z, and what budget that takes."""
    candidates = []
    for i, unit in enumerate(units):
        if keeps[i] == "spikes":
            kept = [u.kept if k == "input" or j == i else 0 for j, (u, k) in enumerate(zip(units, keeps, strict=True))]
            needs = max(max(u.forward + sum(kept[:j]), u.backward + sum(kept[: j + 1])) for j, u in enumerate(units))
            candidates.append((PredictedBytes.with_margin(max(needs, max(predicted.stages.values()))), unit))
    if not candidates:
        return [] if set(keeps) == {"all"} else ["nothing faster to choose: no unit runs its weight again."]
    needs, unit = min(candidates, key=lambda c: (c[0], -c[1].macs))
    return [f"next faster: {unit.name} keeps z, with a budget of {show_bytes(static + needs)}."]


def show_bytes(count: int) -> str:
    """12.3 MB, with decimal prefixes."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count} B"
