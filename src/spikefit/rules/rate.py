"""The rate rule: the gradient of firing rates, by one pass over time without a graph and one backward without time.

    pass 1, no graph, t = 1..T   r = mean_t s[t], k = mean_t q[t] slope(u[t]), q[1] = gain,  q[t+1] = gain + J[t] q[t]
    pass 2, with a graph, once   x = norm(W r_below + b);   the neuron returns r, with derivative k with respect to x

J[t] = du[t+1]/du[t] with a = 0 for a detached reset, else 1:

    soft  leak (1 - a theta slope)      hard  leak (1 - s + a (v_reset - u) slope)      none  leak
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers.applying import Applier, applied_by
from spikefit.layers.norm import BatchNorm
from spikefit.layers.weight import Standardized, Weight, apply_map, map_of, parameters_of
from spikefit.losses.losses import Loss
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif.equation import Equation
from spikefit.ops.lif.reference import charge
from spikefit.rules.driver import Outcome
from spikefit.rules.linear import check_linear
from spikefit.rules.trace import check_scale


@dataclass(frozen=True, kw_only=True)
class RateRule:
    """The rate rule as a value, for `drive_rate`.

    Args:
        grad_scale: factor on all gradients, > 0.

    Raises:
        OptionError: grad_scale out of range.
    """

    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.name, self.grad_scale)

    @property
    def name(self) -> str:
        """The name of the rule in recipes and messages."""
        return "rate"


def rate(*, grad_scale: float = 1.0) -> RateRule:
    """Gradients of firing rates: `RateRule` with these options.

    Exact at T = 1, and for one spiking layer whose input is the same at every step, for every reset. Rates do not know
    the order of events, so inputs that change over time give other gradients than BPTT.

    Args:
        grad_scale: as in `RateRule`.

    Raises:
        OptionError: grad_scale out of range.

    Source: Yu et al. 2024, arXiv:2410.11488, without the division of the gradient by T in its release.
    """
    return RateRule(grad_scale=grad_scale)


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

        for t = 1..T, no graph:   logits[t], state = model.step(x[t], state)      r and k of every neuron
        once, with a graph:       o = model of mean_t x[t], whose neurons return r with derivative k
        backward(grad_scale loss(o, targets)),   o with the value of mean_t logits[t]

    Held are the state, three numbers per neuron and the graph of one step, so memory does not grow with T. Running
    statistics of norms move in the first pass alone, as often as in a forward. In training, a norm with statistics of
    each step passes gradients with the means over steps of mean and 1 / sqrt(var + eps), which in turn have the
    derivatives of the statistics of the second pass.

    Args:
        model: a `SpikingNetwork` of units, residual blocks, and layers and a read-out that are linear.
        x: [T, B, ...].
        targets: classes [B].
        loss: one that reads nothing but the mean of the logits over time.
        rule: `rate()`.
        backward: called once, with the loss; a scaler, or Fabric's `backward`.
        around: entered around each step of the first pass, and around the second pass and the loss;
            `lambda: torch.autocast("cpu")`.

    Returns:
        Outcome of detached tensors: the loss of the mean logits, the sum of the logits, and all steps.

    Raises:
        StrategyError: a block that is not linear in rates, a neuron without one fixed leak, a leaky read-out, shared
            membranes, a norm over the whole sequence in training, a strategy that runs units again, a loss that reads
            more than the mean of the logits, or a layer used twice in a step; each is named.
        OptionError: another rule.
        ShapeError: x or targets of another shape.

    Example:
        outcome = drive_rate(model, encoding.repeat(images, 4), labels, create_loss("ce_mean"), rate())
        optimizer.step()
    """
    _check(model, x, targets, loss, rule)
    first, T = _First(model, f"rule {rule.name}"), x.shape[0]
    network, shape = cast(Any, model), tuple(x.shape[2:])
    state, total = network.init_state(x.shape[1], shape), None
    for x_t in x:
        with torch.no_grad(), around():
            logits, state = first.step(x_t, state)
        total = logits.clone() if total is None else total + logits
    assert total is not None, "there is at least one step"
    with around(), applied_by(_Second(first, T)):
        rates, _ = network.step(x.mean(0), network.init_state(x.shape[1], shape))
        mean = _Given.apply(rates, total / T, None)
        value = loss(mean.unsqueeze(0), targets)
    found = value.detach()
    backward(value * rule.grad_scale)
    return Outcome(found, total, tuple(range(T)))


class Rates(NamedTuple):
    """What pass 1 sums up of one population of neurons, each [B, ...].

    Attributes:
        spikes: sum of s[t].
        slope: sum of q[t] slope(u[t] - theta), the derivative of `spikes` with respect to a constant current.
        q: q of the next step, the derivative of u with respect to a constant current.
    """

    spikes: Tensor
    slope: Tensor
    q: Tensor


class Statistics(NamedTuple):
    """What pass 1 sums up of one norm, each [C]: means, and 1 / sqrt(var + eps)."""

    mean: Tensor
    scale: Tensor


class _First:
    """Applies the parts of units in pass 1 and sums up rates, their derivatives and the statistics of norms."""

    def __init__(self, model: nn.Module, who: str) -> None:
        self.model, self.who = model, who
        self.names = {module: path for path, module in model.named_modules()}
        self.rates: dict[nn.Module, Rates] = {}
        self.statistics: dict[nn.Module, Statistics] = {}
        self.weights: dict[nn.Module, Tensor] = {}
        self.masks: dict[tuple[nn.Module, torch.Size], Tensor] = {}
        self.used: set[nn.Module] = set()

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step: input [B, ...] and state -> (logits [B, K], state)."""
        self.used.clear()
        with applied_by(cast(Applier, self)):
            return cast(Any, self.model).step(x_t, state)

    def weigh(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        if isinstance(synapse, Standardized) and synapse not in self.weights:
            self.weights[synapse] = synapse.standardized()
        parameters = parameters_of(synapse, x.device.type, self.weights.get(synapse))
        return apply_map(x, *parameters, map_of(synapse), chunk)

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        self._use(norm)
        x, mean, var = norm.normalised(z, norm.weight, norm.bias, repeats)
        if norm.training:
            now = Statistics(mean[0], torch.rsqrt(var[0] + norm.eps))
            before = self.statistics.get(norm)
            self.statistics[norm] = now if before is None else Statistics(*map(torch.add, before, now))
        return x

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        self._use(neuron)
        spikes, v_T = neuron(current, v_0)
        leak, gain = (float(c) for c in neuron.coefficients())
        v = torch.zeros_like(v_T) if v_0 is None else v_0
        u, s = charge(current[0], v, leak, gain, neuron.equation()), spikes[0].to(v_T.dtype)
        slope = neuron.surrogate.slope(u - neuron.v_threshold)
        before = self.rates.get(neuron)
        q = torch.full_like(u, gain) if before is None else before.q
        ahead = gain + leak * _kept(u, s, slope, neuron.v_threshold, neuron.equation()) * q
        self.rates[neuron] = (
            Rates(s, q * slope, ahead) if before is None else Rates(before.spikes + s, before.slope + q * slope, ahead)
        )
        return spikes, v_T

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        key = (layer, x.shape)
        if key not in self.masks:
            self.masks[key] = nn.functional.dropout(torch.ones_like(x), p)
        return x * self.masks[key].to(x.dtype)

    def check_lean(self, unit: nn.Module) -> None:
        """Nothing: `check_linear` has refused lean units before the first step."""

    def _use(self, part: nn.Module) -> None:
        """Raise StrategyError if the part was used in this step already."""
        if part in self.used:
            raise StrategyError(
                f"{self.who}: {self.names[part]} is used twice in one step, and a rate belongs to one input; give each "
                "use a layer of its own, or use an exact strategy."
            )
        self.used.add(part)


class _Second:
    """Applies the parts of units in pass 2 to rates, [1, B, ...]."""

    def __init__(self, first: _First, timesteps: int) -> None:
        self.first, self.timesteps = first, timesteps

    def weigh(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        return apply_map(x, *parameters_of(synapse, x.device.type), map_of(synapse), chunk)

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        if not norm.training:
            return norm.normalised(z, norm.weight, norm.bias, repeats)[0]
        mean, scale = (total / self.timesteps for total in self.first.statistics[norm])
        return rate_norm(z, norm.weight, norm.bias, mean, scale)

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        total = self.first.rates[neuron]
        r, k = (t.unsqueeze(0) / self.timesteps for t in (total.spikes, total.slope))
        return _Given.apply(current, r, k), torch.zeros_like(total.spikes)

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        return self.first.drop(layer, x, p)

    def check_lean(self, unit: nn.Module) -> None:
        """Nothing: `check_linear` has refused lean units before the first step."""


class _Given(torch.autograd.Function):
    """`value` in the dtype of x, with derivative `slope` (None for 1) with respect to x."""

    @staticmethod
    def forward(ctx, x, value, slope):
        ctx.save_for_backward(slope)
        return value.to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return g if slope is None else (g * slope).to(g.dtype), None, None


def _kept(u: Tensor, s: Tensor, slope: Tensor, v_threshold: float, equation: Equation) -> Tensor | float:
    """dv/du, what the reset leaves of a change of the membrane before it."""
    a = 0.0 if equation.detach_reset else 1.0
    if equation.reset == "soft":
        return 1 - a * v_threshold * slope
    if equation.reset == "hard":
        return 1 - s + a * (equation.v_reset - u) * slope
    return 1.0


def rate_norm(z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """A batch norm of rates: values by the statistics given, derivatives through those of `z`.

        x = weight (z - m) / sqrt(w) + bias

    m has the value `mean` and the derivative of the mean of z, w the value 1 / scale^2 and that of the variance of z.

    Args:
        z: [1, B, C, ...], the mean over steps of what the norm got.
        weight, bias: of the norm, [C].
        mean, scale: means over steps of its mean and of its 1 / sqrt(var + eps), [C].

    Returns:
        x, shape and dtype of `z`.
    """
    shape, axes = (1, 1, -1, *[1] * (z.ndim - 3)), [axis for axis in range(z.ndim) if axis != 2]
    wide = z.to(compute_dtype(z.dtype))
    own_mean = wide.mean(axes)
    own_var = (wide - own_mean.view(shape)).square().mean(axes)
    m = mean + (own_mean - own_mean.detach())
    w = scale**-2 + (own_var - own_var.detach())
    gain = weight * torch.rsqrt(w)
    return ((wide - m.view(shape)) * gain.view(shape) + bias.view(shape)).to(z.dtype)


def _check(model: nn.Module, x: Tensor, targets: Tensor, loss: Loss, rule: RateRule) -> None:
    if not isinstance(rule, RateRule):
        raise OptionError(
            f"drive_rate: expected rate(), got {rule!r}; rules that call backward step by step go with drive."
        )
    who = f"rule {rule.name}"
    check_linear(who, model)
    if not getattr(loss, "reads_mean", False):
        raise StrategyError(
            f"{who}: expected a loss of the mean of the logits over time, got "
            f"{getattr(loss, '__name__', type(loss).__name__)}, which reads more than that; use ce_mean or rate_mse."
        )
    if x.ndim < 3 or x.shape[0] == 0:
        raise ShapeError(f"{who}: expected x as [T, B, ...] with T of at least 1, got {tuple(x.shape)}.")
    if tuple(targets.shape) != (x.shape[1],):
        raise ShapeError(
            f"{who}: expected targets {(x.shape[1],)}, one class per sample, got {tuple(targets.shape)}; labels of "
            "every step need a rule that goes step by step, such as sltt."
        )
