"""Strategies: the forward of a model does not depend on them, exact ones give the gradients of plain BPTT."""

import numpy as np
import pytest
import torch
from torch import nn

from spikefit.engines import STRATEGIES, Strategy, parse_strategy
from spikefit.errors import StrategyError
from spikefit.layers import Flatten, GlobalAveragePool, Readout, SpikingConv2d, SpikingLinear
from spikefit.models import SpikingNetwork, create_model, use_strategy
from spikefit.neurons import LIF
from spikefit.ops.dispatch import installed, use_backend
from spikefit.planning.memory import predicted_bytes
from support import PlainSteps, backends_called, plain_network, saved_bytes

# "integer" is exact for neurons on a grid only, which tests/layers/test_shared.py has; "reversible" runs blocks of two
# streams, which tests/models/test_reversible_models.py has; "step_checkpoint" needs norms per step, below
EXACT = [
    name
    for name, kind in STRATEGIES.items()
    if kind.exact and name not in ("bptt", "integer", "reversible", "step_checkpoint")
]
EXACT += ["checkpoint:1", "checkpoint:3", "lean:input", "lean:spikes"]
CASES = {
    "vgg6": {"input_shape": (3, 8, 8), "width": 0.125},
    "resnet19": {"width": 0.0625, "input_shape": (3, 16, 16)},
    "har_mlp": {"hidden": 32, "neuron": {"name": "plif", "detach_reset": False}},
    "har_conv": {"timesteps": 16, "widths": [8, 8]},  # dropout: random numbers must be replayed
}


def measure(name, strategy, dtype=torch.float64):
    """One step from the same weights, batch and random numbers: output, gradients, buffers, state of the generator."""
    torch.manual_seed(0)
    model = use_strategy(create_model(name, **CASES[name]).to(dtype), strategy)
    x = torch.randn(model.timesteps or 6, 3, *model.input_shape, dtype=dtype, requires_grad=True)
    logits = model(x)
    gradients = torch.autograd.grad(logits.square().mean(), [x, *model.parameters()])
    return logits.detach(), gradients, dict(model.named_buffers()), torch.get_rng_state()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", EXACT)
def test_matches_bptt(name, strategy):
    wanted, got = measure(name, "bptt"), measure(name, strategy)
    assert torch.equal(got[0], wanted[0])
    assert sum(float(g.abs().sum()) for g in wanted[1]) > 0
    for a, b in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for key, buffer in wanted[2].items():
        assert torch.equal(got[2][key], buffer), key
    assert torch.equal(got[3], wanted[3])


class TorchNorm(nn.Module):
    """Batch norm of torch as a block of the user's own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, state=None):
        return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None


@pytest.mark.parametrize("strategy", ["checkpoint:1", "step_checkpoint:3"])
def test_statistics_of_blocks_of_your_own_move_once(strategy):
    counts = []
    for chosen in ("bptt", strategy):
        own = TorchNorm()
        blocks = [SpikingConv2d(3, 4, norm="none"), own, GlobalAveragePool(), Readout(4, 2)]
        model = use_strategy(SpikingNetwork(blocks, input_shape=(3, 6, 6)), chosen)
        model(torch.randn(3, 2, 3, 6, 6)).sum().backward()
        counts.append((int(own.norm.num_batches_tracked), own.norm.running_mean))
    assert counts[0][0] == counts[1][0] == 1
    assert torch.equal(counts[0][1] != 0, counts[1][1] != 0)


STEPPED = {
    "vgg6": {"input_shape": (3, 8, 8), "width": 0.125, "norm": "step_bn"},
    "har_mlp": {"hidden": 16, "share": "layer"},
    "resnet19": {"width": 1 / 32, "input_shape": (3, 8, 8), "norm": "ws"},
    "revsresnet21": {"width": 1 / 16, "input_shape": (3, 8, 8), "norm": "step_bn"},
}


@pytest.mark.parametrize("strategy", ["step_checkpoint", "step_checkpoint:3"])
@pytest.mark.parametrize("name", STEPPED)
def test_checkpoints_in_time(name, strategy):
    """Output, gradients and statistics are those of bptt; what is kept grows by the states between pieces alone."""
    steps = []
    for chosen in ("bptt", strategy):
        torch.manual_seed(0)
        model = create_model(name, **STEPPED[name], strategy=chosen).double()
        x = torch.randn(7, 2, *model.input_shape, dtype=torch.float64, requires_grad=True)
        out = model(x)
        found = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
        steps.append((out.detach(), found, list(model.buffers())))
    (wanted, d_wanted, buffers), (got, d_got, others) = steps
    assert torch.equal(got, wanted)
    for a, b in zip(d_got, d_wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(others, buffers, strict=True):
        assert torch.equal(a, b)

    model = create_model(name, **STEPPED[name], strategy=strategy)
    every = int(strategy.partition(":")[2] or 1)
    held = [saved_bytes(lambda T=T: model(torch.zeros(T, 2, *model.input_shape))) for T in (2 * every, 4 * every)]
    leaves = [v for v in torch.utils._pytree.tree_flatten(model.init_state(2))[0] if v is not None]
    states = sum(v.numel() * v.element_size() for v in leaves)
    sample = 4 * 2 * torch.Size(model.input_shape).numel()
    # two more states, and the input
    assert held[1] - held[0] == 2 * states + 2 * every * sample


def test_what_cannot_be_stepped_is_not_checkpointed_in_time():
    with pytest.raises(StrategyError, match=r"blocks\.0\.norm needs the whole sequence; use norm='step_bn'"):
        create_model("vgg6", strategy="step_checkpoint")
    with pytest.raises(StrategyError, match=r"blocks\.0 \(SpikingConv1d\) needs all time steps"):
        create_model("har_conv", strategy="step_checkpoint")
    with pytest.raises(StrategyError, match="number of steps per piece, 1 or more, got '0'"):
        create_model("har_mlp", norm="ws", strategy="step_checkpoint:0")


@pytest.mark.parametrize("strategy", ["lean", "lean:input", "lean:spikes", {"name": "lean", "keep": "auto"}])
def test_lean_without_a_unit_is_refused(strategy):
    model = plain_network()
    with pytest.raises(StrategyError, match=r"no unit \(SpikingConv2d .* use strategy='checkpoint'.*'step_checkpoint'"):
        use_strategy(model, strategy)
    assert str(model.strategy) == "bptt"
    with pytest.raises(StrategyError, match="strategy lean: the network has no unit"):
        SpikingNetwork([Flatten(), LIF(), Readout(4, 2)], input_shape=(4,), strategy=strategy)
    for named in ("checkpoint", "step_checkpoint", "bptt"):
        use_strategy(model, named)
    # one unit is enough, wherever it is
    mixed = PlainSteps()
    mixed.inner = nn.Sequential(SpikingLinear(2, 2))
    assert use_strategy(SpikingNetwork([mixed], input_shape=(1, 4, 4)), strategy).strategy.name == "lean"
    assert mixed.inner[0].keep == ("input" if "input" in str(strategy) else "spikes")


@pytest.mark.parametrize("strategy", ["checkpoint", "step_checkpoint", "step_checkpoint:2"])
def test_what_is_told_to_use_in_the_place_of_lean_is_exact(strategy):
    found = []
    for chosen in ("bptt", strategy):
        model = use_strategy(plain_network(timesteps=3).double(), chosen)
        x = torch.linspace(-1, 1, 3 * 2 * 16, dtype=torch.float64).view(3, 2, 1, 4, 4).requires_grad_()
        logits = model(x)
        found.append((logits, *torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    assert all(float(g.abs().max()) > 0 for g in found[0][1:])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


SHARING = {"har_mlp": {"hidden": 16}, "resnet19": {"width": 1 / 32, "input_shape": (3, 8, 8)}}


@pytest.mark.parametrize("strategy", ["checkpoint", "checkpoint:1", "checkpoint:2"])
@pytest.mark.parametrize(("share", "groups"), [("layer", 1), ("channel", 2), ("layer_channel", 2)])
@pytest.mark.parametrize("name", SHARING)
def test_checkpoints_of_stages_that_share_membranes(name, share, groups, strategy):
    """Gradients, and statistics that move once, are those of bptt; no hook stays."""
    steps = []
    for chosen in ("bptt", strategy):
        torch.manual_seed(0)
        options = SHARING[name] | {"share": share, "groups": groups, "norm": "step_bn"}
        model = create_model(name, **options, strategy=chosen).double()
        x = torch.randn(4, 3, *model.input_shape, dtype=torch.float64, requires_grad=True)
        logits = model(x)
        gradients = torch.autograd.grad(logits.square().mean(), [x, *model.parameters()])
        steps.append((logits.detach(), gradients, dict(model.named_buffers())))
        assert not any(m._forward_hooks for m in model.modules())
    wanted, got = steps
    assert torch.equal(got[0], wanted[0])
    assert all(float(g.abs().max()) > 0 for g in wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert any(bool(buffer.any()) for buffer in wanted[2].values())
    for key, buffer in wanted[2].items():
        assert torch.equal(got[2][key], buffer), key


class Doubling(LIF):
    """A neuron that does something else every time."""

    calls = 0

    def forward(self, x, v_0=None):
        self.calls += 1
        return super().forward(x * self.calls, v_0)


def test_a_unit_of_a_stage_that_cannot_be_repeated_is_refused():
    blocks = [SpikingLinear(4, 4, norm="step_bn", neuron=neuron) for neuron in (LIF(), Doubling())]
    model = SpikingNetwork(
        [*blocks, Readout(4, 2)], input_shape=(4,), share="layer", stages=[(0, 1)], strategy="checkpoint"
    )
    loss = model(torch.randn(3, 2, 4)).square().sum()
    with pytest.raises(StrategyError, match="SpikingLinear gave another output"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["checkpoint:2", "lean:input", "lean:spikes"])
def test_under_autocast_the_casts_are_repeated(strategy):
    results = []
    for name in ("bptt", strategy):
        torch.manual_seed(0)
        model = use_strategy(create_model("vgg6", **CASES["vgg6"]), name)
        x = torch.randn(4, 3, 3, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        logits.float().square().mean().backward()
        results.append([logits, *[p.grad for p in model.parameters()]])
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        # a checkpoint repeats the very operations; lean sums the gradient of a weight piece by piece
        torch.testing.assert_close(
            b, a, rtol=0, atol=(0.02 if "lean" in strategy else 0) * float(a.detach().abs().max())
        )


@pytest.mark.parametrize("backend", ["reference", *(["numba"] if installed("numba") else [])])
def test_backward_runs_the_backend_of_the_forward(backend):
    model = use_strategy(create_model("vgg6", **CASES["vgg6"]), "checkpoint")
    used = {"reference": set(), "numba": {"numba"}}[backend]

    def step():
        with use_backend(backend):
            loss = model(torch.randn(2, 2, 3, 8, 8)).sum()
        # outside the block, and inside another one
        with use_backend("numba" if backend == "reference" and installed("numba") else "reference"):
            loss.backward()

    assert backends_called(step) == used


def test_gradients_accumulate_and_hooks_run():
    model = use_strategy(create_model("vgg6", **CASES["vgg6"]), "checkpoint")
    seen = []
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    for _ in range(2):
        model(torch.randn(2, 2, 3, 8, 8)).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize("strategy", ["bptt", "checkpoint:2", "lean:spikes"])
def test_a_graph_that_is_retained_goes_backward_twice(strategy):
    model = use_strategy(create_model("vgg6", **CASES["vgg6"]), strategy)
    loss = model(torch.rand(2, 2, 3, 8, 8)).square().mean()
    first, second = (torch.autograd.grad(loss, model.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Noise(nn.Module):
    """A block that multiplies with random numbers that torch does not know of."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, x, state=None):
        return x * torch.tensor(self.numbers.permutation(x.shape[1])).to(x).view(-1, *[1] * (x.ndim - 2)), None

    def init_state(self, batch_size, shape, **options):
        return None, shape


@pytest.mark.parametrize("strategy", ["checkpoint:1", "checkpoint:2", "checkpoint:5"])
def test_a_block_that_cannot_be_repeated_is_refused_before_a_gradient_appears(strategy):
    blocks = [SpikingConv2d(3, 8), Noise(np.random.default_rng(0)), SpikingConv2d(8, 8), GlobalAveragePool()]
    model = SpikingNetwork([*blocks, Readout(8, 3)], input_shape=(3, 8, 8), strategy=strategy)
    loss = model(torch.rand(3, 4, 3, 8, 8)).square().sum()
    with pytest.raises(StrategyError, match="Noise gave another output"):
        loss.backward()
    assert model.blocks[0].synapse.weight.grad is None


class Repeatable(Noise):
    def forward(self, x, state=None):
        return x * torch.randn(x.shape[1:]).to(x), None


@pytest.mark.parametrize("strategy", ["checkpoint:1", "checkpoint:2", "checkpoint:5"])
def test_a_block_of_the_users_own_that_draws_from_torch_is_repeated(strategy):
    gradients = []
    for name in ("bptt", strategy):
        torch.manual_seed(0)
        blocks = [SpikingConv2d(3, 8), Repeatable(None), SpikingConv2d(8, 8), Repeatable(None), GlobalAveragePool()]
        model = SpikingNetwork([*blocks, Readout(8, 3)], input_shape=(3, 8, 8), strategy=name)
        x = torch.rand(3, 4, 3, 8, 8)
        assert predicted_bytes(model, x, torch.zeros(4, dtype=torch.int64)).peak > 0
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_evaluation_without_gradients_keeps_nothing():
    model = use_strategy(create_model("vgg6", **CASES["vgg6"]), "checkpoint").eval()
    with torch.no_grad():
        assert not model(torch.rand(2, 2, 3, 8, 8)).requires_grad


def test_names():
    assert (
        parse_strategy("checkpoint:2")
        == Strategy("checkpoint", "2")
        == parse_strategy({"name": "checkpoint", "every": 2})
    )
    assert str(parse_strategy("checkpoint:2")) == "checkpoint:2"
    assert parse_strategy("lean:spikes") == parse_strategy({"name": "lean", "keep": "spikes"})
    assert parse_strategy("bptt").exact
    for text, message in [
        ("btpp", "expected one of bptt, lean, checkpoint"),
        ("chekpoint", "Did you mean checkpoint"),
        ("lean:inputs", "Did you mean input"),
        ("lean:everything", "or a saved plan"),
        ("checkpoint:0", "1 or more"),
        ("checkpoint:two", "1 or more"),
        ("bptt:2", "takes no option"),
    ]:
        with pytest.raises(StrategyError, match=message):
            parse_strategy(text)
    for wrong in (None, 3):
        with pytest.raises(StrategyError, match=f"expected a text .* got {wrong}"):
            use_strategy(create_model("mlp", hidden=[4]), wrong)
    with pytest.raises(StrategyError, match="name = "):
        parse_strategy({"every": 2})
