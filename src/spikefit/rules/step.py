"""One step of a sequence under a rule: who applies its parts, and the traces that go from step to step."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers import SpikingUnit
from spikefit.layers.applying import Traced, Tracer
from spikefit.layers.norm import BatchNorm
from spikefit.layers.packed import PackedSpikes, Spikes
from spikefit.layers.weight import Weight, apply_map, autocasting, map_of
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import lif
from spikefit.rules.synapse import Factor, traced_affine, traced_leak, traced_map, traced_state, weighted
from spikefit.rules.trace import TraceRule
from spikefit.rules.wiring import sign_ratio

if TYPE_CHECKING:
    from spikefit.rules.sequence import Sequence


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


class Step:
    """Applies the parts of units in one step of a sequence."""

    def __init__(self, sequence: "Sequence", before: Traces) -> None:
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
        a, c = self._trace_input(synapse, x, mu)
        if a is None:
            return weighted(sequence.stem(synapse, x, chunk), c)
        weight, bias = sequence.parameters(synapse, x.device.type)
        x = x.to(weight.dtype) if autocasting(x.device.type) else x
        return traced_map(x, a, c, weight, bias, map_of(synapse), chunk)

    def normalise(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        mu = self.sequence.mu(norm)
        if mu is None:
            return self.sequence.normalised(norm, z, repeats)
        x, mean, var = norm.normalised(z, norm.weight.detach(), norm.bias.detach(), repeats)
        with torch.no_grad():
            shape = (1, 1, -1, *[1] * (z.ndim - 3))
            normal = (z - mean.view(shape)) * torch.rsqrt(var + norm.eps).view(shape)
        a, c = self._trace_norm(norm, mu, normal)
        return traced_affine(x, norm.weight, norm.bias, a, c)

    def fire(self, neuron: SpikingNeuron, current: Tensor, v_0: Tensor | None) -> tuple[Tensor, Tensor]:
        leak, gain = neuron.coefficients() if self.sequence.rule.traced else (0.0, 1.0)
        learned = next((c for c in (leak, gain) if isinstance(c, Tensor)), None)
        if learned is None:
            spikes, v_T = neuron(current, v_0)
        else:
            leak = torch.as_tensor(leak, dtype=learned.dtype, device=learned.device)
            spikes, v_T = self._fire_learned(neuron, leak, gain, current, v_0)
        if self.sequence.ratio:
            self._trace_spikes(neuron, spikes, v_0, v_T, leak)
        return spikes, v_T

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        return self.sequence.masks.drop(layer, x, p)

    def check_lean(self, unit: nn.Module) -> Tracer | None:
        if not self.sequence.rule.traced:
            return None
        neuron = cast(SpikingNeuron, unit.neuron)
        learned = any(p.requires_grad for p in neuron.parameters())
        if learned and isinstance(neuron.coefficients()[1], Tensor):
            raise StrategyError(
                f"{self.sequence.who}: {self.names.get(unit, type(unit).__name__)} runs lean and learns its gain, "
                "whose gradient reads a trace of the current, which a lean unit never has at once; give the neuron "
                "decay_input=False, set keep='all' for this unit, or use sltt."
            )
        return self

    def trace(self, unit: SpikingUnit, x: Spikes) -> Traced | None:
        mu = self.sequence.mu(unit.synapse)
        if mu is None:
            return None
        a, c = self._trace_input(unit.synapse, x, mu)
        norm = unit.norm
        return Traced(a, c) if norm is None else Traced(a, c, lambda n: self._trace_norm(norm, mu, n)[0])

    def start(self, neuron: SpikingNeuron, v_0: Tensor | None) -> Tensor | None:
        # f[t] = v[t-1] - rest + leak f[t-1]: the neuron itself sees the first term, and v[t-1] carries the second
        leak, before = neuron.coefficients()[0], self.before.get(self._leak_of(neuron))
        if v_0 is None or before is None or before.a is None or not isinstance(leak, Tensor):
            return v_0
        return traced_state(v_0, leak, before.a)

    @torch.no_grad()
    def fired(self, neuron: SpikingNeuron, spikes: PackedSpikes, v_0: Tensor | None, v_T: Tensor) -> None:
        leak = neuron.coefficients()[0]
        if isinstance(leak, Tensor):
            self._trace_leak(neuron, leak, torch.zeros_like(v_T) if v_0 is None else v_0)
        if self.sequence.ratio:
            self._trace_spikes(neuron, spikes.steps(0, 1), v_0, v_T, leak)

    def _before(self, part: nn.Module) -> Trace | None:
        """The trace of the step before; StrategyError if the part was used in this step already."""
        return self._once(self.names[part], part)

    def _once(self, key: str, part: nn.Module) -> Trace | None:
        """What `key` had in the step before; StrategyError if `part` was used in this step already."""
        if key in self.after:
            raise StrategyError(
                f"{self.sequence.who}: {self.names[part]} is used twice in one step, and a trace follows one input; "
                "give each use a part of its own, or use sltt."
            )
        return self.before.get(key)

    def _trace_input(self, synapse: Weight, x: Spikes, mu: Factor) -> Trace:
        """The traces of the input of a synapse and of 1."""
        before = self._before(synapse)
        c = 1.0 if before is None else mu * before.other + 1
        # the trace of a constant input is c times the input
        constant = self.sequence.is_repeated(x)
        a = None if constant else self._input_trace(synapse, x, mu, None if before is None else before.a)
        self.after[self.names[synapse]] = trace = Trace(a, c)
        return trace

    def _trace_norm(self, norm: nn.Module, mu: Factor, n: Tensor) -> tuple[Tensor, Factor]:
        """The traces of what a norm reads, [1, B, C, ...], and of 1."""
        before = self._before(norm)
        a = self._decayed(n, mu, None if before is None else before.a)
        c = 1.0 if before is None else mu * before.other + 1
        self.after[self.names[norm]] = Trace(a, c)
        return a, c

    def _input_trace(self, synapse: Weight, x: Spikes, mu: Factor, before: Tensor | None) -> Tensor:
        source = self.sequence.wiring.sources.get(synapse)
        if self.sequence.ratio and source is not None and source.neuron is not None:
            spikes = self.after[_spikes_of(self.names, source.neuron)].a
            return self._shared(("read", id(x)), x, None, lambda: _through(source.maps, cast(Tensor, spikes)))
        # learned leaks are tensors of their own in every call
        decay = id(self.sequence.wiring.fed[synapse]) if isinstance(mu, Tensor) else mu
        return self._shared((decay, id(x)), x, before, lambda: self._decayed(x, mu, before))

    def _shared(self, key: tuple[Any, ...], x: Spikes, before: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """The trace of `x` that another synapse has made in this step, or a trace of its own."""
        known = self.made.get(key)
        if known is not None and known[0]() is x and known[1] is before:
            return known[2]
        a = make()
        # weakly, so that inputs are freed as without the rule
        self.made[key] = weakref.ref(x), before, a
        return a

    @torch.no_grad()
    def _decayed(self, x: Spikes, mu: Factor | Tensor, before: Tensor | None) -> Tensor:
        """mu before + x, computed in float32 at least."""
        x = x.steps(0, 1) if isinstance(x, PackedSpikes) else x
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
        v = torch.zeros_like(current[0], dtype=compute_dtype(current.dtype)) if v_0 is None else v_0
        f, h = self._trace_leak(neuron, leak, v, current[0] if isinstance(gain, Tensor) else None)
        options = neuron.options() | {
            "leak": leak.detach(),
            "gain": gain.detach() if isinstance(gain, Tensor) else gain,
        }
        return lif(traced_leak(current, leak, gain, f, h), v_0, **options)

    def _trace_leak(
        self, neuron: SpikingNeuron, leak: Tensor, v: Tensor, x: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """(f, h) as in `_fire_learned`; h is None without the current `x`."""
        name = self._leak_of(neuron)
        before = self._once(name, neuron) or Trace(None, None)
        rest = neuron.v_rest if neuron.v_rest is not None else neuron.v_reset or 0.0
        f = self._decayed(v - rest, leak.detach(), before.a)
        h = None if x is None else self._decayed(x, leak.detach(), before.other)
        self.after[name] = Trace(f, h)
        return f, h

    def _leak_of(self, neuron: SpikingNeuron) -> str:
        return f"{self.names[neuron]}:leak"

    @torch.no_grad()
    def _trace_spikes(
        self, neuron: SpikingNeuron, spikes: Tensor, v_0: Tensor | None, v_T: Tensor, leak: Factor
    ) -> None:
        """a[t] = rho[t] a[t-1] + s[t] of the spikes of a neuron, rho the ratio of its membranes."""
        name = _spikes_of(self.names, neuron)
        rho = sign_ratio(v_T, torch.zeros_like(v_T) if v_0 is None else v_0, leak)
        before = self._once(name, neuron)
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
