"""The two passes of the rate rule: `StepPass` or `WholePass` without a graph, then `Second` with one.

    pass 1, no graph, t = 1..T   r = mean_t s[t], k = mean_t q[t] slope(u[t]), q[1] = gain,  q[t+1] = gain + J[t] q[t]
    pass 2, with a graph, once   x = norm(W r_below + b);   the neuron returns r, with derivative k with respect to x

J[t] = du[t+1]/du[t] with a = 0 for a detached reset, else 1:

    soft  leak (1 - a theta slope)      hard  leak (1 - s + a (v_reset - u) slope)      none  leak

k is the derivative of r with respect to a current that is added at every step. Step by step q carries it forward in
time; over a whole sequence it is the sum over t of the gradient that the backward of the neurons gives to x[t].
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikefit.errors import StrategyError
from spikefit.layers.applying import Applier, applied_by
from spikefit.layers.norm import BatchNorm
from spikefit.layers.weight import Standardized, Weight, apply_map, map_of, parameters_of
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import lif_backward
from spikefit.ops.lif.equation import Equation
from spikefit.ops.lif.reference import charge
from spikefit.rules.dropout import Masks

# Values of a current that one call of the neurons' backward takes, so that its gradients are no sequence of their own.
PIECE = 1 << 20


class Rates(NamedTuple):
    """What pass 1 sums up of one population of neurons, each [B, ...].

    Attributes:
        spikes: sum of s[t].
        slope: sum of q[t] slope(u[t] - theta), the derivative of `spikes` with respect to a constant current.
    """

    spikes: Tensor
    slope: Tensor


class Statistics(NamedTuple):
    """What pass 1 sums up over steps of one norm, each [C]: means, and 1 / sqrt(var + eps)."""

    mean: Tensor
    scale: Tensor


class First:
    """Base of pass 1: applies the parts of units and sums up rates, their derivatives and the statistics of norms.

    Args:
        model: a network that `resolve` has let pass.
        who: the rule, for messages.

    Attributes:
        timesteps: T, once it has run.
        rates, statistics: sums over T, by neuron and by norm in training.
    """

    def __init__(self, model: SpikingNetwork, who: str) -> None:
        self.model, self.who, self.timesteps = model, who, 0
        self.names = {module: path for path, module in model.named_modules()}
        self.rates: dict[nn.Module, Rates] = {}
        self.statistics: dict[nn.Module, Statistics] = {}
        self.weights: dict[nn.Module, Tensor] = {}
        self.masks = Masks()
        self.used: set[nn.Module] = set()

    def run(self, x: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """Run the sequence x [T, B, ...], inside `around`; returns the sum of the logits over time, [B, K]."""
        raise NotImplementedError

    def again(self, mean: Tensor) -> Tensor:
        """Logits [B, K] of one step with the mean input [B, ...], as whoever applies the parts now gives them."""
        raise NotImplementedError

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        raise NotImplementedError

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def weigh(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        if isinstance(synapse, Standardized) and synapse not in self.weights:
            self.weights[synapse] = synapse.standardized()
        parameters = parameters_of(synapse, x.device.type, self.weights.get(synapse))
        return apply_map(x, *parameters, map_of(synapse), chunk)

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        return self.masks.drop(layer, x, p)

    def check_lean(self, unit: nn.Module) -> None:
        """Nothing: `resolve` has refused lean units before the first step."""

    def use(self, part: nn.Module) -> None:
        """Raise StrategyError if the part was used for these steps already."""
        if part in self.used:
            raise StrategyError(
                f"{self.who}: {self.names[part]} is used twice in one step, and a rate belongs to one input; give each "
                "use a layer of its own, or use an exact strategy."
            )
        self.used.add(part)


class StepPass(First):
    """Pass 1 step by step; of all steps it keeps the sums, q and the state."""

    def __init__(self, model: SpikingNetwork, who: str) -> None:
        super().__init__(model, who)
        # of the next step, the derivative of u with respect to a constant current
        self.q: dict[nn.Module, Tensor] = {}

    def run(self, x: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        state, total = self.model.init_state(x.shape[1], tuple(x.shape[2:])), None
        for x_t in x:
            self.used.clear()
            with torch.no_grad(), around(), applied_by(cast(Applier, self)):
                logits, state = self.model.step(x_t, state)
            logits = logits.to(compute_dtype(logits.dtype))
            total = logits.clone() if total is None else total + logits
            self.timesteps += 1
        self.q.clear()  # pass 2 reads the sums alone
        assert total is not None, "there is at least one step"
        return total

    def again(self, mean: Tensor) -> Tensor:
        return self.model.step(mean, self.model.init_state(mean.shape[0], tuple(mean.shape[1:])))[0]

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        self.use(norm)
        x, mean, var = norm.normalised(z, norm.weight, norm.bias, repeats)
        if norm.training:
            now = Statistics(mean[0], torch.rsqrt(var[0] + norm.eps))
            before = self.statistics.get(norm)
            self.statistics[norm] = now if before is None else Statistics(*map(torch.add, before, now))
        return x

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        self.use(neuron)
        spikes, v_T = neuron(current, v_0)
        leak, gain = (float(c) for c in neuron.coefficients())
        v = torch.zeros_like(v_T) if v_0 is None else v_0
        u, s = charge(current[0], v, leak, gain, neuron.equation()), spikes[0].to(v_T.dtype)
        slope = neuron.surrogate.slope(u - neuron.v_threshold)
        q = self.q[neuron] if neuron in self.q else torch.full_like(u, gain)
        self.q[neuron] = gain + leak * _kept(u, s, slope, neuron.v_threshold, neuron.equation()) * q
        now, before = Rates(s, q * slope), self.rates.get(neuron)
        self.rates[neuron] = now if before is None else Rates(*map(torch.add, before, now))
        return spikes, v_T


class WholePass(First):
    """Pass 1 layer by layer, each over the whole sequence; of a layer that is done it keeps the sums."""

    def run(self, x: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        self.timesteps = x.shape[0]
        with torch.no_grad(), around(), applied_by(cast(Applier, self)):
            logits = self.model.forward(x)
        total = logits[0].to(compute_dtype(logits.dtype), copy=True)
        for logits_t in logits[1:]:
            total += logits_t
        return total

    def again(self, mean: Tensor) -> Tensor:
        return self.model.forward(mean.unsqueeze(0))[0]

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        self.use(norm)
        x, mean, var = norm.normalised(z, norm.weight, norm.bias, repeats)
        if norm.training:
            # one row for all steps, or a row for each
            rows = (mean, torch.rsqrt(var + norm.eps))
            self.statistics[norm] = Statistics(*(row.mean(0) * self.timesteps for row in rows))
        return x

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        self.use(neuron)
        spikes, v_T = neuron(current, v_0)
        self.rates[neuron] = Rates(spikes.sum(0, dtype=v_T.dtype), slope_sums(neuron, current, v_0))
        return spikes, v_T


def slope_sums(neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> Tensor:
    """The derivative of the sum of the spikes with respect to a current that is added at every step.

    Args:
        neuron: what fires.
        current: what it gets, [T, B, ...].
        v_0: the membrane before, [B, ...]; None for zeros.

    Returns:
        sum over t of q[t] slope(u[t]), [B, ...], float64 for float64 and else float32.
    """
    batch, found = current.shape[1], []
    rows = max(1, PIECE * batch // current.numel())
    for b in range(0, batch, rows):
        x = current[:, b : b + rows].to(compute_dtype(current.dtype))
        ones, v = x.new_ones(()).expand_as(x), None if v_0 is None else v_0[b : b + rows]
        found.append(lif_backward(ones, None, x, v, **neuron.options()).x.sum(0))
    return torch.cat(found)


class Second:
    """Applies the parts of units in pass 2 to rates, [1, B, ...]."""

    def __init__(self, first: First) -> None:
        self.first = first

    def weigh(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        return apply_map(x, *parameters_of(synapse, x.device.type), map_of(synapse), chunk)

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        if not norm.training:
            return norm.normalised(z, norm.weight, norm.bias, repeats)[0]
        mean, scale = (total / self.first.timesteps for total in self.first.statistics[norm])
        return rate_norm(z, norm.weight, norm.bias, mean, scale)

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        total = self.first.rates[neuron]
        r, k = (t.unsqueeze(0) / self.first.timesteps for t in total)
        return given(current, r, k), torch.zeros_like(total.spikes)

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        return self.first.drop(layer, x, p)

    def check_lean(self, unit: nn.Module) -> None:
        """Nothing: `resolve` has refused lean units before the first step."""


def given(x: Tensor, value: Tensor, slope: Tensor | None = None) -> Tensor:
    """`value` in the dtype of x, with derivative `slope` (None for 1) with respect to x."""
    return _Given.apply(x, value, slope)


class _Given(torch.autograd.Function):
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
        mean, scale: means over steps of its mean and of its 1 / sqrt(var + eps), or those of the whole sequence, [C].

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
