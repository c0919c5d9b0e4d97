"""verify: passes on every exact strategy, and each planted fault turns its verdict."""

import random

import pytest
import torch
from torch import nn

from spikefit.errors import SpikefitError
from spikefit.layers import BatchNorm, GlobalAveragePool, Readout, SpikingConv2d, lean, packed
from spikefit.models import SpikingNetwork, create_model, use_strategy
from spikefit.planning import plan, verify

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
