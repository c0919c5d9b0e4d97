"""Doctor: each seeded leak is found where it is, and a clean loop has none."""

import json
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from spikefit.errors import OptionError
from spikefit.layers import Readout, SpikingConv2d, SpikingLinear
from spikefit.models import SpikingNetwork, create_model
from spikefit.planning.doctor import OUTSIDE, doctor

T, B, N = 3, 4, 8


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class Stateful(nn.Module):
    """A LIF neuron as users write it: [T, B, N] -> [T, B, N], the membrane an attribute that nobody resets."""

    def __init__(self, detach=False):
        super().__init__()
        self.v, self.detach = None, detach

    def forward(self, x):
        spikes = []
        v = torch.zeros_like(x[0]) if self.v is None else self.v
        for x_t in x:
            u = 0.5 * v + x_t
            s = Spike.apply(u - 1)
            v = u - s
            spikes.append(s)
        self.v = v.detach() if self.detach else v
        return torch.stack(spikes)


class Net(nn.Module):
    def __init__(self, neuron):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(5, N), neuron)
        self.head = nn.Linear(N, 3)

    def forward(self, x):
        return self.head(self.blocks(x)).mean(0)


class Loop:
    """A training loop: `step()` as in a script, with what goes wrong given as functions before and after it."""

    def __init__(self, model, before=None, after=None, batches=(B,), retain_graph=False, shape=(5,), lr=0.1):
        torch.manual_seed(0)
        self.model, self.before, self.after = model, before, after
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        self.batches, self.retain_graph, self.shape, self.steps = batches, retain_graph, shape, 0

    def __call__(self):
        if self.before:
            self.before()
        x = torch.rand(T, self.batches[self.steps % len(self.batches)], *self.shape) * 2
        self.steps += 1
        logits = self.model(x)
        logits = logits.mean(0) if logits.ndim == 3 else logits
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
        self.optimizer.zero_grad()
        loss.backward(retain_graph=self.retain_graph)
        self.optimizer.step()
        if self.after:
            self.after(logits, loss)


def reset(model):
    for module in model.modules():
        if isinstance(module, Stateful):
            module.v = None


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_forgotten_reset_that_ends_in_the_well_known_error():
    model = Net(Stateful())
    seen = doctor(model, Loop(model))
    (found,) = seen
    assert (found.module, found.kind, found.where) == ("blocks.1", "forgotten reset", "v")
    assert (found.bytes_per_step, found.bytes_total) == (4 * B * N, 4 * B * N)
    assert found.line.startswith("model.blocks[1].v = torch.zeros_like(model.blocks[1].v)")
    assert seen.steps == 1
    assert "backward through the graph a second time" in seen.error
    assert json.loads(json.dumps(seen.to_dict()))["findings"][0]["kind"] == "forgotten reset"
    for text in ("1 found in 1 steps", "blocks.1", "128 B per step", found.line, "second time"):
        assert text in str(seen)


def test_a_forgotten_reset_under_retain_graph():
    model = Net(Stateful())
    seen = doctor(model, Loop(model, retain_graph=True, lr=0.0))
    assert [(f.module, f.kind) for f in seen] == [("blocks.1", "forgotten reset")]
    model = Net(Stateful())
    model.blocks[0].requires_grad_(False)
    model.blocks[1].scale = nn.Parameter(torch.ones(()))
    seen = doctor(model, Loop(model, retain_graph=True))
    assert len(seen) <= 1


def test_values_that_go_on_without_a_graph():
    model = Net(Stateful(detach=True))
    seen = doctor(model, Loop(model), n=4)
    (found,) = seen
    assert (found.module, found.kind, found.where, seen.error, seen.steps) == ("blocks.1", "forgotten reset", "v", None, 4)
    assert found.bytes_total == found.bytes_per_step == 4 * B * N
    assert "without a graph" in found.evidence


@pytest.mark.parametrize("attribute", ["list", "dict", "tuple", "buffer"])
def test_state_in_containers_and_buffers(attribute):
    class Holder(Stateful):
        def __init__(self):
            super().__init__()
            if attribute == "buffer":
                self.register_buffer("memory", None)

        def forward(self, x):
            memory = getattr(self, "memory", None)
            self.v = memory if attribute == "buffer" else memory["v"] if attribute == "dict" and memory else memory and memory[0]
            out = super().forward(x)
            v, self.v = self.v, None
            self.memory = {"list": [v], "dict": {"v": v}, "tuple": (v,), "buffer": v}[attribute]
            return out

    model = Net(Holder())
    (found,) = doctor(model, Loop(model))
    assert (found.module, found.kind) == ("blocks.1", "forgotten reset")
    assert found.where == {"list": "memory[0]", "dict": "memory['v']", "tuple": "memory[0]", "buffer": "memory"}[attribute]


def test_a_state_of_another_batch_ends_in_an_error():
    model = Net(Stateful(detach=True))
    seen = doctor(model, Loop(model, batches=(B, B + 2)))
    (found,) = seen
    assert (found.module, found.kind, found.where) == ("blocks.1", "stale batch", "v")
    assert found.line.startswith(f"model.blocks[1].v = model.blocks[1].v.new_zeros({B + 2}, {N})")
    assert "size" in seen.error


def test_a_state_of_another_batch_is_broadcast():
    # one sample was shown before training; its membrane is added to every sample of the first batch
    model = Net(Stateful(detach=True))
    model(torch.rand(T, 1, 5) * 2)
    (found,) = doctor(model, Loop(model, after=lambda *_: reset(model)))
    assert (found.module, found.kind, found.where) == ("blocks.1", "stale batch", "v")
    assert found.bytes_per_step == 4 * N


def test_kept_graphs_outside_of_the_model():
    model, total, outputs = create_mlp(), torch.zeros(()), []

    def add(logits, loss):
        nonlocal total
        total = total + loss

    def step():
        loop()
        return total

    loop = Loop(model, after=add)
    (found,) = doctor(model, step)
    assert (found.module, found.kind, found.where) == (OUTSIDE, "kept graph", "total")
    assert found.bytes_per_step > 512
    assert found.line.startswith("total += loss.item()")

    loop = Loop(model, after=lambda logits, loss: outputs.append(logits))
    (found,) = doctor(model, lambda: (loop(), outputs))
    assert (found.module, found.kind, found.where) == (OUTSIDE, "kept graph", "outputs")
    assert found.line.startswith("outputs.append(y.detach())")


def test_bytes_of_a_kept_graph_are_those_that_autograd_holds():
    layer, x, kept = nn.Linear(64, 64), torch.rand(32, 64), []
    (found,) = doctor(layer, lambda: kept.append((layer(x).exp() * 2).sum()), n=5)
    # exp keeps its result; the sum and four nodes are small
    assert 4 * 32 * 64 <= found.bytes_per_step < 4 * 32 * 64 + 10 * 512
    assert found.bytes_total == pytest.approx(4 * found.bytes_per_step, rel=0.01)


@pytest.mark.parametrize("kind", [list, dict, deque])
def test_growing_containers(kind):
    model = Net(Stateful())
    model.blocks[1].record = kind()

    def keep(module, args, out):
        out = out.detach()
        module.record.update({len(module.record): out}) if kind is dict else module.record.append(out)

    model.blocks[1].register_forward_hook(keep)
    (found,) = doctor(model, Loop(model, before=lambda: reset(model)))
    assert (found.module, found.kind, found.where) == ("blocks.1", "growing container", "record")
    assert (found.bytes_per_step, found.bytes_total) == (4 * T * B * N, 3 * 4 * T * B * N)
    assert found.line.startswith("model.blocks[1].record.clear()")


def test_class_registries():
    class Registered(Stateful):
        instances = []

        def __init__(self):
            super().__init__()
            Registered.instances.append(self)

    class Recorded(Stateful):
        spikes = []

        def forward(self, x):
            out = super().forward(x)
            Recorded.spikes.append(out)
            return out

    for neuron, name in ((Registered, "instances"), (Recorded, "spikes")):
        model = Net(neuron())
        (found,) = doctor(model, Loop(model, before=lambda model=model: reset(model)))
        assert (found.module, found.kind) == ("blocks.1", "class registry")
        assert found.where == f"{neuron.__qualname__}.{name}"
        assert f".{name}.clear()" in found.line
    assert (found.bytes_per_step, found.bytes_total) == (4 * T * B * N, 3 * 4 * T * B * N)


def create_mlp():
    torch.manual_seed(0)
    return SpikingNetwork([SpikingLinear(5, N), Readout(N, 3)], input_shape=(5,))
