"""The one door to the two-group node: it checks, chooses a backend and what is kept, and owns the backward."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikefit.errors import BackendError, OptionError, ReconstructionError, ShapeError, StateError
from spikefit.ops import dispatch
from spikefit.ops.lif.op import Layout
from spikefit.ops.node import reference
from spikefit.ops.node.equation import TwoGroups
from spikefit.ops.node.reversal import Reversal
from spikefit.ops.surrogate import FORMS, Surrogate, atan
from spikefit.ops.values import has_values

CHECKS: tuple[str, ...] = ("off", "spikes")


def two_group(
    x: Tensor,
    v_0: Tensor | None = None,
    *,
    alpha: float = 0.4,
    beta: float = 0.5,
    kappa: float = 0.5,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    surrogate: Surrogate | str = atan(2),  # noqa: B008 (an immutable value)
    check: str = "spikes",
    reversal: Reversal | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run two-group neurons over a sequence, from state `v_0`.

        phi(x, v):   u = (1 - kappa) v + kappa x,   s = 1 if u >= v_threshold else 0,   r = u + s (v_reset - u)
                     r = u - v_threshold s for a soft reset (`v_reset=None`)

        (s1, r1, u1) = phi(x1, v1)      y1 = s1 + beta x2      w1 = r1 + alpha v2
        (s2, r2, u2) = phi(y1, w1)      y2 = s2 + beta x1      w2 = r2 + alpha v1

    x1 and x2 are the two halves of the channels, (v1, v2) the state before a step and (w1, w2) the one after it. The
    outputs y are real numbers. Given y and the state after it, a step can be run backwards, dividing by alpha and beta;
    rounding then grows by rho per step (`spikefit.ops.node.equation.reverse_multiplier`).

    What is kept between forward and backward: with `reversal=None` what autograd keeps (the reference) or the membranes
    u of all steps (the kernels); with a `Reversal` the outputs y, which the next layer keeps anyway, the last state and
    the anchors, and with `check="spikes"` two integers per step. The gradient is then that of plain autograd up to
    about rho^K eps, K the distance of anchors, as long as no membrane lies so close to the threshold that its spike
    comes back wrong: such a pair of neurons would get a wrong gradient at that step and those before it, down to the
    next anchor. Inputs on a coarse grid, such as integers, meet the threshold exactly, and a finer dtype does not help
    there. `check="spikes"` raises instead; `check="off"` returns the wrong gradient without a word.

    Args:
        x: input current, [T, B, C, ...] with C even, in the unit of `v_threshold`; float32 or float64. Half precision
            is converted to float32 under autocast and refused outside.
        v_0: state before the first step, [B, C, ...], both groups side by side; zeros if None. float32, or float64 for
            float64 input.
        alpha: share of the other group's membrane that is carried along, 0 < alpha <= kappa (above, membranes grow).
        beta: share of the other group's input in the output, 0.001 <= |beta| <= 10, see `BETA_RANGE`.
        kappa: factor on the input, 0 < kappa <= 1; the membrane keeps 1 - kappa per step.
        v_threshold: firing level, > 0.
        v_reset: the level a hard reset goes to, or None for a soft reset.
        detach_reset: no gradient through the s inside the reset.
        surrogate: slope of the step, a `Surrogate` or its text, "atan(2)".
        check: with a `reversal`, "spikes" counts the spikes of every step and group in forward and compares them in
            backward (not under `torch.compile` with backend="reference"); "off" does not.
        reversal: how backward gets the states back; None keeps them.
        backend: "auto", "reference", "numba" (CPU) or "triton" (CUDA).

    Returns:
        (y, v_T): outputs [T, B, C, ...] in the memory order of `x` and the state after the last step [B, C, ...],
        float32 (float64 for float64 input).

    Raises:
        ShapeError: no time, batch or channel axis, T = 0, an odd number of channels, or half precision outside
            autocast.
        StateError: `v_0` of another shape, dtype or device than `x` asks for.
        OptionError: an option outside its range.
        StrategyError: without anchors rounding would grow too far.
        BackendError: the backend asked for cannot run this call.
        ReconstructionError: in backward, with `check="spikes"`, if a spike comes back wrong.

    Source: a reconstruction of ours of what is public about Lei et al. 2023, arXiv:2308.08649; the constants of the
    paper are not public, and these formulas are not theirs.
    """
    node = TwoGroups.make(
        alpha=alpha,
        beta=beta,
        kappa=kappa,
        v_threshold=v_threshold,
        v_reset=v_reset,
        detach_reset=detach_reset,
        surrogate=surrogate,
    )
    check_check(check)
    x = _checked_input(x)
    v_0 = _checked_state(x, v_0)
    chosen = dispatch.choose(
        backend, triton=_refusal("triton", backend, x, node), numba=_refusal("numba", backend, x, node)
    )
    if reversal is not None:
        every = reversal.distance(node, x.shape[0], x.dtype)
        return _Reversed.apply(x, v_0, _Call(node, reversal.name, every, check == "spikes", chosen))
    if chosen == "reference":
        return reference.two_group(x, v_0, node)
    return _Kept.apply(x, v_0, _Call(node, "bptt", x.shape[0], False, chosen))


def check_check(check: str) -> None:
    """Raise OptionError unless `check` is known."""
    if check not in CHECKS:
        raise OptionError(f"two_group: check must be one of {', '.join(CHECKS)}, got {check!r}.")


def _checked_input(x: Tensor) -> Tensor:
    """`x` in the compute dtype."""
    if x.ndim < 3:
        raise ShapeError(
            f"two_group: expected x as [T, B, C, ...], got {tuple(x.shape)}. Time comes first, then the batch, then "
            "the channels, whose two halves are the groups."
        )
    if x.shape[0] == 0:
        raise ShapeError(f"two_group: expected at least one time step, got x of shape {tuple(x.shape)} with T = 0.")
    if x.shape[2] == 0 or x.shape[2] % 2:
        raise ShapeError(
            f"two_group: expected an even number of channels, one half for each group, got {x.shape[2]} in "
            f"{tuple(x.shape)}; take a layer with one channel more or less."
        )
    if x.dtype in (torch.float32, torch.float64):
        return x
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.float()
    if not x.is_floating_point():
        raise ShapeError(
            f"two_group: expected float32 or float64, got {x.dtype}: outputs and states are real numbers. Pass "
            "x.float()."
        )
    raise ShapeError(
        f"two_group: expected float32 or float64, got {x.dtype}: in half precision the states cannot be run backwards "
        "for a single step. Keep the model in float32 and use torch.autocast."
    )


def _checked_state(x: Tensor, v_0: Tensor | None) -> Tensor:
    """The state before the first step, zeros if None."""
    if v_0 is None:
        return torch.zeros_like(x[0])
    if v_0.shape != x.shape[1:] or v_0.dtype != x.dtype or v_0.device != x.device:
        raise StateError(
            f"two_group: expected a state {tuple(x.shape[1:])} {x.dtype} on {x.device}, got {tuple(v_0.shape)} "
            f"{v_0.dtype} on {v_0.device}. Pass the state of this batch, or None to start from zero."
        )
    return v_0


def _refusal(name: str, backend: str, x: Tensor, node: TwoGroups) -> str | None:
    """Why a kernel cannot run the call, or None."""
    if FORMS[node.equation.surrogate.name].kernel is None:
        return f"the surrogate {node.equation.surrogate} has no compiled kernel."
    if name == "numba":
        return dispatch.numba_refusal(x)
    automatic = dispatch.resolve(backend) == "auto"
    return dispatch.auto_triton_refusal(x) if automatic else dispatch.triton_refusal(x)


class _Call(NamedTuple):
    """A call without its tensors.

    Attributes:
        node: the node.
        strategy: "bptt", "streamlined" or "generic".
        every: steps between two kept states.
        check: whether spikes are counted.
        backend: "reference", "numba" or "triton".
    """

    node: TwoGroups
    strategy: str
    every: int
    check: bool
    backend: str

    @property
    def options(self) -> tuple:
        """The call as arguments of the registered operations."""
        return *self.node.flat(), self.every, self.check, self.backend


class _Reversed(torch.autograd.Function):
    """Keeps outputs, last state and anchors; backward runs the steps backwards."""

    @staticmethod
    def forward(ctx, x: Tensor, v_0: Tensor, call: _Call):
        if call.backend == "reference":
            y, v_T, anchors, counts = reference.forward(x, v_0, call.node, call.every)
            counts = counts if call.check else _no_counts(x, False)
        else:
            y, v_T, _, anchors, counts = _forward(x, v_0, False, *call.options)
        ctx.call = call
        ctx.save_for_backward(y, v_T, anchors, counts)
        ctx.set_materialize_grads(False)
        return y, v_T

    @staticmethod
    def backward(ctx, g: Tensor | None, q: Tensor | None):
        if g is None and q is None:
            return None, None, None
        with torch.no_grad():
            dx, dv_0 = _Reversed.gradient(ctx, g, q)
        return _last(dx), _last(dv_0) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def gradient(ctx, g: Tensor | None, q: Tensor | None) -> tuple[Tensor, Tensor]:
        """(dx, dv_0)."""
        y, v_T, anchors, counts = ctx.saved_tensors
        call: _Call = ctx.call
        g = torch.zeros_like(y) if g is None else g
        q = torch.zeros_like(v_T) if q is None else q
        if call.backend == "reference":
            run = reference.streamlined if call.strategy == "streamlined" else reference.generic
            dx, dv_0, found = run(g, q, y, v_T, anchors, call.node, call.every)
            if call.check and has_values(found):
                _compare(found, counts, call.strategy, call.node, call.every)
            return dx, dv_0
        return _backward(g, q, y, v_T, anchors, counts, call.strategy == "generic", *call.options)


class _Kept(torch.autograd.Function):
    """Keeps the membranes of all steps, for the kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, v_0: Tensor, call: _Call):
        y, v_T, u, _, _ = _forward(x, v_0, any(ctx.needs_input_grad), *call.options)
        ctx.call = call
        ctx.save_for_backward(u)
        ctx.set_materialize_grads(False)
        return y, v_T

    @staticmethod
    def backward(ctx, g: Tensor | None, q: Tensor | None):
        if g is None and q is None:
            return None, None, None
        (u,) = ctx.saved_tensors
        g = torch.zeros_like(u) if g is None else g
        q = torch.zeros_like(u[0]) if q is None else q
        with torch.no_grad():
            dx, dv_0 = _adjoint(g, q, u, *ctx.call.options)
        return _last(dx), _last(dv_0) if ctx.needs_input_grad[1] else None, None


class _Last(torch.autograd.Function):
    """A gradient that has no derivative of its own, where one may be asked for."""

    @staticmethod
    def forward(ctx, d: Tensor, anything: Tensor):
        return d.view_as(d)

    @staticmethod
    def backward(ctx, *gradients):
        raise BackendError(
            "two_group: expected first derivatives only, as the kernels and the strategies streamlined and generic "
            "have no second one; use strategy='bptt' with backend='reference'."
        )


def _last(d: Tensor) -> Tensor:
    """`d`, which raises if it is differentiated."""
    return _Last.apply(d, torch.zeros((), requires_grad=True)) if torch.is_grad_enabled() else d


def _compare(found: Tensor, counts: Tensor, strategy: str, node: TwoGroups, every: int) -> None:
    """Raise ReconstructionError at the first step, in the order of backward, whose spikes are not those of forward.

    Args:
        found: spikes of each pass of backward, step and group, [passes, T, 2].
        counts: those of forward, [T, 2].
    """
    wrong = (found != counts).nonzero().tolist()
    if wrong:
        # backward meets the last step first, and in it the second group
        at, step, group = max(wrong, key=lambda place: place[1:])
        raise ReconstructionError(
            f"two_group: backward ({strategy}) found {int(found[at, step, group])} spikes in group {group + 1} at step "
            f"{step + 1} of {len(counts)}, where forward had {int(counts[step, group])}: a membrane at the threshold "
            f"came back on the other side of it, and the gradient would be wrong ({node.who}, anchor_every={every}). "
            "Use strategy='bptt', or finer inputs, as coarse ones meet the threshold exactly; where they do not, lower "
            "anchor_every, or raise alpha or kappa."
        )


class _Rows:
    """A sequence [T, B, C, ...] as rows [T, N], seen as [T, P, 2, run]: every run of one group before its partners."""

    def __init__(self, x: Tensor) -> None:
        self.layout = Layout(x)
        behind = self.layout.shape[self.layout.order.index(2) :]
        self.run = torch.Size(behind).numel() // 2
        self.neurons = torch.Size(self.layout.shape[1:]).numel()

    def sequence(self, x: Tensor) -> Tensor:
        """[T, B, C, ...] -> [T, N], also for pieces of the sequence."""
        return x.permute(self.layout.order).contiguous().view(x.shape[0], self.neurons)

    def state(self, v: Tensor) -> Tensor:
        """[B, C, ...] -> [N]."""
        return self.sequence(v.unsqueeze(0)).view(-1)

    def empty(self, like: Tensor, steps: int) -> Tensor:
        """`steps` states [steps, B, C, ...] in this order."""
        return self._empty(like, (steps, *self.layout.shape[1:]), self.layout.order)

    def empty_state(self, like: Tensor) -> Tensor:
        """A state [B, C, ...] in this order."""
        return self._empty(like, self.layout.shape[1:], [i - 1 for i in self.layout.order[1:]])

    @staticmethod
    def _empty(like: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
        # a permuted view could not be changed in place by whoever gets it as a result
        places = sorted(range(len(order)), key=order.__getitem__)
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        return like.new_empty_strided([shape[k] for k in places], [strides[k] for k in places])


def _kernels(backend: str):
    """The module with the kernels on rows."""
    if backend == "triton":
        from spikefit.ops.node import cuda

        return cuda
    from spikefit.ops.node import cpu

    return cpu


def _kept_states(timesteps: int, every: int) -> int:
    """Kept states before the last one."""
    return (timesteps - 1) // every


@torch.library.custom_op("spikefit::two_group", mutates_args=())
def _forward(
    x: Tensor,
    v_0: Tensor,
    keep_u: bool,
    numbers: Sequence[float],
    reset: str,
    detach_reset: bool,
    surrogate: str,
    every: int,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, v_T, u or nothing, anchors, counts or nothing)."""
    node, rows = TwoGroups.unflat(numbers, reset, detach_reset, surrogate), _Rows(x)
    y, v_T, u, anchors, counts = _forward_results(rows, x, keep_u, every, check)
    _kernels(backend).forward(
        rows.sequence(x), rows.state(v_0), rows.sequence(y), rows.state(v_T), rows.sequence(u), rows.sequence(anchors),
        counts, rows.run, node, every,
    )  # fmt: skip
    return y, v_T, u, anchors, counts


def _forward_results(rows: _Rows, x: Tensor, keep_u: bool, every: int, check: bool) -> tuple[Tensor, ...]:
    T = x.shape[0]
    y, v_T, u = rows.empty(x, T), rows.empty_state(x), rows.empty(x, T if keep_u else 0)
    return y, v_T, u, rows.empty(x, _kept_states(T, every)), _no_counts(x, check)


def _no_counts(x: Tensor, check: bool) -> Tensor:
    return x.new_zeros((x.shape[0] if check else 0, 2), dtype=torch.int64)


@_forward.register_fake
def _(x, v_0, keep_u, *options):
    every, check, _ = options[-3:]
    return _forward_results(_Rows(x), x, keep_u, every, check)


@torch.library.custom_op("spikefit::two_group_backward", mutates_args=())
def _backward(
    g: Tensor,
    q: Tensor,
    y: Tensor,
    v_T: Tensor,
    anchors: Tensor,
    counts: Tensor,
    generic: bool,
    numbers: Sequence[float],
    reset: str,
    detach_reset: bool,
    surrogate: str,
    every: int,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dv_0); raises ReconstructionError unless the spikes of every pass are `counts`."""
    node, rows = TwoGroups.unflat(numbers, reset, detach_reset, surrogate), _Rows(y)
    dx, dv_0 = rows.empty(y, y.shape[0]), rows.empty_state(y)
    found = [_no_counts(y, check) for _ in range(2 if generic else 1)]
    run: Callable[..., None] = _generic if generic else _kernels(backend).streamlined
    run(
        rows.sequence(g), rows.state(q), rows.sequence(y), rows.state(v_T), rows.sequence(anchors), rows.sequence(dx),
        rows.state(dv_0), *found, rows.run, node, every, *([_kernels(backend)] if generic else []),
    )  # fmt: skip
    if check:
        # here, where a compiled graph runs it too
        _compare(torch.stack(found), counts, "generic" if generic else "streamlined", node, every)
    return dx, dv_0


@_backward.register_fake
def _(g, q, y, *others):
    rows = _Rows(y)
    return rows.empty(y, y.shape[0]), rows.empty_state(y)


def _generic(
    g_TN: Tensor, q: Tensor, y_TN: Tensor, v_T: Tensor, anchors_AN: Tensor, dx_TN: Tensor, dv_0: Tensor, counts: Tensor,
    again: Tensor, run: int, node: TwoGroups, every: int, kernels: Any,
) -> None:  # fmt: skip
    """Segment by segment: inverse (`counts`), forward with its membranes kept (`again`), gradient from them."""
    T = y_TN.shape[0]
    x_KN, y_KN, u_KN = (torch.empty_like(y_TN[: min(T, every)]) for _ in range(3))
    none, before = y_TN[:0], torch.empty_like(v_T)
    for first, last in reference.segments(T, every):
        steps = slice(0, last - first)
        after = reference.kept_state(last, v_T, anchors_AN, every)
        kernels.inverse(y_TN[first:last], after, x_KN[steps], before, counts[first:last], run, node)
        start = reference.kept_state(first, v_T, anchors_AN, every) if first else before
        end = torch.empty_like(v_T)
        kernels.forward(x_KN[steps], start, y_KN[steps], end, u_KN[steps], none, again[first:last], run, node, T)
        kernels.adjoint(g_TN[first:last], q, u_KN[steps], dx_TN[first:last], dv_0, run, node)
        # blocks read their part of q before they write it
        q = dv_0


def generic_scratch_bytes(arguments: Sequence[Any]) -> int:
    """Working memory inside `spikefit::two_group_backward`, from its arguments, which no tensor shows."""
    y, v_T, generic, every = arguments[2], arguments[3], arguments[6], arguments[11]
    # inputs, outputs and membranes of a segment, and the states around it
    return (3 * min(y.shape[0], every) + 2) * v_T.nbytes if generic else 0


@torch.library.custom_op("spikefit::two_group_adjoint", mutates_args=())
def _adjoint(
    g: Tensor,
    q: Tensor,
    u: Tensor,
    numbers: Sequence[float],
    reset: str,
    detach_reset: bool,
    surrogate: str,
    every: int,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dv_0) from the membranes of all steps."""
    node, rows = TwoGroups.unflat(numbers, reset, detach_reset, surrogate), _Rows(u)
    dx, dv_0 = rows.empty(u, u.shape[0]), rows.empty_state(u)
    _kernels(backend).adjoint(
        rows.sequence(g), rows.state(q), rows.sequence(u), rows.sequence(dx), rows.state(dv_0), rows.run, node
    )
    return dx, dv_0


@_adjoint.register_fake
def _(g, q, u, *options):
    rows = _Rows(u)
    return rows.empty(u, u.shape[0]), rows.empty_state(u)
