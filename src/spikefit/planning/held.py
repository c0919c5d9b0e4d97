"""Bytes that autograd holds for backward while a model runs, by layer and category."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.layers import BatchNorm, Readout, SpikingUnit
from spikefit.layers.rebuild import REBUILDS
from spikefit.neurons import LeakyReadout, SpikingNeuron, Threshold


@dataclass
class SavedBytes:
    """Bytes held between forward and backward, each storage once, parameters left out.

    Attributes:
        layers: layer name -> category -> bytes, in the order of first use.
    """

    layers: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes held."""
        return sum(sum(row.values()) for row in self.layers.values())

    def categories(self) -> dict[str, int]:
        """Bytes by category, over all layers."""
        total: dict[str, int] = defaultdict(int)
        for row in self.layers.values():
            for category, count in row.items():
                total[category] += count
        return dict(total)


class Watch:
    """Knows which layer is running, from forward hooks, and notes what autograd saves in it.

    Args:
        model: what runs.
        sequence: an input [T, B, ...] of which a rule holds single steps; what is held of it counts step by step.
    """

    def __init__(self, model: nn.Module, sequence: Tensor | None = None) -> None:
        self.saved = SavedBytes()
        self.sequence = None if sequence is None else sequence.untyped_storage()._cdata
        self.model = model
        self.stack: list[tuple[str, nn.Module]] = []
        self.fired: set[str] = set()
        self.inputs: set[int] = set()
        self.given: list[Tensor] = []
        # what is held now: storage -> its place and how often it is held; bytes by place; and the highest level so far
        self.held: dict[Any, _Place] = {}
        self.rows: dict[str, dict[str, int]] = {}
        self.level, self.highest, self.in_backward = 0, -1, False
        self.parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self.handles = []
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._enter(name)))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str):
        def enter(module, inputs):
            if not self.stack:
                # held by the caller, so that no later storage takes its place
                self.given = [t for t in inputs if isinstance(t, Tensor)]
            self.stack.append((name, module))
            self.inputs.update(t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor))

        return enter

    def _leave(self, module, inputs, output):
        name, _ = self.stack.pop()
        if isinstance(module, SpikingNeuron):
            self.fired.add(name.rpartition(".")[0])

    def pack(self, t: Tensor) -> Any:
        key: Any = t.untyped_storage()._cdata
        # what backward runs again is not held for it
        if self.in_backward or key in self.parameters:
            return t
        size = t.untyped_storage().nbytes()
        if key == self.sequence:
            key, size = (key, t.storage_offset()), min(size, t.numel() * t.element_size())
        place = self.held.get(key)
        if place is None:
            place = self.held[key] = _Place(*self._place(t), size)
            row = self.rows.setdefault(place.layer, {})
            row[place.category] = row.get(place.category, 0) + place.size
            self.level += place.size
        place.times += 1
        held = _Held(t)
        weakref.finalize(held, self._free, key)
        return held

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def _free(self, key: Any) -> None:
        place = self.held[key]
        place.times -= 1
        if place.times == 0:
            self.note()
            del self.held[key]
            self.rows[place.layer][place.category] -= place.size
            self.level -= place.size

    def backward(self, value: Tensor) -> None:
        """Backward of a loss; what it saves is not counted."""
        self.in_backward = True
        try:
            value.backward()
        finally:
            self.in_backward = False

    def note(self) -> None:
        """Take what is held now for what is saved, if it is the most so far."""
        if self.level > self.highest:
            self.highest = self.level
            rows = {layer: {c: n for c, n in row.items() if n} for layer, row in self.rows.items()}
            self.saved.layers = {layer: row for layer, row in rows.items() if row}

    def _category(self, name: str, unit: SpikingUnit, t: Tensor) -> str:
        """What a unit saves itself, beside its norm and neuron."""
        if t.dtype == torch.uint8:
            return "packed spikes"
        if unit.keep == "input" and t.untyped_storage()._cdata not in self.inputs:
            return "norm input"
        return "pool" if name in self.fired else "weight input"

    def _place(self, t: Tensor) -> tuple[str, str]:
        """(layer, category) of what is saved now."""
        for name, module in reversed(self.stack):
            if isinstance(module, BatchNorm):
                return _parent(name, self.stack), "norm input"
            if isinstance(module, SpikingNeuron | LeakyReadout | Threshold):
                return _parent(name, self.stack), "neuron input"
            if isinstance(module, SpikingUnit):
                return name, self._category(name, module, t)
            if isinstance(module, Readout | nn.Linear | nn.Conv1d | nn.Conv2d):
                return name, "weight input"
            if len(self.stack) > 1:
                return name, "other"
            break
        return "(network)", self._category_of_chain(t) if self.stack else "other"

    def _category_of_chain(self, t: Tensor) -> str:
        """What a strategy saves that runs several blocks as one."""
        if t.dtype == torch.uint8:
            return "packed spikes"
        strategy = getattr(self.model, "strategy", None)
        given = {x.untyped_storage()._cdata for x in self.given}
        if strategy is None or strategy.name not in REBUILDS or t.untyped_storage()._cdata in given:
            return "segment"
        # sequences that are only a place in the graph share one value
        return "other" if t.untyped_storage().nbytes() == t.element_size() else "membranes"

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _parent(name: str, stack: list[tuple[str, nn.Module]]) -> str:
    """The unit that owns a norm or neuron; the part itself if it stands alone."""
    owner = name.rpartition(".")[0]
    return owner if any(n == owner and isinstance(m, SpikingUnit | Readout) for n, m in stack) else name


@dataclass
class _Place:
    """Where a storage was first saved, its bytes, and how many saved tensors hold it."""

    layer: str
    category: str
    size: int
    times: int = 0


class _Held:
    """A saved tensor; it goes when autograd frees it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def watching(model: nn.Module, sequence: Tensor | None = None) -> Iterator[Watch]:
    watch = Watch(model, sequence)
    try:
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack):
            yield watch
    finally:
        watch.note()
        watch.close()


@contextlib.contextmanager
def watch_saved(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd holds while `model` runs inside the block: the most at any time, without what was freed.

    Example:
        with watch_saved(model) as saved:
            loss = criterion(model(x), y)
        print(saved.total, saved.layers)
    """
    with watching(model) as watch:
        yield watch.saved
