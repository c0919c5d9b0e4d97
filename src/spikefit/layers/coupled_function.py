"""The backward of steps coupled in time: one function over the whole sequence, which keeps what `Keep` says.

It goes through the steps from the last to the first, and through the stages of a step from the deepest up:

    G_l = (carry + head) + window(v_l[t]) q_l               q_l = dL/ds_l[t], complete when its turn comes
    (q_below, q_deeper, q_parameters) = vjp of F_lt, applied to G_l
    v_l[t-1] = (v_l[t] - F_lt) / a_l[t],   carry = a_l[t] G_l,   da_l[t] = sum of G_l v_l[t-1]

F_lt runs once, for its value (the inverse) and for its gradient; its graph is freed before the next one is made. Sums
are those of plain autograd, in its order, so that gradients are equal to the bit wherever states are.

Source: Hu et al. 2024, arXiv:2405.16466.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from spikefit.errors import ReconstructionError, StrategyError
from spikefit.layers.coupled_keep import (
    Call,
    Keep,
    MaybeTensor,
    Places,
    Recorder,
    check_keep,
    mark,
    name_of,
    output_mark,
    place,
    smallest_gain,
    total_of,
    unpacked_codes,
)
from spikefit.layers.coupled_steps import CoupledSteps, Head, Tensors, broadcast, laid_out, pooled, repeated_in_place
from spikefit.layers.coupling import uncouple
from spikefit.layers.recompute import TO_REPEAT, Surroundings, check_owned, replayed
from spikefit.ops import threshold
from spikefit.ops.values import has_values


def run_coupled(block: CoupledSteps, x: Tensor, state: tuple[Any, ...] | None = None, *, keep: Keep):
    """As `block(x, state)`, with a backward that keeps what `keep` says.

    Raises:
        StrategyError: bits of a block whose branches read analog states, a gain too small to divide by, or an inverse
            whose error could exceed the tolerance; with the largest safe anchor_every.
        ReconstructionError: in backward, if spikes come back otherwise or a branch gives another output; stage and step
            are named.
    """
    check_keep(block, keep)
    if not torch.is_grad_enabled():
        return block(x, state)
    step, v = block.entered(x, state)
    call = Call(block, keep, step, x.shape[0], repeated_in_place(x), Places(block, step, x.shape[0]))
    gains = block.gains()
    flat = [a for t in call.steps_with_gains for a in gains[t - 1]]
    # the gradient of a repeated sequence is added up in one tensor
    rows, *after = _Coupled.apply(call, x[:1] if call.once else x, *v, *flat, *call.places.tensors)
    return rows, (step + x.shape[0], *after)


class _Coupled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x, *tensors):
        block = call.block
        ctx.call, ctx.surroundings = call, Surroundings.now(x.device.type, [block])
        v, flat, _ = call.parted(tensors)
        gains, learns = call.by_step(flat), any(call.parted(ctx.needs_input_grad[2:])[1])
        # bits give every argument of a branch; states are there for the gradients of gains alone
        inverts = call.keep.kind == "anchors" or (call.keep.kind == "bits" and learns)
        recorder, divides = Recorder(call, inverts), inverts and not call.exact
        smallest = smallest_gain(call, gains) if divides else 1.0
        moved = [(b, b.clone()) for b in block.buffers()] if divides else []
        s, rows = block.fired(v, x), list[Tensor]()
        for t, x_t in enumerate(call.inputs(x), call.step + 1):
            run = recorder.running(t)
            v, s = block.advance(t - 1, x_t, v, s, gains[t], run)
            recorder.note(t, v)
            row = block.read(t, v[-1], s[-1], run)
            rows += [] if row is None else [row]
        try:
            recorder.check_safe(smallest)
        except StrategyError:
            # a batch that is refused has moved no statistics
            for buffer, before in moved:
                buffer.copy_(before)
            raise
        saved, ctx.spec = tree_flatten((recorder.kept(), x, tensors))
        ctx.save_for_backward(*saved)
        ctx.inverts, ctx.learns, ctx.shapes = inverts, learns, [one.shape for one in v]
        ctx.set_materialize_grads(False)
        return block.stacked(rows, x), *v

    @staticmethod
    def backward(ctx, g, *q):
        if torch.is_grad_enabled():
            raise StrategyError(
                f"{name_of(ctx.call.keep)}: expected a first derivative, got create_graph=True; spikes with a window "
                "for a slope have no second one."
            )
        if g is None and all(one is None for one in q):
            return (None,) * len(ctx.needs_input_grad)
        with ctx.surroundings.again([ctx.call.block]):
            return None, *_Backward(ctx, g, list(q)).run()


class _Backward:
    """Walks through the steps from the last to the first."""

    def __init__(self, ctx, g: MaybeTensor, q: list[MaybeTensor]) -> None:
        self.call: Call = ctx.call
        self.block, self.stages = self.call.block, range(self.call.block.count)
        self.inverts, self.learns, self.shapes = ctx.inverts, ctx.learns, ctx.shapes
        self.kept, x, tensors = tree_unflatten(list(ctx.saved_tensors), ctx.spec)
        self.x, self.wants_x, self.device = self.call.inputs(x), ctx.needs_input_grad[1], x.device
        self.start, gains, parameters = self.call.parted(tensors)
        self.gains = self.call.by_step(gains)
        wants = self.call.parted(ctx.needs_input_grad[2:])[2]
        self.tensors = [t.detach().requires_grad_(want) for t, want in zip(parameters, wants, strict=True)]
        self.d_rows = [] if g is None else list(g.unbind())
        # gradients of v_l[t] by the carry and by heads, and of its spikes
        self.carry: list[MaybeTensor] = list(q)
        self.spiked: list[MaybeTensor] = [None for _ in self.stages]
        self.total = self.kept.total
        # (step, stage, whether a branch gave another output than in forward)
        self.changed: list[tuple[int, int, Tensor]] = []
        self.same_arguments = True
        self.given: dict[int, Tensor] = {}
        self.d_x: dict[int, Tensor] = {}
        self.d_gains: dict[int, list[MaybeTensor]] = {}
        self.d_tensors: list[MaybeTensor] = [None for _ in self.tensors]

    @torch.no_grad()
    def run(self) -> list[MaybeTensor]:
        """Gradients of (x, states in front, gains, tensors of branches and heads)."""
        call = self.call
        v: list[MaybeTensor] = list(self.kept.states.get(call.last, [None for _ in self.stages]))
        for t in range(call.last, call.step, -1):
            if t in self.block.head_of and self.d_rows:
                self._through_head(t, v, self.d_rows.pop())
            before = self._step(t, v)
            self._take_off(t, v)
            v = before
        self._check_outputs()
        self._check_total()
        start = [self._complete(call.step, stage, self.start) for stage in self.stages] if self.start else []
        gains = [d for t in call.steps_with_gains for d in self.d_gains.get(t, [None for _ in self.stages])]
        return [self._gradient_of_x(), *start, *gains, *self.d_tensors]

    def _step(self, t: int, v: list[MaybeTensor]) -> list[MaybeTensor]:
        """Go back through step `t`: v[t] -> v[t-1], None where it is not needed."""
        first, analog = t == 1, self.block.fusion == "all_deeper"
        known = self.start if t - 1 == self.call.step else self.kept.states.get(t - 1)
        # an inverse gives analog arguments with rounding; all others come back to the bit
        self.same_arguments = not analog or bool(known) or not self.inverts or self.call.exact
        before: list[MaybeTensor] = list(known) if known else [None for _ in self.stages]
        carried: list[Any] = (
            self.block.products(known, self.gains[t]) if known and analog else [None for _ in self.stages]
        )
        fired: list[MaybeTensor] = [None for _ in self.stages]
        to_carry: list[MaybeTensor] = [None for _ in self.stages]
        to_spikes: list[MaybeTensor] = [None for _ in self.stages]
        for stage in reversed(self.stages):
            d = self._complete(t, stage, v)
            below = self.x[t - 1 - self.call.step] if stage == 0 else self._spikes(t, stage - 1, v)
            deeper = () if first else self.block.deeper(stage, fired, carried)
            f, (d_below, *d_deeper) = self._through(t, stage, (below, *deeper), d)
            if stage:
                self.spiked[stage - 1] = _sum(self.spiked[stage - 1], d_below)
            elif d_below is not None:
                self._add_to_x(t, d_below)
            if first:
                continue
            if not known and self.inverts:
                known = self._recovered(t, stage, cast(Tensor, v[stage]), f, before, carried)
            fired[stage] = self._spikes(t - 1, stage, before)
            to_carry[stage] = _sum(to_carry[stage], d)
            for i, one in enumerate(d_deeper, stage + 1):
                target = to_carry if analog else to_spikes
                target[i] = _sum(target[i], one)
        if not first:
            self._hand_on(t, before, to_carry)
            self.spiked = to_spikes
        return before

    def _recovered(
        self, t: int, stage: int, v: Tensor, f: Tensor, before: list[MaybeTensor], carried: list[Any]
    ) -> Tensors | None:
        """Fill in P and v[t-1] of a stage by the inverse; all of v[t-1] if that went wrong and the steps ran again."""
        carried[stage] = uncouple(v, f, grid=self.block.state_grid)
        before[stage] = self._undone(carried[stage], self.gains[t][stage])
        if self._same(t - 1, stage, before[stage]):
            return None
        known = self._run_again(t - 1, stage)
        before[:], carried[:] = known, self.block.products(known, self.gains[t])
        return known

    def _hand_on(self, t: int, before: list[MaybeTensor], d: list[MaybeTensor]) -> None:
        """From the gradients of P = a v[t-1] to those of a and of v[t-1]."""
        if self.learns and t in self.call.steps_with_gains:
            axes = [tuple(i for i in range(len(shape)) if i != 1) for shape in self.shapes]
            self.d_gains[t] = [
                None if one is None else (one * cast(Tensor, v)).sum(axis)
                for one, v, axis in zip(d, before, axes, strict=True)
            ]
        self.carry = [
            one if one is None or a is None else broadcast(a, one) * one
            for one, a in zip(d, self.gains[t], strict=True)
        ]

    def _through(self, t: int, who: Any, args: tuple[Any, ...], d: MaybeTensor) -> tuple[Tensor, list[MaybeTensor]]:
        """(output of a branch or head of step `t`, gradients of `args`); those of its tensors are added up."""
        module = self.block.heads[self.block.head_of[t]] if who == "head" else self.block.branch(t - 1, who)
        places = self.call.places.named[t - 1, who]
        leaves = [a.detach().requires_grad_(self.wants_x or who != 0 or i > 0) for i, a in enumerate(args)]
        tensors = {name: self.tensors[place] for name, place in places.items()}
        with torch.set_grad_enabled(d is not None), replayed(self.kept.draws.get((t, who)), self.device):
            f = functional_call(module, tensors, tuple(leaves))
        if who != "head":
            self._compare(t, who, f)
        if d is None or not f.requires_grad:
            return f.detach(), [None for _ in args]
        # a tensor may have two names
        learned = [i for i in dict.fromkeys(places.values()) if self.tensors[i].requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        wanted = inputs + [self.tensors[i] for i in learned]
        check_owned(f"{name_of(self.call.keep)}: {place(t, who)}", f, wanted)
        made = list(torch.autograd.grad(f, wanted, d.to(f.dtype), allow_unused=True))
        for i, one in zip(learned, made[len(inputs) :], strict=True):
            self.d_tensors[i] = _sum(self.d_tensors[i], one)
        found = dict(zip(map(id, inputs), made, strict=False))
        return f.detach(), [found.get(id(leaf)) for leaf in leaves]

    def _through_head(self, t: int, v: list[MaybeTensor], d: Tensor) -> None:
        """Add what the head behind step `t` says to the gradient of the last stage."""
        last = self.stages[-1]
        by_spikes = cast(Head, self.block.heads[self.block.head_of[t]]).reads == "spikes"
        seen = pooled(self._spikes(t, last, v)) if by_spikes else self.kept.pooled[t]
        _, (d_seen,) = self._through(t, "head", (seen.to(self.x[0].dtype),), d)
        if d_seen is None:
            return
        shape = self.shapes[last]
        spread = d_seen.to(seen.dtype).view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape) / math.prod(shape[2:])
        target = self.spiked if by_spikes else self.carry
        target[last] = _sum(target[last], spread)

    def _complete(self, t: int, stage: int, v: Sequence[MaybeTensor]) -> MaybeTensor:
        """dL/dv of a stage: by the carry and heads, and by its spikes."""
        q = self.spiked[stage]
        if q is None:
            return self.carry[stage]
        return _sum(self.carry[stage], threshold.within(self._code(t, stage, v, 1), q))

    def _spikes(self, t: int, stage: int, v: Sequence[MaybeTensor]) -> Tensor:
        """s_l[t], as forward had it."""
        return self._code(t, stage, v, 0).to(self.x[0].dtype)

    def _code(self, t: int, stage: int, v: Sequence[MaybeTensor], which: int) -> Tensor:
        """Spikes (0) or window (1) of v_l[t], from the bits that were kept or from the state."""
        if t in self.kept.codes:
            codes = unpacked_codes(self.kept.codes[t][stage], self.shapes[stage])
            return (codes & 1 if which == 0 else codes >> 1).bool()
        state = cast(Tensor, v[stage])
        return threshold.spikes(state) if which == 0 else threshold.window(state)

    @staticmethod
    def _undone(carried: MaybeTensor, a: MaybeTensor) -> Tensor:
        """v[t-1] = P / a, in the layout of states."""
        carried = cast(Tensor, carried)
        return laid_out(carried if a is None else carried / broadcast(a, carried))

    def _same(self, t: int, stage: int, v: MaybeTensor) -> bool:
        """Whether spikes and window of v_l[t] are those of forward, as far as marks of single steps were kept."""
        if self.kept.marks is None or not has_values(cast(Tensor, v)):
            return True
        return bool(mark(cast(Tensor, v)) == self.kept.marks[t - 1 - self.call.step, stage])

    def _run_again(self, t: int, stage: int) -> Tensors:
        """v[t] by the steps from the kept state before it; ReconstructionError unless that is asked for."""
        call = self.call
        self._check_outputs()
        if call.keep.on_flip != "repair":
            raise ReconstructionError(
                f"reversible: spikes of stage {stage + 1} behind step {t} came back otherwise, so the gradient would "
                "be wrong: running backwards rounds, and a state that lay near a threshold has crossed it. Keep more "
                "states (strategy='reversible:N' with a smaller N), let backward run such steps again "
                f"('reversible:{call.keep.anchor_every or 'none'},{call.keep.tolerance:g},repair'), keep the spikes "
                "(strategy='spike_bits'), or make the way back exact (gain='one' with state_grid=14)."
            )
        self.same_arguments = True
        below = max((k for k in self.kept.states if k < t), default=call.step)
        v: Tensors = list(self.kept.states.get(below, self.start))
        s = self.block.fired(v, self.x[0])
        for k in range(below + 1, t + 1):

            def run(who: int, *args: Tensor, k: int = k) -> Tensor:
                return self._through(k, who, args, None)[0]

            v, s = self.block.advance(k - 1, self.x[k - 1 - call.step], v, s, self.gains[k], run)
        wrong = [i for i in self.stages if not self._same(t, i, v[i])]
        if wrong:
            raise self._not_repeated(t, wrong[0])
        return v

    def _compare(self, t: int, stage: int, f: Tensor) -> None:
        """Note whether a branch gave what it gave in forward."""
        if not has_values(f):
            return
        if self.total is not None:
            self.given[stage] = output_mark(f)
        elif self.same_arguments:
            wanted = self.kept.outputs[t - 1 - self.call.step, stage]
            self.changed.append((t, stage, output_mark(f) != wanted))

    def _take_off(self, t: int, v: Sequence[MaybeTensor]) -> None:
        """Take what step `t` had added to the sum of all marks off it, where the way back is exact."""
        if self.total is not None and self.given:
            marks = torch.stack([mark(cast(Tensor, one)) for one in v])
            self.total = self.total - total_of(t, marks, torch.stack([self.given[stage] for stage in self.stages]))

    def _check_outputs(self) -> None:
        """Raise ReconstructionError if a branch gave another output than in forward."""
        if self.changed and bool(torch.stack([differs for _, _, differs in self.changed]).any()):
            raise self._not_repeated(*next((t, stage) for t, stage, differs in self.changed if differs))

    def _check_total(self) -> None:
        """The same where the way back is exact: nothing may be left of the sum of all marks."""
        if self.total is not None and self.given and bool(self.total.any()):
            raise self._not_repeated(None, int(self.total.nonzero()[0]))

    def _not_repeated(self, t: int | None, stage: int) -> ReconstructionError:
        where = f"stage {stage + 1}" if t is None else place(t, stage)
        return ReconstructionError(
            f"{name_of(self.call.keep)}: {where} gave another output when backward ran it again, so the gradient would "
            f"be wrong. {TO_REPEAT}"
        )

    def _add_to_x(self, t: int, d: Tensor) -> None:
        place = 0 if self.call.once else t - 1 - self.call.step
        self.d_x[place] = d if place not in self.d_x else self.d_x[place] + d

    def _gradient_of_x(self) -> MaybeTensor:
        if not self.wants_x or not self.d_x:
            return None
        count = 1 if self.call.once else self.call.length
        return torch.stack([self.d_x[i] if i in self.d_x else torch.zeros_like(self.x[i]) for i in range(count)])


def _sum(a: MaybeTensor, b: MaybeTensor) -> MaybeTensor:
    """a + b, of which either may be missing."""
    return b if a is None else a if b is None else a + b
