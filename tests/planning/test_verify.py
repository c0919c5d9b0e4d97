"""verify: passes on every exact strategy, and each planted fault turns its verdict."""

import random

import pytest
import torch
from torch import nn

from spikefit.errors import SpikefitError, StrategyError
from spikefit.layers import (
    BatchNorm,
    GlobalAveragePool,
    Readout,
    SpikingConv2d,
    SpikingUnit,
    lean,
    packed,
    stage_function,
)
from spikefit.models import SpikingNetwork, create_model, use_strategy
from spikefit.neurons import LIF, Threshold
from spikefit.planning import plan, verify
from support import PlainSteps, dyadic, plain_network

SMALL = {"input_shape": (3, 12, 12), "width": 0.125}


def make(name="vgg6", strategy="lean:spikes", dtype=torch.float32):
    torch.manual_seed(0)
    model = use_strategy(create_model(name, **SMALL).to(dtype), strategy)
    return model, torch.rand(4, 2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", ["vgg6", "resnet19"])
@pytest.mark.parametrize("strategy", ["bptt", "checkpoint", "lean:input", "lean:spikes", "lean:auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_strategies_pass(name, strategy, dtype):
    model, x = make(name, strategy, dtype)
    verdict = verify(model, x)
    assert verdict.passed, str(verdict)
    assert "equal to plain BPTT" in str(verdict)


def test_a_plan_and_autocast_pass():
    model, x = make(strategy="bptt")
    plan(model, x, None).apply(model)
    assert verify(model, x).passed
    assert verify(model, x, autocast=True).passed


def test_gradients_that_are_nothing_but_rounding_pass():
    """A bias in front of a batch norm, and a norm that sees one value, have a true gradient of zero."""
    torch.manual_seed(0)
    blocks = [
        SpikingUnit(nn.Conv2d(2, 8, 3, padding=1), BatchNorm(8), LIF(), pool="max"),
        SpikingUnit(nn.Conv2d(8, 16, 3, padding=1), BatchNorm(16), LIF()),
        GlobalAveragePool(),
        Readout(16, 5),
    ]
    biased = SpikingNetwork(blocks, input_shape=(2, 8, 8), strategy="lean:spikes")
    verdict = verify(biased, torch.rand(4, 3, 2, 8, 8))
    assert verdict.passed, str(verdict)
    assert verdict.max_gradient_error <= verdict.tolerance == 1e-5
    assert verdict.noise > verdict.tolerance

    one_value = use_strategy(create_model("vgg6", input_shape=(3, 8, 8), width=0.25), "lean:spikes")
    assert verify(one_value, torch.rand(1, 1, 3, 8, 8)).passed
    assert verify(use_strategy(create_model("mlp", input_shape=(33,)), "lean:spikes"), torch.rand(1, 1, 33)).passed


def test_the_model_is_left_as_it_was():
    model, x = make()
    model.eval()
    model.blocks[0].synapse.weight.grad = torch.ones_like(model.blocks[0].synapse.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    verify(model, x)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.blocks[0].synapse.weight.grad.eq(1).all()
    assert model.blocks[1].synapse.weight.grad is None
    assert model.strategy.name == "lean"
    assert model.blocks[1].keep == "spikes"


def test_wrong_bit_order_is_seen(monkeypatch):
    right = packed.unpack

    def reversed_bits(bits, channels, **options):
        return right(bits, channels, **options).unflatten(-1, (-1, 8)).flip(-1).flatten(-2)

    monkeypatch.setattr(packed, "unpack", reversed_bits)
    model, x = make()
    verdict = verify(model, x)
    assert not verdict.passed
    assert not verdict.spikes_equal
    assert verdict.spikes_differing


def test_dropped_carry_is_seen(monkeypatch):
    right = lean.fire_gradient

    def without_carry(g, q, current, v_0, bits, grid, dynamics, *rest, **options):
        return right(g, q, current, v_0, bits, grid, dynamics._replace(constants=(0.0, 1.0, 1.0)), *rest, **options)

    monkeypatch.setattr(lean, "fire_gradient", without_carry)
    model, x = make()
    verdict = verify(model, x)
    assert not verdict.passed
    assert verdict.spikes_equal
    assert verdict.max_gradient_error > 0.01


def test_doubled_statistics_are_seen(monkeypatch):
    right, model = BatchNorm.track, make()[0]

    def twice(self, *arguments, **options):
        for _ in range(2 if model.blocks[0].keep == "spikes" else 1):
            right(self, *arguments, **options)

    monkeypatch.setattr(BatchNorm, "track", twice)
    verdict = verify(model, make()[1])
    assert not verdict.passed
    assert not verdict.buffers_equal
    assert verdict.spikes_equal


def test_stale_mask_is_seen(monkeypatch):
    right = lean.fire_gradient

    def stale(g, q, current, v_0, bits, *rest, **options):
        return right(g, q, current, v_0, bits.roll(1, 0), *rest, **options)

    monkeypatch.setattr(lean, "fire_gradient", stale)
    model, x = make()
    verdict = verify(model, x)
    assert not verdict.passed
    assert verdict.max_gradient_error > 0.001


def rebuilt(strategy, **options):
    """A network that shares membranes, and a sequence."""
    torch.manual_seed(0)
    options = {"hidden": 32, "share": "layer", "preset": "efficientlif"} | options
    return create_model("har_mlp", **options, strategy=strategy), torch.randn(8, 4, 9)


@pytest.mark.parametrize("strategy", ["inverse", "inverse:6", "inverse:4,0.0005"])
def test_an_approximate_strategy_is_held_to_the_error_it_accepts(strategy):
    verdict = verify(*rebuilt(strategy))
    accepts = 5e-4 if "," in strategy else 1e-3
    assert verdict.passed, str(verdict)
    assert (verdict.approximate, verdict.accepts, verdict.tolerance) == ("inverse", accepts, accepts)
    told = "inverse is approximate, equal to plain BPTT: largest gradient error "
    assert str(verdict).startswith(told)
    assert f"(allowed {accepts:.1e}, as its error of u stays below {accepts:g})." in str(verdict)
    # its error is no rounding of an exact strategy, and a tolerance of one's own counts
    strict = verify(*rebuilt("inverse"), tolerance=1e-6)
    assert not strict.passed
    assert 1e-6 < strict.max_gradient_error < 1e-3
    assert "NOT equal" in str(strict)
    assert verify(*rebuilt("replay")).approximate is None


def test_a_wrong_inverse_is_seen(monkeypatch):
    right = stage_function.undo

    def without_reset(x, after, s, *rest, **options):
        return right(x, after, torch.zeros_like(s), *rest, **options)

    monkeypatch.setattr(stage_function, "undo", without_reset)
    verdict = verify(*rebuilt("inverse"))
    assert not verdict.passed
    assert verdict.max_gradient_error > 0.01
    assert str(verdict).startswith("inverse is approximate, NOT equal")


class Noise(nn.Module):
    """Draws random numbers that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.numbers = random.Random(0)

    def forward(self, x, state=None):
        return x + self.numbers.random(), None

    def init_state(self, batch_size, shape, **options):
        return None, shape


def test_a_forward_that_cannot_be_repeated_is_refused():
    blocks = [SpikingConv2d(3, 8), Noise(), SpikingConv2d(8, 8), GlobalAveragePool(), Readout(8, 3)]
    model = use_strategy(SpikingNetwork(blocks, input_shape=(3, 8, 8)), "lean:spikes")
    with pytest.raises(SpikefitError, match="cannot be repeated"):
        verify(model, torch.rand(3, 2, 3, 8, 8))


class Own(nn.Module):
    """A user's module that calls units itself, dense from one to the next, with an operation of its own between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = SpikingConv2d(2, 8, pool="max"), SpikingConv2d(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        s, _ = self.first(x)
        s, _ = self.second(0.5 * s)
        return self.head(s.mean((3, 4)))


def test_own_modules_made_of_units():
    x, y = (2 * dyadic(4, 3, 2, 8, 8)).requires_grad_(), torch.tensor([0, 1, 2])
    found = {}
    for strategy in ("bptt", "lean:spikes", "plan"):
        model = Own()
        use_strategy(model, plan(model, (x.detach(), y), None) if strategy == "plan" else strategy)
        assert model.first.keep == {"bptt": "all"}.get(strategy, model.first.keep)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits.mean(0), y)
        found[strategy] = logits.detach(), torch.autograd.grad(loss, [x, *model.parameters()])
        assert verify(model, (x.detach(), y)).passed
    for logits, gradients in list(found.values())[1:]:
        assert torch.equal(logits, found["bptt"][0])
        for got, wanted in zip(gradients, found["bptt"][1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(StrategyError, match="contains no SpikingNetwork, which checkpoint needs"):
        use_strategy(Own(), "checkpoint")


@pytest.mark.parametrize("strategy", ["bptt", "checkpoint", "step_checkpoint", "step_checkpoint:2"])
def test_blocks_of_plain_layers_and_thresholds_pass(strategy):
    model = use_strategy(plain_network(timesteps=3), strategy)
    x = 2 * torch.rand(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        fired = []
        handle = model.blocks[0].fire.register_forward_hook(lambda m, inputs, spikes: fired.append(spikes.flatten()))
        model(x)
        handle.remove()
    assert len(fired) == 6
    assert 0.1 < float(torch.cat(fired).mean()) < 0.9
    verdict = verify(model, x)
    assert verdict.passed, str(verdict)


class Asked(PlainSteps):
    """Steps that look at the spikes of their last state, which the next piece asks for again."""

    def forward(self, x, state=None):
        logits, state = super().forward(x, state)
        return logits + 0 * self.fire(state[2]).mean(), state


@pytest.mark.parametrize("strategy", ["step_checkpoint:2", "step_checkpoint:3"])
def test_a_state_between_two_pieces_counts_once(strategy):
    model = use_strategy(plain_network(Asked(3)), strategy)
    verdict = verify(model, torch.rand(3, 4, 1, 4, 4))
    assert verdict.passed, str(verdict)


class Unheard(PlainSteps):
    """Steps with one more threshold, whose spikes reach no logits."""

    def __init__(self, timesteps=2):
        super().__init__(timesteps)
        self.unheard = Threshold()

    def forward(self, x, state=None):
        logits, state = super().forward(x, state)
        return logits + 0 * self.unheard(state[2]).mean(), state


@pytest.mark.parametrize("call", [0, 3, None])
def test_a_wrong_spike_of_a_threshold_is_seen(monkeypatch, call):
    """In the first and the last of its calls, and where it changes nothing else."""
    right, calls = Threshold.forward, []
    torch.manual_seed(0)
    model = use_strategy(plain_network(Unheard()), "checkpoint")
    block = model.blocks[0]
    faulty = block.unheard if call is None else block.fire

    def wrong(self, v):
        spikes = right(self, v)
        if self is faulty and model.strategy.name == "checkpoint":
            calls.append(v.shape)
            # the repetition in backward has the same fault, so the strategy itself sees no difference
            if call is None or (len(calls) - 1) % 4 == call:
                return spikes + torch.zeros_like(spikes).index_fill_(0, torch.tensor(1), 1.0) * (1 - 2 * spikes)
        return spikes

    monkeypatch.setattr(Threshold, "forward", wrong)
    verdict = verify(model, torch.rand(2, 3, 1, 4, 4))
    name, flipped = ("blocks.0.unheard", 32) if call is None else ("blocks.0.fire", 32 if call == 0 else 2)
    assert not verdict.passed
    assert not verdict.spikes_equal
    # the wrong spikes of the first call change later ones too
    assert verdict.spikes_differing[name] >= flipped if call == 0 else verdict.spikes_differing == {name: flipped}
    assert f"{name}: {verdict.spikes_differing[name]} spikes differ" in str(verdict)


def test_gradients_of_zero_are_named_as_they_show_little():
    torch.manual_seed(0)
    model = create_model("dmsn_cnn12", widths=(8, 16), depths=(1, 1), input_shape=(3, 16, 16))
    use_strategy(model, "lean")
    x = torch.rand(1, 4, 3, 16, 16)
    found = verify(model, x)
    # the head starts at 0, and so is every gradient in front of it
    assert found.passed
    assert "blocks.1.fc.weight" in found.zero_gradients
    assert "gradients are 0 everywhere" in str(found)
    assert "Verify trained weights" in str(found)
    torch.nn.init.normal_(model.blocks[-1].linear.weight)
    found = verify(model, x)
    assert found.passed
    assert found.zero_gradients == []
    assert "everywhere" not in str(found)
