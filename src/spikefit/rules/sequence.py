"""One sequence under a rule: what is computed once for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers.applying import applied_by
from spikefit.layers.chain import State
from spikefit.layers.norm import BatchNorm, OnlineRenorm
from spikefit.layers.packed import PackedSpikes, Spikes
from spikefit.layers.recompute import random_state, replayed, unchanged_buffers
from spikefit.layers.running import SequenceStatistics
from spikefit.layers.weight import Standardized, Weight, apply_map, map_of, parameters_of
from spikefit.models import SpikingNetwork
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.values import has_values
from spikefit.rules.dropout import Masks
from spikefit.rules.step import Step, Traces
from spikefit.rules.synapse import Factor
from spikefit.rules.trace import StepRule, TraceRule
from spikefit.rules.wiring import Wiring


class Once(NamedTuple):
    """A value computed once, and the leaf that stands for it at every step and collects its gradient."""

    value: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, value: Tensor) -> "Once":
        # in half precision a sum over many steps would stop growing
        wide = value.detach().to(compute_dtype(value.dtype))
        return cls(value, wide.requires_grad_(value.requires_grad))

    def use(self) -> Tensor:
        """The value, for one step."""
        return self.leaf.to(self.value.dtype)

    def finish(self) -> None:
        """Hand the gradient that the leaf has collected on."""
        if self.leaf.grad is not None:
            self.value.backward(self.leaf.grad.to(self.value.dtype))


class Sequence:
    """What holds for one sequence under a rule.

    Standardised weights, and the first synapse of a sequence that shows one step T times with its norm, are computed
    once; each step reads a leaf in their place, and `finish` hands the gradients that it collected on. A dropout layer
    has one mask, drawn where it is first used. Under a strategy that runs units again in backward (`checkpoint`,
    `reversible`, ...) all of this happens in every step instead.

    Args:
        model: with `step`; its strategy and mode stay.
        rule: the rule.
        x: the whole input, [T, B, ...]; a view with stride 0 along T shows one step T times.

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
        self.normed: dict[tuple[nn.Module, nn.Module], Once] = {}
        # the synapse whose stem was asked for last, and what it got
        self.last_stem: tuple[nn.Module, Tensor] | None = None
        self.masks = Masks()
        self.statistics = SequenceStatistics()
        self.checked = not rule.traced

    @torch.no_grad()
    def begin(self, x: Tensor, around: Callable[[], AbstractContextManager[Any]]) -> None:
        """Give norms that keep running statistics still, and have none yet, those of the sequence.

        One pass over all steps, on the statistics of each; only norms that have never seen a sequence need it.
        """
        norms = [m for m in self.model.modules() if isinstance(m, OnlineRenorm) and m.training]
        # of one step a norm knows the statistics by itself
        if len(x) == 1 or not norms or not has_values(norms[0].num_batches_tracked):
            return
        # one look for all of them, because each would stop a GPU
        unset = torch.stack([norm.is_unset() for norm in norms]).tolist()
        if not any(unset):
            return
        model, state = cast(Any, self.model), cast(Any, self.model).init_state(x.shape[1], tuple(x.shape[2:]))
        repeat = unchanged_buffers([self.model]), replayed(random_state(x.device), x.device)
        with repeat[0], repeat[1], self.statistics.first_pass(n for n, new in zip(norms, unset, strict=True) if new):
            for x_t in x:
                with around():
                    _, state = model.step(x_t, state)
        # casts made here have no graph, and autocast around the whole loop would hand them to the steps
        torch.clear_autocast_cache()

    def step(self, x_t: Tensor, state: State, traces: Traces) -> tuple[Tensor, State, Traces]:
        """One step: input [B, ...], state and traces -> (logits [B, K], state, traces)."""
        one = Step(self, traces)
        with self.statistics.open(), applied_by(one) if self.applies else nullcontext():
            logits, state = cast(Any, self.model).step(x_t, state)
        if not self.checked:
            self._check_reached(one.after)
            self.checked = True
        return logits, state, one.after

    def finish(self) -> None:
        """Hand the gradients that leaves have collected on to what they were computed from; move statistics, once."""
        made = [*self.weights.values(), *(stem for _, stem in self.stems.values()), *self.normed.values()]
        # what was computed from the leaf of another one comes first
        for once in reversed(made):
            once.finish()
        self.weights, self.stems, self.normed, self.last_stem = {}, {}, {}, None
        self.statistics.move()

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
            weight = self.weights[synapse].use()
        return parameters_of(synapse, device, weight)

    def is_repeated(self, x: Spikes) -> bool:
        """Whether `x` is a view of an input that is the same at every step."""
        whole = self.repeated
        if whole is None or not self.shares or isinstance(x, PackedSpikes):
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
        z = once.use()
        self.last_stem = synapse, z
        return z

    def normalised(self, norm: BatchNorm, z: Tensor, repeats: int) -> Tensor:
        """norm(z); that of a stem is computed once, and moves its running statistics by all steps at once."""
        synapse, stem = self.last_stem or (None, None)
        # a norm with a way of its own may depend on the step, as online ones do
        own = type(norm).normalised is not BatchNorm.normalised
        if synapse is None or z is not stem or self.repeated is None or own:
            return norm.normalised(z, norm.weight, norm.bias, repeats)[0]
        if (synapse, norm) not in self.normed:
            with torch.enable_grad():
                # in half precision what this step was given is a copy, which has no graph where the step has none
                z = self.stems[synapse][1].use()
                x = norm.normalised(z, norm.weight, norm.bias, self.repeated.shape[0])[0]
            self.normed[synapse, norm] = Once.of(x)
        return self.normed[synapse, norm].use()

    def dtype(self, x: Spikes) -> torch.dtype:
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
