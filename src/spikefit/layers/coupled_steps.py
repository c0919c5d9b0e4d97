"""Stages of analog states with sub-networks of their own for every time step, which can be run backwards in time.

    v_l[t] = F_lt(b_l[t], d_l[t]) + P_l[t],    P_l[t] = a_l[t] v_l[t-1],    s_l[t] = s(v_l[t])       l = 1 .. L

    b_l[t]                from below: x_t for l = 1, else s_{l-1}[t]
    d_l[t], "adjacent"    from the step before: s_{l+1}[t-1];     nothing for l = L and for t = 1
    d_l[t], "all_deeper"  from the step before: P_{l+1}[t], .., P_L[t];     nothing for t = 1

There is no reset, and nothing else passes from step to step. The map is triangular: with v[t] known, the deepest stage
gives v_L[t-1] = (v_L[t] - F_Lt) / a_L[t], then the one above it, and so on. `coupled_function.py` has the backwards
that use it; here is the forward, and what plain autograd makes of it.

Source: Hu et al. 2024, arXiv:2405.16466. "adjacent" is the release, "all_deeper" our reading of the published equation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.layers.coupling import check_range, check_stream_grid, couple, on_grid
from spikefit.layers.gains import Gains
from spikefit.layers.norm import OnlineRenorm
from spikefit.neurons.threshold import Threshold
from spikefit.ops.dtype import compute_dtype

FUSIONS: tuple[str, ...] = ("adjacent", "all_deeper")
Tensors = list[Tensor]


class Branch(nn.Module):
    """F of one stage and step: a module of its own, called with what all steps share."""

    def __init__(self, own: nn.Module, shared: nn.Module | None) -> None:
        super().__init__()
        self.own, self.shared = own, shared

    def forward(self, below: Tensor, *deeper: Tensor) -> Tensor:
        """own(below, *deeper), with the shared module in front if there is one."""
        # as inputs of their own, so that plain autograd adds up the gradient of each call before it adds calls up
        below, deeper = below.view_as(below), tuple(one.view_as(one).to(below.dtype) for one in deeper)
        return self.own(below, *deeper) if self.shared is None else self.own(self.shared, below, *deeper)


class Head(nn.Module):
    """Logits from the mean over space of a state.

    Args:
        reads: "spikes" of the last stage, or its analog "state".
        net: module [B, C] -> [B, K].

    Raises:
        OptionError: another word for what it reads.
    """

    def __init__(self, reads: str, net: nn.Module) -> None:
        super().__init__()
        if reads not in ("spikes", "state"):
            raise OptionError(f"Head: reads must be 'spikes' or 'state', got {reads!r}.")
        self.reads, self.net = reads, net

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, C] -> [B, K]."""
        return self.net(pooled)


class CoupledSteps(nn.Module):
    """A block of T time steps: sequence [T, B, ...] -> logits of its heads [heads, B, K].

    Args:
        branches: by [step][stage], modules called as module(below, *deeper) or module(shared, below, *deeper).
        shared: by [stage], a module that all steps use; None for none.
        gains: a_l[t].
        heads: name -> head.
        head_of: step (1 .. T) -> name of its head.
        classes: K.
        fusion: "adjacent" or "all_deeper".
        state_grid: digits of the states behind the point, with gains of one: the way back in time is then exact to the
            bit. None leaves states as they are.

    Shapes:
        input [n, B, ...], n steps from where the state stands; state (step, v_1, .., v_L), (0,) before the first.
        States are float32, or float64 for float64 input, outside autocast.

    Raises:
        OptionError: unknown fusion, a grid with other gains, or parts that do not belong together.
    """

    def __init__(
        self,
        branches: Iterable[Iterable[nn.Module]],
        gains: Gains,
        *,
        heads: Mapping[str, Head],
        head_of: Mapping[int, str],
        classes: int,
        shared: Sequence[nn.Module] | None = None,
        fusion: str = "adjacent",
        state_grid: int | None = None,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise OptionError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}.")
        check_stream_grid("CoupledSteps", state_grid, "state_grid")
        if state_grid is not None and gains.kind != "one":
            raise OptionError(
                f"CoupledSteps: state_grid={state_grid} makes the way back exact only where nothing is multiplied, and "
                f"gain={gains.kind!r} multiplies states; give gain='one', or state_grid=None."
            )
        self.branches = nn.ModuleList(nn.ModuleList(step) for step in branches)
        self.shared = None if shared is None else nn.ModuleList(shared)
        self.gains, self.heads = gains, nn.ModuleDict(heads)
        self.head_of, self.classes = dict(head_of), classes
        self.fusion, self.state_grid = fusion, state_grid
        self.fire = Threshold()
        self._check_parts()

    # for counts of operations: the twin without spikes has these weights in every step too
    weights_per_step = True

    @property
    def timesteps(self) -> int:
        """T; every step has sub-networks of its own."""
        return len(self.branches)

    @property
    def count(self) -> int:
        """L, the number of stages."""
        return len(cast(nn.ModuleList, self.branches[0]))

    def _check_parts(self) -> None:
        """Raise OptionError unless stages, gains, shared modules and heads belong together."""
        stages, T = {len(cast(nn.ModuleList, step)) for step in self.branches}, len(self.branches)
        if len(stages) != 1 or 0 in stages:
            raise OptionError(
                f"CoupledSteps: expected branches as one list per step, with one module per stage, as many in every "
                f"step, got {[len(cast(nn.ModuleList, step)) for step in self.branches]} modules."
            )
        gains = (self.gains.timesteps, len(self.gains.widths))
        if gains != (T, self.count) or (self.shared is not None and len(self.shared) != self.count):
            raise OptionError(
                f"CoupledSteps: expected gains for {T} steps and {self.count} stages, and a shared module per stage or "
                f"none, got gains for {gains[0]} steps and {gains[1]} stages and "
                f"{0 if self.shared is None else len(self.shared)} shared modules."
            )
        common = [self.heads] if self.shared is None else [self.heads, self.shared]
        if any(isinstance(m, OnlineRenorm) for part in common for m in part.modules()):
            raise OptionError(
                "CoupledSteps: expected norms in shared modules and heads that take each call by itself, got an "
                "OnlineRenorm, which moves its running statistics once per sequence and is called in every step; use "
                "StepBatchNorm, or a norm of its own for every step in the branches."
            )
        wrong = {t: name for t, name in self.head_of.items() if not 1 <= t <= T or name not in self.heads}
        if wrong:
            raise OptionError(
                f"CoupledSteps: head_of says which of the heads {', '.join(self.heads)} stands behind which of the "
                f"steps 1 to {T}, got {wrong}."
            )

    def forward(self, x: Tensor, state: tuple[Any, ...] | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """Run the steps of `x`, by plain autograd.

        Args:
            x: [n, B, ...]; one that is repeated in place (stride 0) is looked at once, and its gradient is that of all
                steps together.
            state: where an earlier call has stopped; None for the start.

        Returns:
            (logits of the heads met on the way [heads, B, K], state behind the last step).

        Raises:
            ShapeError: more steps than are left.
            StateError: a state of another block or batch.
            RangeError: with a grid, a state that has left the range in which sums are exact.
        """
        step, v = self.entered(x, state)
        gains, rows = self.gains(), list[Tensor]()
        s = self.fired(v, x)
        for x_t in self.inputs(x):
            v, s = self.advance(step, x_t, v, s, gains[step])
            step += 1
            row = self.read(step, v[-1], s[-1])
            rows += [] if row is None else [row]
        return self.stacked(rows, x), (step, *v)

    def advance(self, step: int, x_t: Tensor, v: Tensors, s: Tensors, gains: list[Any], run: Any = None):
        """(states, spikes) behind step number `step` (from 0), of those in front of it.

        `run(stage, below, *deeper)` stands for the branch of that stage.
        """
        carried = self.products(v, gains)
        after: Tensors = []
        fired: Tensors = []
        for stage in range(self.count):
            below = x_t if stage == 0 else fired[-1]
            deeper = self.deeper(stage, s, carried)
            made = self.branch(step, stage)(below, *deeper) if run is None else run(stage, below, *deeper)
            after.append(self.joined(stage, made, carried[stage] if carried else None))
            fired += self.fired(after[-1:], x_t)
        return after, fired

    def fired(self, v: Tensors, x: Tensor) -> Tensors:
        """Spikes of states, in the dtype of what the branches read, which is that of the input `x`."""
        return [self.fire(one).to(x.dtype) for one in v]

    def products(self, v: Tensors, gains: list[Tensor | None]) -> Tensors:
        """P of every stage; empty in front of the first step."""
        return [one if a is None else broadcast(a, one) * one for a, one in zip(gains, v, strict=False)]

    def deeper(self, stage: int, s: Sequence[Any], carried: Sequence[Any]) -> tuple[Any, ...]:
        """d of a stage, from spikes and P of the step before; empty in front of the first step."""
        if self.fusion == "all_deeper":
            return tuple(carried[stage + 1 :])
        return tuple(s[stage + 1 : stage + 2])

    def joined(self, stage: int, f: Tensor, carried: Tensor | None) -> Tensor:
        """v = F + P, in the layout and dtype of states."""
        if carried is None:
            v = on_grid(f.to(compute_dtype(f.dtype)), self.state_grid)
        else:
            if f.shape != carried.shape:
                raise ShapeError(
                    f"CoupledSteps: stage {stage + 1} must have one shape in all steps, expected "
                    f"{tuple(carried.shape)}, got {tuple(f.shape)}."
                )
            v = couple(carried, f, grid=self.state_grid)
        v = laid_out(v)
        check_range(f"CoupledSteps stage {stage + 1}", v, self.state_grid, "state_grid")
        return v

    def read(self, step: int, v: Tensor, s: Tensor, run: Any = None) -> Tensor | None:
        """Logits [B, K] of the head behind step `step` (from 1), if there is one; `run("head", x)` stands for it."""
        name = self.head_of.get(step)
        if name is None:
            return None
        head = cast(Head, self.heads[name])
        seen = pooled(s if head.reads == "spikes" else v).to(s.dtype)
        return head(seen) if run is None else run("head", seen)

    def branch(self, step: int, stage: int) -> Branch:
        """F of a stage in step number `step` (from 0)."""
        own = cast(nn.ModuleList, self.branches[step])[stage]
        return Branch(own, None if self.shared is None else self.shared[stage])

    def inputs(self, x: Tensor) -> list[Tensor]:
        """x_t of every step; one tensor for all if the sequence is repeated in place."""
        once = repeated_in_place(x)
        return [laid_out(one) for one in (x[:1] if once else x).unbind()] * (x.shape[0] if once else 1)

    def stacked(self, rows: Tensors, x: Tensor) -> Tensor:
        """Logits [heads, B, K], also of no head."""
        return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], self.classes)

    def entered(self, x: Tensor, state: tuple[Any, ...] | None) -> tuple[int, Tensors]:
        """(steps that have run, states behind the last of them)."""
        if x.ndim < 2 or x.shape[1] == 0:
            raise ShapeError(f"CoupledSteps: expected x as [T, B, ...] with at least one sample, got {tuple(x.shape)}.")
        step, v = self._read_state(x, state)
        if not 1 <= x.shape[0] <= self.timesteps - step:
            raise ShapeError(
                f"CoupledSteps: each of its {self.timesteps} time steps has sub-networks of its own, and {step} have "
                f"run, so expected up to {self.timesteps - step} more, got {x.shape[0]}. Start anew with init_state, "
                f"cut the sequence, or create it with timesteps={step + x.shape[0]}."
            )
        return step, v

    def _read_state(self, x: Tensor, state: Any) -> tuple[int, Tensors]:
        if state is None:
            return 0, []
        number = state[0] if isinstance(state, tuple) and state else None
        if type(number) is not int or not 0 <= number <= self.timesteps:
            got = f"step {number!r}" if isinstance(state, tuple) else type(state).__name__
            raise StateError(
                f"CoupledSteps: expected a state (step, v_1, .., v_{self.count}) with a step of 0 to "
                f"{self.timesteps}, got {got}. Start with init_state and pass on what the last call returned."
            )
        v = list(state[1:])
        if number == 0 and v:
            raise StateError(
                f"CoupledSteps: an initial state is not accepted, as the first step reads no state, got {len(v)} "
                "tensors at step 0; start with init_state, whose state is (0,)."
            )
        wide = (torch.float32, torch.float64)
        fits = [isinstance(one, Tensor) and one.shape[0] == x.shape[1] and one.dtype in wide for one in v]
        if number > 0 and (len(v) != self.count or not all(fits)):
            got = ", ".join(f"{tuple(o.shape)} {o.dtype}" if isinstance(o, Tensor) else type(o).__name__ for o in v)
            raise StateError(
                f"CoupledSteps: expected {self.count} states of {x.shape[1]} samples in float32 or float64 (an inverse "
                f"would multiply the rounding of half precision), got {got or 'none'}. Pass on what the last call "
                "returned."
            )
        return number, [laid_out(one) for one in v]

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """(state in front of the first step, shape of one output sample): there are no states before it."""
        return (0,), (self.classes,)

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}, stages={self.count}, fusion={self.fusion}, state_grid={self.state_grid}"


def repeated_in_place(x: Tensor) -> bool:
    """Whether a sequence shows one tensor at every step, as `encoding.repeat` makes it."""
    return x.shape[0] > 1 and x.stride(0) == 0


def broadcast(a: Tensor, v: Tensor) -> Tensor:
    """A gain [C] as it multiplies a state [B, C, ...]."""
    return a.view(1, -1, *[1] * (v.ndim - 2))


def laid_out(v: Tensor) -> Tensor:
    """`v` channels last if it has images: a convolution rounds by where its input lies, so there is one way to lie."""
    return v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v.contiguous()


def pooled(v: Tensor) -> Tensor:
    """Mean over space, [B, C, ...] -> [B, C]."""
    return v if v.ndim == 2 else v.mean(tuple(range(2, v.ndim)))
