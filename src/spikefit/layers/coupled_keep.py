"""What steps coupled in time keep from forward to backward: states, the bits of spikes, or anchors.

    states    v[t] of every step
    bits      spike and window of every state, 2 bits, and v of every A-th step where gains learn
    anchors   v of every A-th step, counted from the last, and a checksum of spikes and windows of every other one

An inverse multiplies the rounding of a state by 1 / |a| for every step that is undone: after j steps the error is below

    E(j) = 3 eps R (m^-j - 1) / (1 - m),    m = min |a|, R = max |v|;    3 eps R j for m = 1

and a run whose bound exceeds the tolerance is refused. With fusion="all_deeper" the error of deeper states also passes
the weights that mix them, which the bound leaves out: it holds while these weights are small.

Checksums of what branches give tell whether they gave the same when backward ran them again.

Source: Hu et al. 2024, arXiv:2405.16466 (inverse); bits, checksums and bound are ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers.coupled_steps import CoupledSteps, Head, Tensors, laid_out, pooled
from spikefit.layers.gains import MINIMUM
from spikefit.layers.rebuild import TOLERANCE, inverse_error, safe_anchor_every
from spikefit.layers.recompute import drawn_since, random_state, tensors_read
from spikefit.ops import threshold
from spikefit.ops.checksum import checksum
from spikefit.ops.packbits import pack, unpack
from spikefit.ops.values import has_values

# Times the bound of the inverse of one neuron: here a sum of three is rounded at every step.
ROUNDINGS = 3
MaybeTensor = Tensor | None


class Keep(NamedTuple):
    """What is kept from forward to backward.

    Attributes:
        kind: "states", "bits" or "anchors".
        anchor_every: A, steps between two kept states, counted from the last; None for the last alone.
        tolerance: largest error of a state that an inverse may make.
        on_flip: what backward does when spikes come back otherwise ("anchors"): "raise", or "repair", which runs the
            steps from the kept state before it again.
    """

    kind: str = "states"
    anchor_every: int | None = None
    tolerance: float = TOLERANCE
    on_flip: str = "raise"


def check_keep(block: CoupledSteps, keep: Keep) -> None:
    """Raise StrategyError if `block` cannot be run with what `keep` keeps."""
    if keep.kind == "bits" and block.fusion == "all_deeper":
        raise StrategyError(
            "spike_bits: with fusion='all_deeper' the branches read analog states of the step before, which bits do "
            "not hold; use strategy='step_checkpoint' or 'reversible'."
        )
    given = keep.anchor_every is not None or keep.tolerance != TOLERANCE or keep.on_flip != "raise"
    if keep.kind == "bits" and given and not any(p.requires_grad for p in block.gains.parameters()):
        raise StrategyError(
            "spike_bits: kept states and their error are for gradients of gains, and here gains learn nothing "
            f"(gain={block.gains.kind!r}), got anchor_every={keep.anchor_every} and tol={keep.tolerance:g}; leave them "
            "out, strategy='spike_bits'."
        )
    if (
        keep.kind == "anchors"
        and block.state_grid is not None
        and (keep.tolerance, keep.on_flip) != (TOLERANCE, "raise")
    ):
        raise StrategyError(
            f"reversible: with state_grid={block.state_grid} states come back to the bit, so there is no error to "
            f"accept and nothing to repair, got tol={keep.tolerance:g} and on_flip={keep.on_flip!r}; leave them out."
        )


class Places:
    """Where the tensors of branches and heads stand among the inputs of the function, each of them once."""

    def __init__(self, block: CoupledSteps, step: int, count: int) -> None:
        self.tensors: Tensors = []
        self.named: dict[tuple[int, Any], dict[str, int]] = {}
        index: dict[int, int] = {}
        for t in range(step, step + count):
            modules: dict[Any, nn.Module] = {stage: block.branch(t, stage) for stage in range(block.count)}
            if t + 1 in block.head_of:
                modules["head"] = block.heads[block.head_of[t + 1]]
            for who, module in modules.items():
                places = self.named[t, who] = {}
                for name, tensor in tensors_read(module).items():
                    if id(tensor) not in index:
                        index[id(tensor)] = len(self.tensors)
                        self.tensors.append(tensor)
                    places[name] = index[id(tensor)]


class Call(NamedTuple):
    """A run without its tensors: `length` steps behind number `step`; `once` if they all see one input."""

    block: CoupledSteps
    keep: Keep
    step: int
    length: int
    once: bool
    places: Places

    @property
    def last(self) -> int:
        """Number of the last step, counted from 1."""
        return self.step + self.length

    @property
    def exact(self) -> bool:
        """Whether the way back makes no error: sums on a grid, and nothing is multiplied."""
        return self.block.state_grid is not None

    @property
    def steps_with_gains(self) -> range:
        """Steps, counted from 1, whose gains are inputs of the function."""
        return range(max(self.step + 1, 2), self.last + 1) if self.block.gains.kind != "one" else range(0)

    @property
    def farthest(self) -> int:
        """Most steps that are undone from a kept state."""
        every = self.keep.anchor_every
        return self.length - 1 if every is None else min(every, self.length) - 1

    def anchored(self, t: int) -> bool:
        """Whether v[t] is kept where not all states are."""
        every = self.keep.anchor_every
        return t == self.last if every is None else (self.last - t) % every == 0

    def inputs(self, x: Tensor) -> Tensors:
        """x_t of every step."""
        return [laid_out(one) for one in x.unbind()] * (self.length if self.once else 1)

    def parted(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(states in front, gains step by step, tensors of branches and heads) of the inputs of the function."""
        stages = self.block.count
        first = stages if self.step else 0
        second = first + stages * len(self.steps_with_gains)
        return list(tensors[:first]), list(tensors[first:second]), list(tensors[second:])

    def by_step(self, gains: Sequence[Any]) -> dict[int, list[Any]]:
        """step, counted from 1 -> its gains, None for 1."""
        stages = self.block.count
        made: dict[int, list[Any]] = {t: [None] * stages for t in range(self.step + 1, self.last + 1)}
        for i, t in enumerate(self.steps_with_gains):
            made[t] = list(gains[i * stages : (i + 1) * stages])
        return made


class Kept(NamedTuple):
    """What forward leaves for backward beside its inputs, by step (counted from 1) and stage.

    Attributes:
        states: v.
        codes: spike + 2 window, packed.
        marks: checksums of the codes, [steps, stages], for states that an inverse gives back with rounding.
        outputs: checksums of what the branches gave, [steps, stages].
        total: in the place of both, their sum over time [stages], where the inverse is exact.
        pooled: what heads of the analog state have read.
        draws: (step, stage or "head") -> random generators before a branch or head that drew from them.
    """

    states: dict[int, Tensors]
    codes: dict[int, Tensors]
    marks: MaybeTensor
    outputs: MaybeTensor
    total: MaybeTensor
    pooled: dict[int, Tensor]
    draws: dict[tuple[int, Any], Tensors]


class Recorder:
    """Collects during forward what is kept."""

    def __init__(self, call: Call, inverts: bool) -> None:
        self.call, self.inverts = call, inverts
        self.states: dict[int, Tensors] = {}
        self.codes: dict[int, Tensors] = {}
        self.marks: Tensors = []
        self.outputs: Tensors = []
        self.total: MaybeTensor = None
        self.pooled: dict[int, Tensor] = {}
        self.draws: dict[tuple[int, Any], Tensors] = {}
        self.largest: MaybeTensor = None

    def running(self, t: int) -> Callable[..., Tensor]:
        """Runs branches and the head of step `t`, and notes what backward has to know to run them again."""
        block, given = self.call.block, list[Tensor]()

        def run(who: Any, *args: Tensor) -> Tensor:
            module = block.heads[block.head_of[t]] if who == "head" else block.branch(t - 1, who)
            versions, generators = [a._version for a in args], random_state(args[0].device)
            made = module(*args)
            if [a._version for a in args] != versions:
                raise StrategyError(
                    f"{name_of(self.call.keep)}: {place(t, who)} has changed its input in place, which backward reads "
                    "again; give its first operation inplace=False, or use strategy='bptt'."
                )
            if has_values(made) and drawn_since(generators, made.device):
                self.draws[t, who] = generators
            if who != "head":
                given.append(output_mark(made))
                if len(given) == block.count:
                    self.outputs.append(torch.stack(given))
            return made

        return run

    def note(self, t: int, v: Tensors) -> None:
        """Keep what there is to keep of the states `v` behind step `t`."""
        call, kind = self.call, self.call.keep.kind
        if kind == "states" or (self.inverts and call.anchored(t)):
            self.states[t] = v
        if kind == "bits":
            self.codes[t] = [packed_codes(one) for one in v]
        if kind == "anchors":
            self.marks.append(torch.stack([mark(one) for one in v]))
        if kind == "anchors" and call.exact:
            # a sum over time takes no memory in time, and an exact way back needs no name of a step
            both = total_of(t, self.marks.pop(), self.outputs.pop())
            self.total = both if self.total is None else self.total + both
        if self.inverts and not call.exact:
            peak = torch.stack([one.abs().amax() for one in v]).amax()
            self.largest = peak if self.largest is None else torch.maximum(self.largest, peak)
        name = call.block.head_of.get(t)
        if name is not None and cast(Head, call.block.heads[name]).reads == "state":
            self.pooled[t] = pooled(v[-1])

    def kept(self) -> Kept:
        marks, outputs = (torch.stack(rows) if rows else None for rows in (self.marks, self.outputs))
        return Kept(self.states, self.codes, marks, outputs, self.total, self.pooled, self.draws)

    def check_safe(self, smallest: float) -> None:
        """Raise StrategyError if running the steps backwards, at gains from `smallest` on, could be too wrong."""
        if self.largest is None or not has_values(self.largest):
            return
        call, undone, tolerance = self.call, self.call.farthest, self.call.keep.tolerance
        # gains above 1 take rounding away; 1 bounds them
        least = min(smallest, 1.0)
        largest, dtype = float(self.largest), self.largest.dtype
        far = -undone * math.log(least) > 700
        error = math.inf if far else ROUNDINGS * inverse_error(undone, least, largest, dtype)
        # a NaN is no safe number either
        if undone > 0 and not error <= tolerance:
            name, safe = name_of(call.keep), safe_anchor_every(least, ROUNDINGS * largest, dtype, tolerance)
            other = "'spike_bits' with anchors" if call.keep.kind == "anchors" else "'step_checkpoint'"
            raise StrategyError(
                f"{name}: with anchor_every={call.keep.anchor_every} up to {undone} steps are undone at |a| down to "
                f"{smallest:.3g}, where |v| up to R = {largest:.3g} leaves an error of up to E = {error:.2g} in a "
                f"state of {dtype}, above the {tolerance:g} accepted; the largest safe anchor_every is {safe} "
                f"(strategy='{name}:{safe}'). Or use strategy={other}, float64, or gains nearer to 1."
            )


def smallest_gain(call: Call, by_step: dict[int, list[MaybeTensor]]) -> float:
    """The smallest |a|; StrategyError if it is too small to divide by, or no number."""
    gains = {(t, stage): a for t, row in by_step.items() for stage, a in enumerate(row) if a is not None}
    if not gains or not has_values(next(iter(gains.values()))):
        return 1.0
    each = torch.stack([a.detach().abs().amin() for a in gains.values()])
    smallest, least = float(each.amin()), MINIMUM[call.block.gains.kind]
    if not smallest >= least:
        t, stage = list(gains)[int(torch.nan_to_num(each, nan=-1.0).argmin())]
        raise StrategyError(
            f"{name_of(call.keep)}: an inverse divides by the gains, expected |a| of at least {least:g} for "
            f"gain={call.block.gains.kind!r}, got {smallest:g} in stage {stage + 1} of step {t}. Use "
            "strategy='step_checkpoint', which divides by none, gain='bounded', or set these gains anew."
        )
    return smallest


def name_of(keep: Keep) -> str:
    """The strategy, as messages call it."""
    return {"states": "step_checkpoint", "bits": "spike_bits", "anchors": "reversible"}[keep.kind]


def place(t: int, who: Any) -> str:
    """A branch or head, as messages call it."""
    return f"the head behind step {t}" if who == "head" else f"stage {who + 1} of step {t}"


def packed_codes(v: Tensor) -> Tensor:
    """Spike + 2 window of every value of a state, in 2 bits each: [rows, bytes] uint8."""
    codes = threshold.spikes(v).to(torch.uint8) + 2 * threshold.window(v).to(torch.uint8)
    flat = codes.movedim(1, -1).reshape(-1)
    # rows that end on whole bytes, and enough of them for all cores
    flat = nn.functional.pad(flat, (0, -flat.numel() % 4))
    return pack(flat.view(-1, math.gcd(flat.numel(), 4096)), 2, check=False)


def unpacked_codes(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `packed_codes` for a state of `shape`, in the layout of states."""
    count = math.prod(shape)
    codes = unpack(packed, math.gcd(count + -count % 4, 4096), 2, dtype=torch.uint8).view(-1)[:count]
    return laid_out(codes.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1))


def mark(v: Tensor) -> Tensor:
    """A number by which spikes and window of a state are known again, 64 bits."""
    return checksum(packed_codes(v).view(-1))


def output_mark(f: Tensor) -> Tensor:
    """A number by which the output of a branch is known again, 64 bits."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[f.element_size()]
    return checksum(f.detach().movedim(1, -1).reshape(-1).view(whole))


def total_of(t: int, marks: Tensor, outputs: Tensor) -> Tensor:
    """What step `t` adds to the sum of all marks; steps and kinds have factors of their own."""
    return (marks + 3 * outputs) * (2 * t + 1)
