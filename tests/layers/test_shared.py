"""Stages that share membranes: known answers, one arithmetic in every order, and backwards that rebuild membranes."""

import math
from functools import lru_cache

import pytest
import torch
from torch import nn

from spikefit.errors import StateError, StrategyError
from spikefit.layers import ResidualBlock, SpikingConv2d, SpikingLinear
from spikefit.layers.packed import PackedSpikes
from spikefit.layers.rebuilt import Rebuild, inverse_error, safe_anchor_every
from spikefit.layers.shared import SharedStage
from spikefit.layers.unit import Layer
from spikefit.models import create_model, use_strategy
from spikefit.neurons import LIF, ParametricLIF
from spikefit.ops.lif import lif
from spikefit.ops.lif import reference as lif_reference
from spikefit.ops.lif.equation import Equation
from spikefit.ops.lif.reference import undo
from spikefit.ops.surrogate import atan, rect, sigmoid
from spikefit.planning.memory import saved_bytes
from support import assert_close, assert_same_spikes, dyadic

# input of the four calls, leak 1/4, threshold 1; u, s and v worked out by hand
TRACE = [1.25, 0.75, 1.0, 0.625]
SPIKES = [1, 0, 1, 0]
AFTER = {"soft": [0.25, 0.8125, 0.203125, 0.67578125], "hard": [0, 0.75, 0, 0.625]}
CHARGED = {"soft": [1.25, 0.8125, 1.203125, 0.67578125], "hard": [1.25, 0.75, 1.1875, 0.625]}
# dL/dx of L = sum(s)
KNOWN = [
    ("soft", True, rect(1), [1.328125, 1.3125, 1.25, 1.0]),
    ("soft", False, rect(1), [1.0, 1.0, 1.0, 1.0]),
    ("hard", True, rect(1), [1.0, 1.25, 1.0, 1.0]),
    ("hard", False, rect(1), [0.6737670898, 1.0439453125, 0.703125, 1.0]),
    ("soft", True, atan(2), [0.8561697815, 0.9507332932, 0.8333232986, 0.4908045124]),
    ("soft", False, atan(2), [0.6938785629, 0.7904527258, 0.7461291566, 0.4908045124]),
    ("hard", True, atan(2), [0.6184864582, 0.8040870753, 0.7424024686, 0.4187757051]),
    ("hard", False, atan(2), [0.4821058724, 0.7056223601, 0.6501039963, 0.4187757051]),
]
# which calls are layers, groups of channels and time steps: (layers m, groups n), T = 4 / (m n)
ORDERS = {"none": (1, 1), "layer": (2, 1), "channel": (1, 2), "layer_channel": (2, 2)}
STRATEGIES = {"bptt": None, "replay": Rebuild("replay"), "inverse": Rebuild("inverse", 4), "integer": Rebuild("integer")}


class Calls(nn.Module):
    """m layers that read n channels of the input each, x[m n] in the order of calls, and one that adds up all spikes.

    The sum fires by a slope of 1/16 wherever it may be, and keeps half of its membrane, which `gradient` allows for.
    """

    def __init__(self, layers, groups, **neuron):
        super().__init__()
        self.count, self.groups = layers, groups
        grid = {} if neuron.get("frac_bits") is None else {"frac_bits": neuron["frac_bits"]}
        self.layers = nn.ModuleList(
            SpikingLinear(layers * groups, groups, norm="none", neuron=LIF(tau=4 / 3, groups=groups, **neuron))
            for _ in range(layers)
        )
        self.sum = SpikingLinear(groups, groups, norm="none", neuron=LIF(surrogate=rect(16), **grid))
        with torch.no_grad():
            for i, unit in enumerate(self.layers):
                unit.synapse.weight.zero_()[:, i * groups : (i + 1) * groups].fill_diagonal_(1)
                unit.synapse.bias.zero_()
            self.sum.synapse.weight.copy_(torch.eye(groups))
            self.sum.synapse.bias.zero_()

    def spiking_layers(self):
        both = None if self.count == 1 else 1
        return [*(Layer(unit, 0) for unit in self.layers), Layer(self.sum, self.count, shortcut=both)]

    @staticmethod
    def gradient(spikes):
        """dL/d(output) for L = sum of the spikes of all layers."""
        g = torch.full_like(spikes, 8.0)
        g[-1] = 16
        return g


class CallsInTurn(SharedStage):
    """The layers of `Calls` share one membrane, their sum has its own."""

    @property
    def membranes(self):
        return [0] * (len(self.layers) - 1) + [1]


def run_calls(order, strategy, reset="soft", shared=True, **neuron):
    """(spikes in the order of calls, membranes after every layer and step, gradient of x) of the four calls."""
    layers, groups = ORDERS[order]
    options = {"v_reset": 0.0 if reset == "hard" else None, **neuron}
    options |= {"frac_bits": 16} if strategy == "integer" else {}
    block = Calls(layers, groups, **options)
    stage = (CallsInTurn if shared else SharedStage)([block], one_membrane=shared)
    x = torch.tensor(TRACE).view(-1, 1, layers * groups).requires_grad_()
    seen = []
    for unit in block.layers:
        unit.neuron.register_forward_hook(lambda m, i, out: seen.append((out[0].detach(), out[1].detach())))
    out, state = stage(x, rebuild=STRATEGIES[strategy])
    (gradient,) = torch.autograd.grad(out, x, Calls.gradient(out))
    fired = [s.flatten().tolist() for s, _ in seen]
    return fired, [v.flatten().tolist() for _, v in seen], state, gradient.flatten()


@pytest.mark.parametrize("strategy", ["bptt", "replay"])
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("order", ORDERS)
def test_known_trace_in_every_order_of_calls(order, reset, strategy):
    fired, after, state, _ = run_calls(order, strategy, reset)
    _, groups = ORDERS[order]
    assert sum(fired, []) == SPIKES
    # a neuron with groups shows the membrane behind the last of them
    calls = len(TRACE) // len(after)
    assert sum(after, []) == AFTER[reset][calls - 1 :: calls]
    assert state[0].shape == (1, 1)
    assert state[0].item() == AFTER[reset][-1]
    assert calls == groups


def test_the_counter_check_layers_that_do_not_share():
    fired, after, state, _ = run_calls("layer", "bptt", shared=False)
    # layer 1 gets x_1 and x_3, layer 2 gets x_2 and x_4: u = (1.25, 1.0625) and (0.75, 0.8125)
    assert fired == [[1, 1], [0, 0]]
    assert after == [[0.0625], [0.8125]]
    assert [v.item() for v in state[:2]] == [0.0625, 0.8125]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_gain_below_one_fires_nowhere(order, strategy):
    layers, groups = ORDERS[order]
    grid = {"frac_bits": 16} if strategy == "integer" else {}
    block = Calls(layers, groups, decay_input=False, **grid)
    for unit in block.layers:
        unit.neuron = LIF(tau=4 / 3, decay_input=True, groups=groups, **grid)
        assert unit.neuron.coefficients() == (pytest.approx(0.25), 0.75)
    out, (v, _) = CallsInTurn([block])(
        torch.tensor(TRACE).view(-1, 1, layers * groups), rebuild=STRATEGIES[strategy]
    )
    assert out.sum() == 0
    # rounding (floor of leak v, on the grid) by at most the steps of a call each
    assert v.item() == pytest.approx(0.7060546875, abs=4 / 2**16 if grid else 1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("reset", "detach_reset", "surrogate", "wanted"), KNOWN)
@pytest.mark.parametrize("order", ORDERS)
def test_known_gradients_in_every_order_of_calls(order, reset, detach_reset, surrogate, wanted, strategy):
    neuron = {"detach_reset": detach_reset, "surrogate": surrogate}
    if reset == "hard" and strategy in ("inverse", "integer"):
        with pytest.raises((StrategyError, ValueError), match="soft reset"):
            run_calls(order, strategy, reset, **neuron)
        return
    gradient = run_calls(order, strategy, reset, **neuron)[-1]
    assert_close(gradient, torch.tensor(wanted), 1e-6)


def test_the_inverse_recovers_the_known_trace_exactly():
    options = {"leak": 0.25, "gain": 1.0, "v_threshold": 1.0, "equation": soft()}
    v = torch.tensor([AFTER["soft"][-1]], dtype=torch.float64)
    for k in reversed(range(4)):
        x, s = (torch.tensor([row[k]], dtype=torch.float64) for row in (TRACE, SPIKES))
        assert (v + s).item() == CHARGED["soft"][k]
        v = undo(x, v, s, **options)
        assert v.item() == ([0.0, *AFTER["soft"]])[k]


def soft(**options):
    options = {"v_reset": None, "reset": True, "v_rest": None, "strict": False, "detach_reset": True} | options
    return Equation.make(surrogate=atan(2), **options)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("v_reset", [None, 0.0], ids=["soft", "hard"])
@pytest.mark.parametrize("groups", [2, 4])
def test_channel_groups_are_a_longer_sequence(groups, v_reset, backend):
    """Channel sharing over T steps is a plain neuron over n T steps of slices, bit for bit."""
    T, B, C, H, W = 3, 2, 8, 3, 5
    results = []
    for shared in (True, False):
        x = torch.randn(T, B, C, H, W, generator=torch.Generator().manual_seed(0)).requires_grad_()
        v_0 = dyadic(B, C // groups, H, W, low=0).requires_grad_()
        g = torch.randn(T, B, C, H, W, generator=torch.Generator().manual_seed(1))
        neuron = LIF(tau=4 / 3, v_reset=v_reset, groups=groups if shared else 1, backend=backend)
        if shared:
            spikes, v = neuron(x, v_0)
        else:
            in_turn = x.view(T, B, groups, C // groups, H, W).movedim(2, 1).reshape(T * groups, B, C // groups, H, W)
            spikes, v = neuron(in_turn, v_0)
            spikes = spikes.view(T, groups, B, C // groups, H, W).movedim(1, 2).reshape(T, B, C, H, W)
        results.append((spikes.detach(), v.detach(), *torch.autograd.grad((spikes * g).sum() + v.sum(), [x, v_0])))
    assert_same_spikes(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("strategy", ["bptt", "replay"])
def test_one_group_and_one_layer_are_no_sharing(strategy):
    x = torch.randn(5, 2, 3, 6, 6)
    results = []
    for groups, as_stage in ((1, False), (1, True)):
        torch.manual_seed(0)
        unit = SpikingConv2d(3, 8, norm="step_bn", neuron=LIF(groups=groups), pool="max")
        if as_stage:
            stage = SharedStage([unit], one_membrane=True)
            assert stage.one_membrane is False
            spikes, v = stage(x, rebuild=STRATEGIES[strategy])
        else:
            spikes, v = unit(x)
        gradients = torch.autograd.grad(spikes.square().sum() + v.sum(), list(unit.parameters()))
        results.append([spikes.detach(), v.detach(), *gradients])
    assert 0.05 < results[0][0].mean() < 0.95
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with_one, without = LIF(groups=1), LIF()
    assert all(torch.equal(a, b) for a, b in zip(with_one(x), without(x), strict=True))


MODELS = {
    "vgg16": {"width": 1 / 32, "input_shape": (3, 16, 16)},
    "resnet19": {"width": 1 / 32, "input_shape": (3, 8, 8)},
    "har_mlp": {"hidden": 16, "layers": 3},
}
SHARES = {"none": 1, "layer": 1, "channel": 2, "layer_channel": 2}
NEURONS = {
    "soft": {"name": "lif", "tau": 4 / 3, "v_threshold": 0.5},
    "attached": {"name": "lif", "detach_reset": False, "v_threshold": 0.4, "decay_input": True},
    "hard": {"name": "lif", "v_reset": 0.0, "detach_reset": False, "v_threshold": 0.5},
    "level": {"name": "lif", "v_reset": -0.25, "v_rest": 0.125, "v_threshold": 0.5},
    "learned": {"name": "plif", "decay_input": True, "detach_reset": False, "v_threshold": 0.5},
    "grid": {"name": "lif", "tau": 4 / 3, "frac_bits": 16, "v_threshold": 0.5},
}


def small(name, share, neuron="soft", *, norm="step_bn", dtype=torch.float64, strategy="bptt", **options):
    torch.manual_seed(0)
    model = create_model(
        name, share=share, groups=SHARES[share], neuron=NEURONS[neuron], norm=norm, **MODELS[name], **options
    ).to(dtype)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.add_(0.1 * torch.randn(p.shape))
    return use_strategy(model, strategy)


def leaves(state):
    if isinstance(state, tuple | list):
        return [leaf for entry in state for leaf in leaves(entry)]
    return [] if state is None else [state]


def like(state, values):
    """`state` with its tensors replaced by those that the iterator `values` has."""
    if isinstance(state, tuple):
        return tuple(like(entry, values) for entry in state)
    return None if state is None else next(values)


@lru_cache(maxsize=200)
def step_of(name, share, neuron, strategy, *, norm="step_bn", T=4, B=2, dtype=torch.float64, pieces=1, autocast=False):
    """One step from random membranes: logits and last membranes, gradients by name, buffers."""
    model = small(name, share, neuron, norm=norm, dtype=dtype, strategy=strategy)
    torch.manual_seed(1)
    x = torch.randn(T, B, *model.input_shape, dtype=dtype, requires_grad=True)
    state = model.init_state(B)
    start = [dyadic(*v.shape, low=0, high=0.5, seed=i).to(v.dtype).requires_grad_() for i, v in enumerate(leaves(state))]
    state, outs = like(state, iter(start)), []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for part in x.chunk(pieces):
            logits, state = model.run(part, state)
            outs.append(logits)
    outs = [torch.cat(outs), *leaves(state)]
    torch.manual_seed(2)
    loss = sum((out.to(dtype) * torch.randn(out.shape, dtype=dtype)).sum() for out in outs)
    inputs = {"x": x} | {f"v_0 {i}": v for i, v in enumerate(start)} | dict(model.named_parameters())
    gradients = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    return [out.detach() for out in outs], gradients, {k: b.clone() for k, b in model.named_buffers()}


def assert_same_step(got, wanted, tolerance):
    """Outputs, last membranes and buffers bit for bit; every gradient within `tolerance` of its largest value."""
    for a, b in zip(got[0], wanted[0], strict=True):
        assert torch.equal(a, b)
    for key, buffer in wanted[2].items():
        assert torch.equal(got[2][key], buffer), key
    assert got[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert gradient.abs().max() > 0, f"{key}: a zero gradient proves nothing"
        scale = gradient.abs().max()
        assert_close(got[1][key] / scale, gradient / scale, tolerance, key)


EXACT = {
    "har_mlp": [
        *[("replay", neuron) for neuron in NEURONS],
        *[(f"inverse:{every}", neuron) for every in (1, 2, 3, 4) for neuron in ("soft", "attached")],
        ("integer", "grid"),
    ],
    "vgg16": [("replay", "soft"), ("replay", "hard"), ("inverse:4", "attached"), ("integer", "grid")],
    "resnet19": [("replay", "attached"), ("replay", "learned"), ("inverse:4", "soft"), ("integer", "grid")],
}


@pytest.mark.parametrize(
    ("name", "strategy", "neuron"), [(name, *case) for name, cases in EXACT.items() for case in cases]
)
@pytest.mark.parametrize("share", SHARES)
def test_a_step_equals_that_of_bptt(share, name, strategy, neuron):
    options = {"T": 5 if name == "har_mlp" else 3}
    wanted = step_of(name, share, neuron, "bptt", **options)
    assert_same_step(step_of(name, share, neuron, strategy, **options), wanted, 1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_the_neurons_of_these_steps_fire(share):
    for name, cases in EXACT.items():
        for neuron in {neuron for _, neuron in cases}:
            model, rates = small(name, share, neuron), []
            for module in model.modules():
                if isinstance(module, LIF | ParametricLIF):
                    module.register_forward_hook(lambda m, i, out: rates.append(float(out[0].mean())))
            model(torch.randn(5, 2, *model.input_shape, dtype=torch.float64))
            assert 0.1 < sum(rates) / len(rates) < 0.7, (name, neuron)


@pytest.mark.parametrize(("strategy", "neuron"), [("replay", "soft"), ("inverse:3", "soft"), ("integer", "grid")])
@pytest.mark.parametrize("share", SHARES)
def test_pieces_of_a_sequence_equal_the_whole(share, strategy, neuron):
    """Gradients flow from piece to piece through the membranes."""
    wanted = step_of("har_mlp", share, neuron, "bptt", T=6)
    got = step_of("har_mlp", share, neuron, strategy, T=6, pieces=3)
    for a, b in zip(got[0], wanted[0], strict=True):
        assert torch.equal(a, b)
    assert_same_step(got, step_of("har_mlp", share, neuron, "bptt", T=6, pieces=3), 1e-10)
    for key, gradient in wanted[1].items():
        assert_close(got[1][key], gradient, 1e-10, key)


@pytest.mark.parametrize(("strategy", "neuron"), [("replay", "hard"), ("inverse:2", "soft"), ("integer", "grid")])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (7, 1)])
@pytest.mark.parametrize("share", SHARES)
def test_one_step_and_one_sample(share, T, B, strategy, neuron):
    options = {"norm": "ws", "T": T, "B": B}  # a norm of one value has no variance
    wanted = step_of("har_mlp", share, neuron, "bptt", **options)
    assert_same_step(step_of("har_mlp", share, neuron, strategy, **options), wanted, 1e-10)


@pytest.mark.parametrize("share", ["none", "channel"])
def test_replay_takes_norms_over_the_sequence(share):
    for norm in ("bn", "tdbn"):
        wanted = step_of("har_mlp", share, "soft", "bptt", norm=norm)
        assert_same_step(step_of("har_mlp", share, "soft", "replay", norm=norm), wanted, 1e-10)


@pytest.mark.parametrize(("strategy", "neuron"), [("replay", "soft"), ("inverse:4", "soft"), ("integer", "grid")])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["vgg16", "har_mlp"])
def test_single_precision(name, share, strategy, neuron):
    """On the grid rounding of a recomputed current would grow with every call; that there is none shows here."""
    options = {"T": 8 if name == "har_mlp" else 5, "dtype": torch.float32}
    wanted = step_of(name, share, neuron, "bptt", **options)
    tolerance = 2e-3 if strategy == "inverse:4" else 2e-5
    assert_same_step(step_of(name, share, neuron, strategy, **options), wanted, tolerance)


@pytest.mark.parametrize(("strategy", "neuron"), [("replay", "soft"), ("inverse:4", "soft"), ("integer", "grid")])
@pytest.mark.parametrize("share", SHARES)
def test_under_autocast_the_casts_are_repeated(share, strategy, neuron):
    options = {"T": 3, "dtype": torch.float32, "autocast": True}
    for name in ("har_mlp", "vgg16"):
        wanted = step_of(name, share, neuron, "bptt", **options)
        plain = step_of(name, share, neuron, "bptt", **options | {"autocast": False})
        assert not torch.equal(wanted[0][0], plain[0][0]), "autocast must show"
        tolerance = 5e-3 if strategy == "inverse:4" else 1e-3
        assert_same_step(step_of(name, share, neuron, strategy, **options), wanted, tolerance)
