"""One sequence under a rule: what is computed once for it, and the traces that go from step to step."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers.applying import applied_by
from spikefit.layers.chain import State
from spikefit.layers.norm import BatchNorm
from spikefit.layers.weight import Standardized, Weight, apply_map, autocasting, map_of, parameters_of
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import lif
from spikefit.rules.synapse import Factor, traced_affine, traced_leak, traced_map, weighted
from spikefit.rules.trace import StepRule, TraceRule
from spikefit.rules.wiring import Wiring, check_traced, sign_ratio


class Trace(NamedTuple):
    """What one part carries to the next step.

    Attributes:
        a: trace of an input, a normalised input or spikes; None where the input is the same at every step.
        other: trace c of the bias; the ratio of membranes beside a trace of spikes; None, or how a membrane depends on
            the gain, beside how it depends on the leak.
    """

    a: Tensor | None
    other: Any


# By the path of the part.
Traces = dict[str, Trace]


class Once(NamedTuple):
    """A value computed once, and the leaf that stands for it at every step and collects its gradient."""

    value: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, value: Tensor) -> "Once":
        return cls(value, value.detach().requires_grad_(value.requires_grad))


class Sequence:
    """What holds for one sequence under a rule.

    Standardised weights, and the first synapse of a sequence that shows one step T times, are computed once; each step
    reads a leaf in their place, and `finish` hands the gradients that it collected on. A dropout layer has one mask,
    drawn where it is first used. Under a strategy that runs units again in backward (`checkpoint`, `reversible`, ...)
    all of this happens in every step instead.

    Args:
        model: with `step`; its strategy and mode stay.
        rule: the rule.
        x: the whole input, [T, B, ...]; a view with stride 0 along T shows one step T times.

    Raises:
        StrategyError: the rule has traces, and something trained, a neuron or the strategy does not allow them.
    """

    def __init__(self, model: nn.Module, rule: StepRule, x: Tensor) -> None:
        self.model, self.rule, self.who = model, rule, f"rule {rule.name}"
        self.wiring = Wiring(model)
        self.ratio = isinstance(rule, TraceRule) and rule.mu == "ratio"
        self.skip_data = isinstance(rule, TraceRule) and not rule.trace_first
        networks = [m for m in model.modules() if isinstance(m, SpikingNetwork)]
        # a backward that runs units again has to find the parts as they were
        self.applies = all(network.strategy.by_unit for network in networks)
        self.shares = rule.update_every == "sequence"
        self.repeated = x if x.shape[0] > 1 and x.stride(0) == 0 and not x.requires_grad else None
        self.weights: dict[nn.Module, Once] = {}
        self.stems: dict[nn.Module, tuple[Any, Once]] = {}
        self.masks: dict[tuple[nn.Module, torch.Size], Tensor] = {}
        self.checked = not rule.traced
        if rule.traced:
            check_traced(self.who, model, self.wiring, ratio=self.ratio, skip_data=self.skip_data)

    def step(self, x_t: Tensor, state: State, traces: Traces) -> tuple[Tensor, State, Traces]:
        """One step: input [B, ...], state and traces -> (logits [B, K], state, traces)."""
        one = _Step(self, traces)
        with applied_by(one) if self.applies else nullcontext():
            logits, state = cast(Any, self.model).step(x_t, state)
        if not self.checked:
            self._check_reached(one.after)
            self.checked = True
        return logits, state, one.after

    def finish(self) -> None:
        """Hand the gradients that leaves have collected on to what they were computed from."""
        made = [*self.weights.values(), *(stem for _, stem in self.stems.values())]
        # a stem may have been computed from a standardised weight, whose leaf then collects its gradient
        for once in reversed(made):
            if once.leaf.grad is not None:
                once.value.backward(once.leaf.grad)
        self.weights, self.stems = {}, {}

    def mu(self, part: nn.Module) -> Factor | None:
        """The leak by which the traces of a synapse or norm decay; None for no trace."""
        # what feeds nothing that is known is not trained, else the rule would have been refused
        if not self.rule.traced or self.wiring.fed.get(part) is None:
            return None
        return None if self.skip_data and self.wiring.reads_data(part) else self.wiring.leak(part)

    def parameters(self, synapse: Weight, device: str) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) as the map takes them; a standardised weight is computed once."""
        weight = None
        if isinstance(synapse, Standardized) and self.shares:
            if synapse not in self.weights:
                with torch.enable_grad():
                    self.weights[synapse] = Once.of(synapse.standardized())
            weight = self.weights[synapse].leaf
        return parameters_of(synapse, device, weight)

    def is_repeated(self, x: Tensor) -> bool:
        """Whether `x` is a view of an input that is the same at every step."""
        whole = self.repeated
        if whole is None or not self.shares:
            return False
        # storage, not values: nothing but a view of the input can share it while it lives
        return x.untyped_storage()._cdata == whole.untyped_storage()._cdata

    def stem(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        """z = W * x of a repeated input, computed once."""
        layout = (x.storage_offset(), x.shape, x.stride())
        if synapse not in self.stems:
            with torch.enable_grad():
                z = apply_map(x, *self.parameters(synapse, x.device.type), map_of(synapse), chunk)
            self.stems[synapse] = layout, Once.of(z)
        known, once = self.stems[synapse]
        if known != layout:
            raise StrategyError(
                f"{self.who}: {self.wiring.names[synapse]} reads another part of an input that is the same at every "
                "step; give the model x.contiguous(), which is computed step by step."
            )
        return once.leaf

    def dtype(self, x: Tensor) -> torch.dtype:
        """Of the traces of `x`."""
        chosen = self.rule.trace_dtype if isinstance(self.rule, TraceRule) else None
        return compute_dtype(x.dtype) if chosen is None else chosen

    def _check_reached(self, after: Traces) -> None:
        """Raise StrategyError if a trained synapse was not applied by the rule."""
        for part in self.wiring.fed:
            name = self.wiring.names[part]
            trained = any(p.requires_grad for p in part.parameters())
            if trained and name not in after and self.mu(part) is not None:
                raise StrategyError(
                    f"{self.who}: {name} ({type(part).__name__}) was not applied in the first step by the unit that it "
                    "belongs to, so its gradient would miss its trace; call the unit, not its parts, or use sltt."
                )


class _Step:
    """Applies the parts of units in one step of a sequence."""

    def __init__(self, sequence: Sequence, before: Traces) -> None:
        self.sequence, self.before, self.after = sequence, before, Traces()
        self.names = sequence.wiring.names
        # traces made in this step by what they trace, so that synapses with one input and one decay share one
        self.made: dict[tuple[Any, ...], tuple[Any, Tensor | None, Tensor]] = {}

    def weigh(self, synapse: Weight, x: Tensor, chunk: int | None) -> Tensor:
        sequence, mu = self.sequence, self.sequence.mu(synapse)
        repeated = sequence.is_repeated(x)
        if mu is None:
            if repeated:
                return sequence.stem(synapse, x, chunk)
            return apply_map(x, *sequence.parameters(synapse, x.device.type), map_of(synapse), chunk)
        before = self._before(synapse)
        c = 1.0 if before is None else mu * before.other + 1
        if repeated:
            # the trace of a constant input is c times the input
            self.after[self.names[synapse]] = Trace(None, c)
            return weighted(sequence.stem(synapse, x, chunk), c)
        weight, bias = sequence.parameters(synapse, x.device.type)
        a = self._input_trace(synapse, x, mu, None if before is None else before.a)
        self.after[self.names[synapse]] = Trace(a, c)
        x = x.to(weight.dtype) if autocasting(x.device.type) else x
        return traced_map(x, a, c, weight, bias, map_of(synapse), chunk)

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        mu = self.sequence.mu(norm)
        if mu is None:
            return norm.normalised(z, norm.weight, norm.bias, repeats)[0]
        before = self._before(norm)
        x, mean, var = norm.normalised(z, norm.weight.detach(), norm.bias.detach(), repeats)
        with torch.no_grad():
            shape = (1, 1, -1, *[1] * (z.ndim - 3))
            normal = (z - mean.view(shape)) * torch.rsqrt(var + norm.eps).view(shape)
        a = self._decayed(normal, mu, None if before is None else before.a)
        c = 1.0 if before is None else mu * before.other + 1
        self.after[self.names[norm]] = Trace(a, c)
        return traced_affine(x, norm.weight, norm.bias, a, c)

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        leak, gain = neuron.coefficients() if self.sequence.rule.traced else (0.0, 1.0)
        if not isinstance(leak, Tensor):
            spikes, v_T = neuron(current, v_0)
        else:
            spikes, v_T = self._fire_learned(neuron, leak, gain, current, v_0)
        if self.sequence.ratio:
            self._trace_spikes(neuron, spikes, v_0, v_T, leak)
        return spikes, v_T

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        masks, key = self.sequence.masks, (layer, x.shape[1:])
        if key not in masks:
            masks[key] = nn.functional.dropout(torch.ones_like(x[:1]), p)
        return x * masks[key].to(x.dtype)

    def check_lean(self, unit: nn.Module) -> None:
        if self.sequence.rule.traced:
            raise StrategyError(
                f"{self.sequence.who}: {self.names.get(unit, type(unit).__name__)} runs lean, and its backward would "
                "take the gradient of its weight from the spikes of one step, not from their trace; call "
                "use_strategy(model, 'bptt'), or use sltt."
            )

    def _before(self, part: nn.Module) -> Trace | None:
        """The trace of the step before; StrategyError if the part was used in this step already."""
        if self.names[part] in self.after:
            raise StrategyError(
                f"{self.sequence.who}: {self.names[part]} is used twice in one step, and a trace follows one input; "
                "give each use a weight of its own, or use sltt."
            )
        return self.before.get(self.names[part])

    def _input_trace(self, synapse: Weight, x: Tensor, mu: Factor, before: Tensor | None) -> Tensor:
        source = self.sequence.wiring.sources.get(synapse)
        if self.sequence.ratio and source is not None and source.neuron is not None:
            spikes = self.after[_spikes_of(self.names, source.neuron)].a
            return self._shared(("read", id(x)), x, None, lambda: _through(source.maps, cast(Tensor, spikes)))
        # learned leaks are tensors of their own in every call
        decay = id(self.sequence.wiring.fed[synapse]) if isinstance(mu, Tensor) else mu
        return self._shared((decay, id(x)), x, before, lambda: self._decayed(x, mu, before))

    def _shared(self, key: tuple[Any, ...], x: Tensor, before: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """The trace of `x` that another synapse has made in this step, or a trace of its own."""
        alive, start, a = self.made.get(key, (lambda: None, None, x))
        if alive() is x and start is before:
            return a
        a = make()
        # weakly, so that inputs are freed as without the rule
        self.made[key] = weakref.ref(x), before, a
        return a

    @torch.no_grad()
    def _decayed(self, x: Tensor, mu: Factor | Tensor, before: Tensor | None) -> Tensor:
        """mu before + x, computed in float32 at least."""
        dtype, wide = self.sequence.dtype(x), compute_dtype(x.dtype)
        if before is None:
            return x.detach().to(dtype)
        return torch.add(x.detach().to(wide), mu * before.to(wide)).to(dtype)

    def _fire_learned(
        self, neuron: SpikingNeuron, leak: Tensor, gain: Factor, current: Tensor, v_0: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Neurons that learn their leak: how u depends on leak and gain goes forward in time.

        u = rest + leak (v - rest) + gain x:   f[t] = v[t-1] - rest + leak f[t-1],   h[t] = x[t] + leak h[t-1]
        """
        name = f"{self.names[neuron]}:leak"
        before, learned_gain = self.before.get(name, Trace(None, None)), isinstance(gain, Tensor)
        v = torch.zeros_like(current[0], dtype=compute_dtype(current.dtype)) if v_0 is None else v_0
        rest = neuron.v_rest if neuron.v_rest is not None else neuron.v_reset or 0.0
        f = self._decayed(v - rest, leak.detach(), before.a)
        h = self._decayed(current[0], leak.detach(), before.other) if learned_gain else None
        self.after[name] = Trace(f, h)
        options = neuron.options() | {
            "leak": leak.detach(),
            "gain": gain.detach() if isinstance(gain, Tensor) else gain,
        }
        return lif(traced_leak(current, leak, gain, f, h), v_0, **options)

    @torch.no_grad()
    def _trace_spikes(
        self, neuron: SpikingNeuron, spikes: Tensor, v_0: Tensor | None, v_T: Tensor, leak: Factor
    ) -> None:
        """a[t] = rho[t] a[t-1] + s[t] of the spikes of a neuron, rho the ratio of its membranes."""
        name = _spikes_of(self.names, neuron)
        rho = sign_ratio(v_T, torch.zeros_like(v_T) if v_0 is None else v_0, leak)
        before = self.before.get(name)
        a = spikes.detach().to(self.sequence.dtype(spikes))
        if before is not None:
            used = before.other if cast(TraceRule, self.sequence.rule).lag else rho
            a = self._decayed(spikes, used, before.a)
        self.after[name] = Trace(a, rho)


def _spikes_of(names: dict[nn.Module, str], neuron: SpikingNeuron) -> str:
    return f"{names[neuron]}:spikes"


@torch.no_grad()
def _through(maps: tuple[Callable[[Tensor], Tensor], ...], a: Tensor) -> Tensor:
    for map_ in maps:
        a = map_(a)
    return a
