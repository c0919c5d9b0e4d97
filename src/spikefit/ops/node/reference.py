"""The meaning of the two-group node, in plain torch. Shapes: T time steps, B batch, C channels (two halves), space.

    charge, fire, reset of one group (phi)    u = lam v + kappa x,   s = [u >= theta],   r = reset(u, s)

    forward   (s1, r1, u1) = phi(x1, v1)      y1 = s1 + beta x2      w1 = r1 + alpha v2
              (s2, r2, u2) = phi(y1, w1)      y2 = s2 + beta x1      w2 = r2 + alpha v1
    inverse   (s2, r2, u2) = phi(y1, w1)      x1 = (y2 - s2) / beta  v1 = (w2 - r2) / alpha
              (s1, r1, u1) = phi(x1, v1)      x2 = (y1 - s1) / beta  v2 = (w1 - r1) / alpha

(v1, v2) is the state before a step, (w1, w2) the one after it. Arithmetic is float32, or float64 for float64 input.
Simple on purpose: the kernels are tested against this file.

The formulas are a reconstruction of ours; see `equation`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spikefit.ops.lif.reference import after_reset, charge, fire
from spikefit.ops.node.equation import TwoGroups


class Step(NamedTuple):
    """One step: the two membranes before the reset and the two spikes, beside what it returns, for both groups."""

    outer: tuple[Tensor, Tensor]
    state: tuple[Tensor, Tensor]
    u: tuple[Tensor, Tensor]
    s: tuple[Tensor, Tensor]


class Record(NamedTuple):
    """A sequence run forward.

    Attributes:
        y: outputs, [T, B, C, ...].
        v_T: last state, [B, C, ...].
        anchors: states that were kept, after steps K, 2K, ..., the last one not among them, [A, B, C, ...].
        counts: spikes of each step and group, [T, 2].
    """

    y: Tensor
    v_T: Tensor
    anchors: Tensor
    counts: Tensor


def halves(v: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The two groups: the first and the second half of the channels."""
    first, second = v.chunk(2, axis)
    return first, second


def phi(x: Tensor, v: Tensor, node: TwoGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Charge, fire and reset of one group: (s, r, u)."""
    u = charge(x, v, node.leak, node.kappa, node.equation)
    s = fire(u, node.v_threshold, node.equation)
    return s, after_reset(u, s.detach() if node.equation.detach_reset else s, node.v_threshold, node.equation), u


def step(x_1: Tensor, x_2: Tensor, v_1: Tensor, v_2: Tensor, node: TwoGroups) -> Step:
    """One step forward: `outer` is (y1, y2), `state` is (w1, w2)."""
    s_1, r_1, u_1 = phi(x_1, v_1, node)
    y_1, w_1 = s_1 + node.beta * x_2, r_1 + node.alpha * v_2
    s_2, r_2, u_2 = phi(y_1, w_1, node)
    y_2, w_2 = s_2 + node.beta * x_1, r_2 + node.alpha * v_1
    return Step((y_1, y_2), (w_1, w_2), (u_1, u_2), (s_1, s_2))


def undo(y_1: Tensor, y_2: Tensor, w_1: Tensor, w_2: Tensor, node: TwoGroups) -> Step:
    """One step backwards, from its outputs and the state after it: `outer` is (x1, x2), `state` is (v1, v2)."""
    s_2, r_2, u_2 = phi(y_1, w_1, node)
    x_1, v_1 = (y_2 - s_2) / node.beta, (w_2 - r_2) / node.alpha
    s_1, r_1, u_1 = phi(x_1, v_1, node)
    x_2, v_2 = (y_1 - s_1) / node.beta, (w_1 - r_1) / node.alpha
    return Step((x_1, x_2), (v_1, v_2), (u_1, u_2), (s_1, s_2))


def two_group(x: Tensor, v_0: Tensor, node: TwoGroups) -> tuple[Tensor, Tensor]:
    """Run T steps by plain autograd; returns (outputs [T, B, C, ...], last state [B, C, ...])."""
    outputs, state = [], halves(v_0, 1)
    for done in steps(x, v_0, node):
        outputs.append(torch.cat(done.outer, 1))
        state = done.state
    return torch.stack(outputs), torch.cat(state, 1)


def steps(x: Tensor, v_0: Tensor, node: TwoGroups) -> Iterator[Step]:
    """The T steps one after the other."""
    state = halves(v_0, 1)
    for x_t in x.unbind(0):
        done = step(*halves(x_t, 1), *state, node)
        yield done
        state = done.state


def spikes_of(done: Step) -> Tensor:
    """How many neurons of each group fire in a step, [2]."""
    return torch.stack([s.sum(dtype=torch.float64) for s in done.s])


@torch.no_grad()
def forward(x: Tensor, v_0: Tensor, node: TwoGroups, every: int) -> Record:
    """Run T steps without a graph, keeping the state after every `every`-th."""
    y, state, kept, counts = torch.empty_like(x), halves(v_0, 1), [], []
    T = x.shape[0]
    for t in range(T):
        done = step(*halves(x[t], 1), *state, node)
        y[t] = torch.cat(done.outer, 1)
        state = done.state
        counts.append(spikes_of(done))
        if (t + 1) % every == 0 and t + 1 < T:
            kept.append(torch.cat(state, 1))
    anchors = torch.stack(kept) if kept else v_0.new_empty(0, *v_0.shape)
    return Record(y, torch.cat(state, 1), anchors, torch.stack(counts).to(torch.int64))


def segments(timesteps: int, every: int) -> list[tuple[int, int]]:
    """Runs of steps (first, last + 1) between two kept states, the last run first."""
    return [(t, min(timesteps, t + every)) for t in range(0, timesteps, every)][::-1]


def kept_state(last: int, v_T: Tensor, anchors: Tensor, every: int) -> Tensor:
    """The kept state after step `last`, counted from 1."""
    return anchors[last // every - 1] if last % every == 0 and last // every <= anchors.shape[0] else v_T


@torch.no_grad()
def streamlined(
    g: Tensor, q: Tensor, y: Tensor, v_T: Tensor, anchors: Tensor, node: TwoGroups, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse and gradient in one pass, last step first; returns (dx, dv_0, spikes of step and group [1, T, 2])."""
    dx, counts, dw = torch.empty_like(y), torch.empty(len(y), 2, dtype=torch.int64, device=y.device), halves(q, 1)
    for first, last in segments(y.shape[0], every):
        # a kept state takes the place of the rebuilt one
        state = halves(kept_state(last, v_T, anchors, every), 1)
        for t in reversed(range(first, last)):
            done = undo(*halves(y[t], 1), *state, node)
            dx[t], dw = adjoint_step(*halves(g[t], 1), *dw, done, node)
            counts[t] = spikes_of(done)
            state = done.state
    return dx, torch.cat(dw, 1), counts[None]


def adjoint_step(
    gy_1: Tensor, gy_2: Tensor, gw_1: Tensor, gw_2: Tensor, done: Step, node: TwoGroups
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradient of one step, written out: (dx, (dv1, dv2)), from g = dL/dy and dL/dw.

    With S = surrogate slope at u - theta, J = dr/du = (1 - s) + a (v_reset - u) S (soft: 1 - a theta S), and a = 0 if
    the reset is detached, else 1:

        m2 = gy2 S2 + gw2 J2      p = gy1 + kappa m2      q = gw1 + lam m2        totals on u2, y1, w1
        m1 = p S1 + q J1                                                          total on u1
        dx1 = beta gy2 + kappa m1      dx2 = beta p      dv1 = alpha gw2 + lam m1      dv2 = alpha q
    """
    (slope_1, keep_1), (slope_2, keep_2) = (_through(u, s, node) for u, s in zip(done.u, done.s, strict=True))
    m_2 = gy_2 * slope_2 + gw_2 * keep_2
    p, q = gy_1 + node.kappa * m_2, gw_1 + node.leak * m_2
    m_1 = p * slope_1 + q * keep_1
    dx = torch.cat([node.beta * gy_2 + node.kappa * m_1, node.beta * p], 1)
    return dx, (node.alpha * gw_2 + node.leak * m_1, node.alpha * q)


def _through(u: Tensor, s: Tensor, node: TwoGroups) -> tuple[Tensor, Tensor]:
    """(S, J): the slopes of spike and reset in u."""
    equation, theta = node.equation, node.v_threshold
    a = 0.0 if equation.detach_reset else 1.0
    slope = equation.surrogate.slope(u - theta)
    if equation.reset == "soft":
        return slope, 1 - a * theta * slope
    return slope, (1 - s) + a * (equation.v_reset - u) * slope


def generic(
    g: Tensor, q: Tensor, y: Tensor, v_T: Tensor, anchors: Tensor, node: TwoGroups, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What wrappers of reversible layers do: inverse, forward again with a graph, autograd.

    As `streamlined`; spikes [2, T, 2] of the inverse and of the second forward.
    """
    dx, counts = torch.empty_like(y), torch.empty(2, len(y), 2, dtype=torch.int64, device=y.device)
    for first, last in segments(y.shape[0], every):
        state, inputs = halves(kept_state(last, v_T, anchors, every), 1), []
        with torch.no_grad():
            for t in reversed(range(first, last)):
                done = undo(*halves(y[t], 1), *state, node)
                counts[0, t] = spikes_of(done)
                inputs.append(torch.cat(done.outer, 1))
                state = done.state
        before = kept_state(first, v_T, anchors, every) if first else torch.cat(state, 1)
        with torch.enable_grad():
            x, v = torch.stack(inputs[::-1]).requires_grad_(), before.detach().requires_grad_()
            again = list(steps(x, v, node))
            outputs = torch.stack([torch.cat(done.outer, 1) for done in again]), torch.cat(again[-1].state, 1)
            dx[first:last], q = torch.autograd.grad(outputs, (x, v), (g[first:last], q))
        counts[1, first:last] = torch.stack([spikes_of(done) for done in again])
    return dx, q, counts


def adjoint(g: Tensor, q: Tensor, u: Tensor, node: TwoGroups) -> tuple[Tensor, Tensor]:
    """The gradient from the membranes u [T, B, C, ...] of all steps; returns (dx, dv_0)."""
    dx, dw = torch.empty_like(u), halves(q, 1)
    for t in reversed(range(len(u))):
        u_1, u_2 = halves(u[t], 1)
        s_1, s_2 = (fire(v, node.v_threshold, node.equation) for v in (u_1, u_2))
        done = Step((u_1, u_2), (u_1, u_2), (u_1, u_2), (s_1, s_2))
        dx[t], dw = adjoint_step(*halves(g[t], 1), *dw, done, node)
    return dx, torch.cat(dw, 1)
