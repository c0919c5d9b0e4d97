"""Doctor: each seeded leak is found where it is, and a clean loop has none."""

import json
import weakref
from collections import deque
from typing import ClassVar

import pytest
import torch
from torch import nn

from spikefit.cli.app import doctor as doctor_command
from spikefit.errors import OptionError
from spikefit.layers import Readout, SpikingLinear
from spikefit.models import SpikingNetwork, create_model, use_strategy
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
    for text in ("1 found; complete steps: 1", "blocks.1", "128 B per step", found.line, "second time"):
        assert text in str(seen)


def test_a_forgotten_reset_under_retain_graph():
    model = Net(Stateful())
    seen = doctor(model, Loop(model, retain_graph=True, lr=0.0), n=4)
    (found,) = seen
    assert (found.module, found.kind, seen.steps, seen.error) == ("blocks.1", "forgotten reset", 4, None)
    assert (found.bytes_per_step, found.bytes_total) == (4 * B * N, 3 * 4 * B * N)
    # with a weight update in between the second backward fails in another way
    model = nn.Sequential(nn.Linear(5, N), Stateful(), nn.Linear(N, 3), Stateful())
    seen = doctor(model, Loop(model, retain_graph=True))
    assert [(f.module, f.kind) for f in seen] == [("1", "forgotten reset"), ("3", "forgotten reset")]
    assert "modified by an inplace operation" in seen.error


def test_values_that_go_on_without_a_graph():
    model = Net(Stateful(detach=True))
    seen = doctor(model, Loop(model), n=4)
    (found,) = seen
    assert (found.module, found.kind, found.where, seen.error, seen.steps) == (
        "blocks.1",
        "forgotten reset",
        "v",
        None,
        4,
    )
    assert found.bytes_total == found.bytes_per_step == 4 * B * N
    assert "without a graph" in found.evidence


def test_a_forgotten_reset_in_a_model_without_forward():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.v = nn.Linear(5, N), 0.0

        def advance(self, x_t):
            self.v = 0.5 * self.v + self.linear(x_t)
            return self.v

    model, x = Streaming(), torch.rand(T, B, 5)
    (found,) = doctor(model, lambda: sum(model.advance(x_t).sum() for x_t in x).backward(retain_graph=True))
    assert (found.module, found.kind, found.where) == ("", "forgotten reset", "v")
    assert found.line.startswith("model.v = torch.zeros_like(model.v)")


@pytest.mark.parametrize("attribute", ["list", "dict", "tuple", "buffer"])
def test_state_in_containers_and_buffers(attribute):
    class Holder(Stateful):
        def __init__(self):
            super().__init__()
            if attribute == "buffer":
                self.register_buffer("memory", None)

        def forward(self, x):
            memory = getattr(self, "memory", None)
            self.v = (
                memory
                if attribute == "buffer"
                else memory["v"]
                if attribute == "dict" and memory
                else memory and memory[0]
            )
            out = super().forward(x)
            v, self.v = self.v, None
            self.memory = {"list": [v], "dict": {"v": v}, "tuple": (v,), "buffer": v}[attribute]
            return out

    model = Net(Holder())
    (found,) = doctor(model, Loop(model))
    assert (found.module, found.kind) == ("blocks.1", "forgotten reset")
    assert (
        found.where == {"list": "memory[0]", "dict": "memory['v']", "tuple": "memory[0]", "buffer": "memory"}[attribute]
    )


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
        instances: ClassVar = []

        def __init__(self):
            super().__init__()
            Registered.instances.append(self)

    class Recorded(Stateful):
        spikes: ClassVar = []

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


class Everything(nn.Module):
    """Nothing of this grows: statistics, records, caches, bounded queues, rewritten weights, spiking blocks."""

    levels: ClassVar = [torch.arange(3), torch.arange(4)]

    def __init__(self):
        super().__init__()
        # as many features as samples, so that no shape tells a statistic from a state
        self.norm, self.neuron, self.snn = nn.BatchNorm1d(B), Stateful(), create_mlp(B)
        self.linear = nn.utils.spectral_norm(nn.Linear(5, B))
        self.register_buffer("rate", torch.zeros(B))
        self.register_buffer("threshold", torch.ones(B, B))
        self.cache, self.recent, self.rows, self.last, self.x = {}, deque(maxlen=2), [], None, None

    def forward(self, x):
        self.neuron.v, self.rows, self.x = None, [], x[-1]
        grid = self.cache.setdefault("grid", torch.arange(B * B).view(B, B) / B)
        z = self.linear(x)
        s = self.neuron(self.norm(z.flatten(0, 1)).view_as(z) + grid - self.threshold)
        self.last = s
        self.recent.append(s.detach())
        self.rows.extend(s)
        with torch.no_grad():
            self.rate.mul_(0.9).add_(s.mean((0, 1)))
            self.threshold = 0.9 * self.threshold + 0.1 * s.mean(0)
        return self.snn(s)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("n", [2, 4])
def test_nothing_in_a_clean_loop(optimizer, n):
    torch.manual_seed(0)
    model, losses, last = Everything(), [], {}
    after = lambda logits, loss: (losses.append(loss.item()), last.update(logits=logits, loss=loss))  # noqa: E731
    loop = Loop(model, after=after, batches=(B, B, B + 1) if n == 2 else (B,))
    if optimizer == "adam":
        loop.optimizer = torch.optim.AdamW(model.parameters())
    seen = doctor(model, lambda: loop() or (losses, last), n=n)
    assert str(seen) == f"doctor: nothing found; complete steps: {n}."
    assert (len(seen), seen.error, len(losses)) == (0, None, n)


def test_a_record_of_a_batch_that_comes_again_is_no_state():
    torch.manual_seed(0)
    model, x = Everything(), torch.rand(T, B, 5)
    assert not doctor(model, lambda: model(x).sum().backward(), n=4).findings


@pytest.mark.parametrize("strategy", ["bptt", "checkpoint"])
def test_nothing_in_networks_of_this_library(strategy):
    torch.manual_seed(0)
    model = use_strategy(create_model("vgg6", input_shape=(3, 8, 8), width=0.1), strategy)
    assert not doctor(model, Loop(model, shape=(3, 8, 8))).findings


@pytest.mark.parametrize("value", [None, 0.0, -1.0, "zeros", "levels"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_way_to_reset_is_one(value, when):
    class Neuron(Stateful):
        def forward(self, x):
            self.v = torch.full_like(x[0], self.v) if isinstance(self.v, float) else self.v
            return super().forward(x)

    model = Net(Neuron())

    def reset(*_):
        v = model.blocks[1].v
        if value == "zeros":
            model.blocks[1].v = v if v is None else torch.zeros_like(v)
        else:
            model.blocks[1].v = torch.linspace(-1, 0, N).repeat(B, 1) if value == "levels" else value

    assert not doctor(model, Loop(model, **{when: reset}), n=4).findings


def test_a_reset_in_place_is_one_without_a_graph():
    model = Net(Stateful(detach=True))
    zero = lambda: model.blocks[1].v is None or model.blocks[1].v.zero_()  # noqa: E731
    assert not doctor(model, Loop(model, before=zero), n=4).findings


def test_the_steps_are_those_of_a_plain_loop():
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = Everything()
        loop = Loop(model)
        if watched:
            doctor(model, loop, n=3)
        else:
            [loop() for _ in range(3)]
        ends.append(
            (model.state_dict(), loop.optimizer.state_dict()["state"], torch.get_rng_state(), vars(model).keys())
        )
    (weights, momenta, random, names), plain = ends
    assert all(torch.equal(w, plain[0][key]) for key, w in weights.items())
    assert all(torch.equal(s["momentum_buffer"], plain[1][i]["momentum_buffer"]) for i, s in momenta.items())
    assert torch.equal(random, plain[2])
    assert names == plain[3]


def test_nothing_stays_behind_when_a_step_raises():
    model = Net(Stateful())
    before = hooks(model)
    mistake = KeyError("third batch")

    def step():
        loop()
        if loop.steps == 3:
            raise mistake

    loop = Loop(model, before=lambda: reset(model))
    with pytest.raises(KeyError) as raised:
        doctor(model, step, n=5)
    assert raised.value is mistake
    assert hooks(model) == before
    # an error that looks like the known one is passed on too, if no state explains it
    loss = model(torch.rand(T, B, 5)).sum()
    with pytest.raises(RuntimeError, match="second time"):
        doctor(model, lambda: loss.backward() or reset(model))
    assert hooks(model) == before
    doctor(model, Loop(model, before=lambda: reset(model)))
    assert hooks(model) == before
    out = weakref.ref(model(torch.rand(T, B, 5)))
    assert out() is None


def test_bad_input_is_told_in_one_sentence():
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="at least 2 steps, got 1"):
        doctor(model, print, n=1)
    with pytest.raises(OptionError, match=r"whole number of at least 2 steps, got 2\.5"):
        doctor(model, print, n=2.5)
    with pytest.raises(OptionError, match="that runs one training step, got Tensor"):
        doctor(model, torch.zeros(1))
    with pytest.raises(OptionError, match="expected a torch module as model, got function"):
        doctor(lambda x: x, print)


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "leaky.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Leaky(nn.Module):\n"
        "    v = 0.0\n"
        "    def forward(self, x):\n"
        "        out = []\n"
        "        for x_t in x:\n"
        "            self.v = 0.5 * self.v + x_t\n"
        "            out.append(torch.sigmoid(self.v - 1))\n"
        "        return torch.stack(out)\n"
        "class Net(nn.Sequential):\n"
        "    def reset(self):\n"
        "        self[1].v = 0.0\n"
        "def make(hidden=8):\n"
        "    return nn.Sequential(nn.Linear(9, hidden), Leaky(), nn.Linear(hidden, 3))\n"
        "def clean():\n"
        "    return Net(*make())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["timesteps=3", "batch=4", "shape=9"]
    doctor_command("leaky:make", [*words, "hidden=16"], as_json=True)
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["module"], found["kind"], found["bytes_per_step"]) == ("1", "forgotten reset", 4 * 4 * 16)
    doctor_command("leaky:clean", words)
    assert "nothing found" in capsys.readouterr().out
    doctor_command("vgg6", ["timesteps=2", "batch=2", "image=3x8x8", "width=0.1"])
    assert "nothing found" in capsys.readouterr().out
    with pytest.raises(OptionError, match="give image=CxHxW"):
        doctor_command("leaky:make", ["timesteps=3"])


@pytest.mark.parametrize("mode", ["m", "s"])
def test_spikingjelly(mode):
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1, step_mode=mode),
        layer.BatchNorm2d(4, step_mode=mode),
        neuron.LIFNode(step_mode=mode),
        layer.Flatten(step_mode=mode),
        layer.Linear(64, 3, step_mode=mode),
        neuron.ParametricLIFNode(step_mode=mode),
    )
    model = net if mode == "m" else Stepwise(net)
    path = "" if mode == "m" else "net."
    for options in ({"before": lambda: functional.reset_net(model)}, {"after": lambda *_: functional.reset_net(model)}):
        assert not doctor(model, Loop(model, shape=(2, 4, 4), **options)).findings
        functional.reset_net(model)
    seen = doctor(model, Loop(model, shape=(2, 4, 4)))
    assert [(f.module, f.kind) for f in seen] == [(f"{path}{i}", "forgotten reset") for i in (2, 5)]
    assert all(f.line.startswith("functional.reset_net(model)") for f in seen)
    assert "second time" in seen.error
    functional.reset_net(model)
    seen = doctor(model, Loop(model, shape=(2, 4, 4), after=lambda *_: functional.detach_net(model)))
    assert [(f.module, f.kind) for f in seen] == [(f"{path}{i}", "forgotten reset") for i in (2, 5)]
    assert all("without a graph" in f.evidence for f in seen)


def test_snntorch():
    snn = pytest.importorskip("snntorch")
    reset = pytest.importorskip("snntorch.utils").reset
    torch.manual_seed(0)
    snn.SpikingNeuron.instances = []
    parts = [nn.Linear(5, N), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(N, 3), snn.Leaky(0.9, init_hidden=True)]
    net = nn.Sequential(*parts)
    model = Stepwise(net)
    (registry,) = doctor(model, Loop(model, before=lambda: reset(net), batches=(B, B - 1)))
    assert (registry.module, registry.kind, registry.where) == ("net.1", "class registry", "SpikingNeuron.instances")
    reset(net)
    seen = doctor(model, Loop(model))
    assert [(f.module, f.kind) for f in seen][:2] == [("net.1", "forgotten reset"), ("net.3", "forgotten reset")]
    assert seen.findings[0].line.startswith("model.net[1].reset_mem()")
    assert "second time" in seen.error


class Stepwise(nn.Module):
    """One time step at a time through a network that keeps its state: [T, B, ...] -> [T, B, K]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.stack([self.net(x_t) for x_t in x])


def create_mlp(inputs=5):
    return SpikingNetwork([SpikingLinear(inputs, N), Readout(N, 3)], input_shape=(inputs,))
