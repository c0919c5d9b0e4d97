"""Lean units: outputs of the plain unit bit for bit, its gradients, and a fraction of the bytes."""

import pytest
import torch
from torch import nn

from spikefit.errors import StateError, StrategyError
from spikefit.layers import SpikingConv1d, SpikingConv2d, SpikingLinear
from spikefit.layers.packed import PackedSpikes
from spikefit.neurons import LIF, ParametricLIF
from support import dyadic, saved_bytes

KEEPS = ["input", "spikes"]
UNITS = {
    "conv": (lambda **o: SpikingConv2d(3, 8, **o), (3, 6, 6)),
    "conv, odd": (lambda **o: SpikingConv2d(3, 5, 3, stride=2, padding=0, dilation=2, **o), (3, 11, 9)),
    "conv, groups": (lambda **o: SpikingConv2d(4, 8, groups=2, **o), (4, 5, 7)),
    "conv, wide input": (lambda **o: SpikingConv2d(16, 4, **o), (16, 6, 6)),
    "conv 1x1, strided": (lambda **o: SpikingConv2d(6, 8, 1, stride=2, **o), (6, 7, 7)),
    "conv, max pool": (lambda **o: SpikingConv2d(3, 8, pool="max", **o), (3, 7, 6)),
    "conv, mean pool": (lambda **o: SpikingConv2d(3, 8, pool="avg", **o), (3, 6, 7)),
    "line": (lambda **o: SpikingConv1d(3, 8, pool="max", **o), (3, 9)),
    "time": (lambda **o: SpikingConv1d(3, 8, over="time", **o), (3,)),
    "dense": (lambda **o: SpikingLinear(5, 11, **o), (5,)),
}
OPTIONS = {
    "batch norm": {},
    "norm per step": {"norm": "step_bn"},
    "no norm": {"norm": "none"},
    "standardised": {"norm": "ws"},
    "hard, attached": {"neuron": LIF(v_reset=0.0, detach_reset=False)},
    "no reset": {"neuron": LIF(reset=False)},
    "learned leak": {"neuron": ParametricLIF(decay_input=True, detach_reset=False)},
    "chunks": {"chunk": 2},
}


def run(name, option, keep, *, T=4, B=3, dtype=torch.float64, training=True, requires_grad=True, state=True):
    """One step of a unit: everything that comes out of it, by name."""
    make, shape = UNITS[name]
    torch.manual_seed(0)
    unit = make(**OPTIONS[option]).to(dtype).train(training)
    for buffer in unit.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.25)
    unit.keep = keep
    x = (2 * dyadic(T, B, *shape, low=-2)).to(dtype).requires_grad_(requires_grad)
    first = unit.init_state(B, shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)[0]
    v_0 = dyadic(*first.shape, low=0, high=0.5, seed=1).to(first.dtype).requires_grad_() if state else None
    spikes, v_T = unit(x, v_0)
    torch.manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum() for y in (spikes, v_T))
    inputs = {"x": x} if requires_grad else {}
    inputs |= ({"v_0": v_0} if state else {}) | dict(unit.named_parameters())
    gradients = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    return {"spikes": spikes.detach(), "v_T": v_T.detach()}, gradients, dict(unit.named_buffers())


def assert_same(got, wanted, tolerance):
    assert 0.02 < wanted[0]["spikes"].mean() < 0.97
    for name in ("spikes", "v_T"):
        assert torch.equal(got[0][name], wanted[0][name]), name
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            got[1][name],
            gradient,
            rtol=tolerance,
            atol=tolerance * float(gradient.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, buffer in wanted[2].items():
        assert torch.equal(got[2][name], buffer), name


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", UNITS)
def test_equals_the_plain_unit(name, option, keep):
    if name == "time" and option == "chunks":
        pytest.skip("this unit has no such option")
    assert_same(run(name, option, keep), run(name, option, "all"), 1e-10)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (16, 1)])
@pytest.mark.parametrize("name", ["conv, max pool", "dense"])
def test_one_step_and_one_sample(name, T, B, keep):
    for option in ("batch norm", "no norm") if T * B > 1 else ("no norm",):
        assert_same(run(name, option, keep, T=T, B=B), run(name, option, "all", T=T, B=B), 1e-10)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv, max pool", "conv, mean pool", "dense", "line"])
def test_lower_precision(name, dtype, keep):
    options = {"dtype": dtype, "state": dtype == torch.float32}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same(run(name, "batch norm", keep, **options), run(name, "batch norm", "all", **options), tolerance)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("option", ["batch norm", "no norm"])
def test_evaluation_and_inputs_without_gradient(option, keep):
    for options in ({"training": False}, {"requires_grad": False, "state": False}):
        assert_same(run("conv", option, keep, **options), run("conv", option, "all", **options), 1e-10)


@pytest.mark.parametrize("keep", KEEPS)
def test_repeated_input_is_computed_once(keep):
    results = []
    for choice in ("all", keep):
        torch.manual_seed(0)
        unit = SpikingConv2d(3, 8, pool="max").double()
        unit.keep = choice
        image = dyadic(1, 2, 3, 6, 6).double().requires_grad_()
        spikes, _ = unit(image.expand(5, *image.shape[1:]))
        gradients = torch.autograd.grad(spikes.square().sum() + spikes[1].sum(), [image, *unit.parameters()])
        results.append(({"spikes": spikes.detach(), "v_T": _}, dict(enumerate(gradients)), dict(unit.named_buffers())))
    assert_same(results[1], results[0], 1e-10)


def held_per_neuron_step(make, keep, space, dtype=torch.float32):
    """Bytes kept per neuron-step of a unit, as a slope in T; its input is packed and belongs to the unit before."""

    def held(T):
        unit = make()
        unit.keep = keep
        first = SpikingConv2d(2, 8)
        first.keep = "spikes"
        x, _ = first(torch.randn(T, 2, 2, *space), packed=True)
        return saved_bytes(lambda: unit(x, packed=True))

    return (held(12) - held(4)) / 8 / (2 * 8 * space[0] * space[1])


def test_bytes_per_neuron_step():
    # own bits 1/8 and borrowed bits 1/8, which the unit before owns
    assert held_per_neuron_step(lambda: SpikingConv2d(8, 8), "spikes", (8, 8)) == 0.25
    assert held_per_neuron_step(lambda: SpikingConv2d(8, 8), "input", (8, 8)) == 4.25
    assert held_per_neuron_step(lambda: SpikingConv2d(8, 8, pool="max"), "spikes", (8, 8)) == 0.25


def test_contract():
    unit = SpikingConv2d(3, 8)
    unit.keep = "spikes"
    x = torch.randn(2, 2, 3, 6, 6, requires_grad=True)
    spikes, _ = unit(x)
    with pytest.raises(StrategyError, match="no second derivative"):
        torch.autograd.grad(spikes.sum(), x, create_graph=True)
    # a graph that is kept gives the same gradient twice
    spikes, _ = unit(x)
    once, twice = (torch.autograd.grad(spikes.sum(), [x, *unit.parameters()], retain_graph=True) for _ in range(2))
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)
    # an unused result has no gradient
    assert unit(x)[1].sum().backward() is None
    with pytest.raises(StateError, match="membrane"):
        unit(x, torch.zeros(3, 8, 6, 6))


def test_dense_hand_over_finds_the_bits_again():
    first, second = SpikingConv2d(3, 8), SpikingConv2d(8, 8)
    for unit in (first, second):
        unit.keep = "spikes"
    x = torch.randn(4, 2, 3, 8, 8)
    spikes, _ = first(x)
    assert saved_bytes(lambda: second(spikes)) < spikes.numel()
    touched, _ = first(x)
    touched.mul_(1)
    assert saved_bytes(lambda: second(touched)) > 4 * spikes.numel()
    seen = []
    hooked, _ = first(x)
    hooked.register_hook(lambda g: seen.append(g.shape))
    second(hooked)[0].sum().backward()
    assert seen == [hooked.shape]


def test_refuses_what_it_cannot_rebuild():
    class Own(LIF):
        def forward(self, x, v_0=None):
            return super().forward(2 * x, v_0)

    unit = SpikingConv2d(3, 8, neuron=Own())
    unit.keep = "spikes"
    with pytest.raises(StrategyError, match="Own has a forward of its own"):
        unit(torch.randn(2, 2, 3, 6, 6))
    unit = SpikingConv2d(3, 8)
    unit.norm, unit.keep = nn.Identity(), "spikes"
    with pytest.raises(StrategyError, match="Identity is a norm"):
        unit(torch.randn(2, 2, 3, 6, 6))


def test_packed_spikes_read_like_the_dense_ones():
    for pool in (None, "max", "avg"):
        unit = SpikingConv2d(3, 9, pool=pool)
        x = torch.randn(3, 2, 3, 7, 6)
        wanted, _ = unit(x)
        unit.keep = "spikes"
        packed, _ = unit(x, packed=True)
        assert isinstance(packed, PackedSpikes)
        assert packed.shape == wanted.shape
        assert torch.equal(packed.dense(), wanted)
        assert torch.equal(packed.flatten().dense(), wanted.flatten(2))
        assert torch.equal(packed.mean_over_space(), wanted.mean((3, 4)))
        assert torch.equal(packed.steps(1, 3), wanted[1:3])
