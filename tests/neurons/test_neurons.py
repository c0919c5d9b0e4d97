"""Neurons: their equations, learnable time constant, read-out, names and refusals."""

import math

import pytest
import torch

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.neurons import IF, LIF, LeakyReadout, ParametricLIF, create_neuron


def current(T=9, B=3, N=17):
    torch.manual_seed(0)
    return torch.randint(-8, 24, (T, B, N)) / 16


def by_hand(x, leak, gain, v_threshold=1.0, v_reset=None):
    v, spikes = torch.zeros_like(x[0]), []
    for x_t in x:
        u = leak * v + gain * x_t
        s = (u >= v_threshold).float()
        v = u - v_threshold * s if v_reset is None else torch.where(s > 0, torch.full_like(u, v_reset), u)
        spikes.append(s)
    return torch.stack(spikes), v


@pytest.mark.parametrize(
    ("neuron", "leak", "gain", "v_reset"),
    [
        (LIF(), 0.5, 1.0, None),
        (LIF(tau=4.0, decay_input=True, v_threshold=0.25), 0.75, 0.25, None),
        (LIF(tau=2.0, v_threshold=0.5, v_reset=0.0), 0.5, 1.0, 0.0),
        (LIF(tau=1.0), 0.0, 1.0, None),
        (IF(), 1.0, 1.0, None),
        (ParametricLIF(tau=2.0), 0.5, 1.0, None),
        (ParametricLIF(tau=2.0, decay_input=True, v_threshold=0.5), 0.5, 0.5, None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else str(v),
)
def test_equation(neuron, leak, gain, v_reset):
    x = current()
    spikes, v = neuron(x)
    wanted, wanted_v = by_hand(x, leak, gain, neuron.v_threshold, v_reset)
    assert 0.05 < spikes.mean() < 0.95
    assert torch.equal(spikes, wanted)
    assert torch.equal(v, wanted_v)


def test_state_goes_in_and_comes_out():
    neuron, x = LIF(tau=4.0), current()
    whole, v_T = neuron(x)
    first, v = neuron(x[:4])
    second, v = neuron(x[4:], v)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v, v_T)
    assert not list(neuron.state_dict())
    with pytest.raises(StateError, match=r"expected a membrane \(3, 17\)"):
        neuron(x, torch.zeros(2, 17))


def test_time_constant_is_learnt_as_autograd_would():
    pytest.importorskip("numba", reason="numba is not installed")
    x = current().double()
    gradients = []
    for backend in ("numba", "reference"):
        neuron = ParametricLIF(tau=3.0, decay_input=True, backend=backend).double()
        assert math.isclose(neuron.tau, 3.0, rel_tol=1e-6)
        neuron(x)[0].mul(torch.arange(17)).sum().backward()
        gradients.append(float(neuron.w.grad))
    assert gradients[0] != 0
    assert math.isclose(*gradients, rel_tol=1e-10)
    assert list(ParametricLIF().state_dict()) == ["w"]


def test_readout_integrates_and_keeps_the_membrane():
    readout, x = LeakyReadout(tau=4.0, decay_input=True), current()
    out, v = readout(x)
    wanted = torch.zeros_like(x[0])
    for t in range(9):
        wanted = 0.75 * wanted + 0.25 * x[t]
        assert torch.equal(out[t], wanted)
    assert torch.equal(v, wanted)
    _, v = readout(x[:5])
    assert torch.equal(readout(x[5:], v)[0], out[5:])
    total, _ = LeakyReadout(tau=math.inf)(x)
    assert torch.equal(total[-1], x.sum(0))
    assert torch.autograd.gradcheck(lambda x: readout(x)[0], current(3, 2, 2).double().requires_grad_())


def test_names():
    assert isinstance(create_neuron("if"), IF)
    neuron = create_neuron("lif", tau=1.5, v_reset="soft", surrogate="triangle(0.5)")
    assert (neuron.tau, neuron.v_reset, str(neuron.surrogate)) == (1.5, None, "triangle(0.5)")
    with pytest.raises(OptionError, match="Did you mean plif"):
        create_neuron("plf")
    with pytest.raises(OptionError, match=r"unknown option taau; known: .*tau"):
        create_neuron("lif", taau=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LIF(tau=0.5), "tau must be at least 1 step"),
        (lambda: LIF(tau=math.nan), "tau must be at least 1 step"),
        (lambda: ParametricLIF(tau=1.0), "above 1 step"),
        (lambda: LIF(v_threshold=0.0), "v_threshold must be a finite number > 0"),
        (lambda: LIF(reset=False, v_reset=0.0), "exclude each other"),
        (lambda: LIF(v_reset="soft"), r"LIF: v_reset must be a finite number or None, got 'soft'\. .* v_reset=None"),
        (lambda: LIF(v_reset=math.nan), "v_reset must be a finite number or None, got nan"),
        (lambda: IF(v_rest=math.inf), "v_rest must be a finite number or None"),
        (lambda: LIF(surrogate="atn(2)"), "did you mean atan"),
        (lambda: LIF(surrogate=None), "expected text such as 'atan\\(2\\)', or a Surrogate, got None"),
        (lambda: LIF(backend="cuda"), "expected one of auto, reference, numba, triton"),
        (lambda: LeakyReadout(tau=0.1), "at least 1 step"),
    ],
)
def test_refuses_options(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_refuses_shapes():
    with pytest.raises(ShapeError, match="at least one time step"):
        LIF()(torch.zeros(0, 2, 3))
    with pytest.raises(ShapeError, match="floating point"):
        LIF()(torch.zeros(2, 2, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\[T, B, K\]"):
        LeakyReadout()(torch.zeros(3))
    with pytest.raises(StateError, match="expected a membrane"):
        LeakyReadout()(torch.zeros(2, 2, 3), torch.zeros(1, 3))
