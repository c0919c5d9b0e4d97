"""Gradients of the rules: by hand, by sums over steps, against BPTT where they are exact, and where they are not."""

from itertools import combinations

import pytest
import torch
from reference import (
    Dense,
    Quadratic,
    bptt,
    dense_net,
    error,
    gradients,
    gradients_by_sums,
    ottt_by_record,
    sample,
)
from torch import nn

from spikefit.layers import (
    BatchNorm,
    Flatten,
    GlobalAveragePool,
    Readout,
    ResidualBlock,
    SpikingConv1d,
    SpikingConv2d,
    SpikingLinear,
)
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.rules import TraceRule, drive, ndot, ottt, sltt, tbptt
from spikefit.rules.sequence import Sequence
from spikefit.rules.step import Trace

EXACT = 1e-12
LOSS = Quadratic()
RESETS = [{"v_reset": v, "detach_reset": d} for v in (None, 0.0) for d in (True, False)]


class Given:
    """A sampler that takes the steps it was given."""

    def __init__(self, *steps):
        self.steps = steps

    def draw(self, timesteps, generator=None):
        return self.steps


class MeanLogit(Loss):
    splits_per_step = True

    def __call__(self, logits, targets):
        return logits.mean()

    def step(self, logits_t, targets, *, labels=None):
        return logits_t.mean()


def run(net, x, y, rule, loss=LOSS, **options):
    net.zero_grad()
    drive(net, x, y, loss, rule, **options)
    return gradients(net)


def one_neuron(detach_reset=True):
    net = dense_net((1, 1), 1, tau=2.0, surrogate="triangle(1)", detach_reset=detach_reset)
    unit, head = net.blocks[0].synapse, net.blocks[1].linear
    with torch.no_grad():
        for parameter, value in ((unit.weight, 0.6), (unit.bias, 0), (head.weight, 1), (head.bias, 0)):
            parameter.fill_(value)
    return net


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (ottt(), 1.2041667),
        (ottt(trace_first=False), 0.8166667),
        (ndot(), 1.2041667),
        (sltt(), 0.8166667),
        (tbptt(1), 0.8166667),
        (tbptt(2), 0.9666667),
        (tbptt(3), 1.2041667),
        (TraceRule(sampler=Given(2), loss_norm="T"), 0.3166667),
        (TraceRule(sampler=Given(2)), 0.95),
        (sltt(grad_scale=2.0), 2 * 0.8166667),
    ],
)
def test_one_neuron_by_hand(rule, wanted, static):
    # i = 1, W = 0.6, leak 1/2: u = 0.6, 0.9, 1.05, slopes 0.6, 0.9, 0.95; as i = 1 the bias has the same gradient
    x = torch.ones(1, 1, 1, dtype=torch.float64).expand(3, 1, 1)
    got = run(one_neuron(), x if static else x.contiguous(), torch.zeros(1, dtype=torch.int64), rule, MeanLogit())
    assert float(got["blocks.0.synapse.weight"]) == pytest.approx(wanted, abs=1e-7)
    assert float(got["blocks.0.synapse.bias"]) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(("detach_reset", "wanted"), [(True, 1.2041667), (False, 0.8956667)])
def test_bptt_of_one_neuron_by_hand(detach_reset, wanted):
    x = torch.ones(3, 1, 1, dtype=torch.float64)
    got = bptt(one_neuron(detach_reset), x, torch.zeros(1, dtype=torch.int64), MeanLogit())
    assert float(got["blocks.0.synapse.weight"]) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("rule", [sltt(), ottt(), ndot(), ndot(lag=1), tbptt(1), tbptt(4)], ids=lambda r: r.name)
def test_one_step_is_bptt(rule):
    net, (x, y) = dense_net((7, 8, 6, 5), tau=2.0, v_threshold=0.4), sample(T=1)
    assert error(run(net, x, y, rule), bptt(net, x, y, LOSS)) <= EXACT


@pytest.mark.parametrize(
    ("rule", "reset"),
    [(rule, reset) for rule in (sltt(), ottt()) for reset in RESETS] + [(ndot(), reset) for reset in RESETS[:2]],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_without_leak_a_rule_is_bptt(rule, reset):
    net, (x, y) = dense_net((7, 8, 6, 5), tau=1.0, **reset), sample()
    assert error(run(net, x, y, rule), bptt(net, x, y, LOSS)) <= EXACT


ONE_LAYER = {
    "plain": {"tau": 2.0},
    "gain 0.3": {"tau": 1 / 0.3, "decay_input": True, "v_threshold": 0.6},
    "weight standardisation": {"norm": "ws"},
    "learned leak": {"name": "plif", "tau": 1.7},
    "learned leak and gain": {"name": "plif", "tau": 1.7, "decay_input": True, "v_threshold": 0.6},
    "learned leak, rest": {"name": "plif", "tau": 1.7, "v_rest": 0.25},
}


@pytest.mark.parametrize("options", ONE_LAYER.values(), ids=list(ONE_LAYER))
def test_ottt_of_one_layer_is_bptt(options):
    net, (x, y) = dense_net((7, 8), **options), sample()
    wanted = bptt(net, x, y, LOSS)
    assert error(run(net, x, y, ottt()), wanted) <= EXACT
    assert error(run(net, x, y, sltt()), wanted, "blocks.0") > 0.1


def frozen(net):
    """`net` with running statistics other than 0 and 1, and norms that use them."""
    for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(0.0, 0.5)
        norm.eval()
    return net


def conv_net(norm, neuron=None, **head):
    torch.manual_seed(0)
    neuron = neuron or {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)"}
    unit = SpikingConv2d(2, 4, 3, norm=norm, neuron=neuron, pool="avg")
    net = SpikingNetwork([unit, GlobalAveragePool(), Readout(4, 3, **head)], input_shape=(2, 6, 6)).double()
    with torch.no_grad():
        unit.synapse.weight.mul_(3)
    return net


@pytest.mark.parametrize("norm", ["none", "ws", "step_bn"])
def test_ottt_of_one_convolution_is_bptt_behind_frozen_norms_too(norm):
    net, (x, y) = frozen(conv_net(norm)), sample(shape=(2, 6, 6))
    wanted = bptt(net, x, y, LOSS)
    assert error(run(net, x, y, ottt()), wanted) <= EXACT
    assert error(run(net, x, y, sltt()), wanted, "blocks.0") > 0.1


def test_ottt_of_a_frozen_norm_on_dense_layers_is_bptt():
    net, (x, y) = frozen(dense_net((7, 8), norm="step_bn")), sample()
    assert error(run(net, x, y, ottt()), bptt(net, x, y, LOSS)) <= EXACT


@pytest.mark.parametrize(
    "options",
    [{"v_reset": 0.0}, {"detach_reset": False}, {"v_reset": 0.0, "detach_reset": False}, {"head_tau": 4.0}],
    ids=str,
)
def test_ottt_is_not_bptt_elsewhere(options):
    net, (x, y) = dense_net((7, 8), tau=2.0, **options), sample()
    assert error(run(net, x, y, ottt()), bptt(net, x, y, LOSS), "blocks.0") > 0.1


def test_ottt_of_a_leaky_readout_is_exact_for_its_own_weights():
    net, (x, y) = dense_net((7, 8), tau=2.0, head_tau=4.0), sample()
    assert error(run(net, x, y, ottt()), bptt(net, x, y, LOSS), "blocks.1") <= EXACT


def test_ottt_is_exact_for_the_last_layer_alone():
    net, (x, y) = dense_net((7, 8, 6), tau=2.0), sample()
    got, wanted = run(net, x, y, ottt()), bptt(net, x, y, LOSS)
    assert error(got, wanted, "blocks.1") <= EXACT
    assert error(got, wanted, "blocks.2") <= EXACT
    assert error(got, wanted, "blocks.0") > 0.01


MIXED = [{"tau": 1.25}, {"tau": 4.0, "v_threshold": 0.75}, {"tau": 2.0, "decay_input": True, "v_threshold": 0.5}]


@pytest.mark.parametrize(
    ("rule", "lag"), [(sltt(), 0), (ottt(), 0), (ndot(), 0), (ndot(lag=1), 1)], ids=["sltt", "ottt", "ndot", "ndot lag"]
)
def test_rules_are_their_equations_with_leaks_of_each_layer(rule, lag):
    net, (x, y) = dense_net((7, 8, 6, 5), neurons=MIXED, surrogate="atan(2)"), sample()
    *units, head = net.blocks
    layers = [
        Dense(u.synapse.weight.detach(), u.synapse.bias.detach(), *u.neuron.coefficients(), u.neuron.v_threshold)
        for u in units
    ]
    out = head.linear.weight.detach(), head.linear.bias.detach()
    sums = gradients_by_sums(layers, out, x, y, rule.name, surrogate="atan(2)", lag=lag)
    paths = [f"blocks.{i}.synapse" for i in range(3)] + ["blocks.3.linear"]
    wanted = {f"{path}.weight": dW for path, (dW, _) in zip(paths, sums, strict=True)}
    wanted |= {f"{path}.bias": db for path, (_, db) in zip(paths, sums, strict=True)}
    assert error(run(net, x, y, rule), wanted) <= EXACT


def test_the_rules_with_traces_differ():
    net, (x, y) = dense_net((7, 8, 6, 5), neurons=MIXED), sample()
    found = [run(net, x, y, rule) for rule in (sltt(), ottt(), ndot(), ndot(lag=1), ottt(trace_first=False))]
    for one, other in combinations(found, 2):
        assert error(one, other, "synapse") > 0.01
    # the last one leaves the first synapse as sltt does, and all others as ottt
    assert error(found[4], found[0], "blocks.0") <= EXACT
    assert error(found[4], found[1], "blocks.1") <= EXACT


def wide_net(kind, norm):
    """Small networks of every synapse, with residual blocks: several synapses read one input."""
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 1.6, "surrogate": "sigmoid(4)"}
    slow = {**neuron, "tau": 3.0, "v_threshold": 0.5}
    if kind == "conv1d":
        first = SpikingConv1d(2, 4, 3, stride=2, dilation=2, padding=2, norm=norm, neuron=neuron)
        blocks, shape = [first, SpikingConv1d(4, 4, 1, stride=2, groups=2, padding=0, norm=norm, neuron=slow)], (2, 12)
    elif kind == "residual":
        blocks = [
            SpikingConv2d(2, 4, norm=norm, neuron=slow, pool="max"),
            ResidualBlock(4, 6, stride=2, norm=norm, neuron=neuron),
        ]
        shape = (2, 8, 8)
    else:
        blocks, shape = [SpikingConv2d(2, 3, norm=norm, neuron=neuron), Flatten()], (2, 4, 4)
        blocks.append(SpikingLinear(48, 4, norm=norm, neuron=slow))
    head = (
        [Readout(4, 3)]
        if kind == "dense"
        else [GlobalAveragePool(), Readout(blocks[-1].spiking_layers()[-1].unit.synapse.weight.shape[0], 3)]
    )
    net = SpikingNetwork([*blocks, *head], input_shape=shape).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) and norm == "none":
                module.weight.mul_(2.5)
    return net, shape


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("norm", ["none", "ws", "step_bn"])
@pytest.mark.parametrize("kind", ["conv1d", "residual", "dense"])
def test_ottt_of_every_synapse_is_the_sum_of_what_was_recorded(kind, norm, static):
    net, shape = wide_net(kind, norm)
    x, y = sample(T=5, shape=shape)
    if static:
        x = torch.rand(1, *x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=x.dtype).expand_as(x)
    wanted = ottt_by_record(net, x, y, LOSS)
    got = run(net, x, y, ottt())
    assert wanted.keys() == got.keys()
    for name in wanted:
        # behind statistics of each step the bias of a synapse does nothing, and its gradient is rounding
        assert (got[name] - wanted[name]).norm() <= EXACT * max(1, wanted[name].norm()), name
    assert max(g.norm() for g in wanted.values()) > 0.01


class Fork(nn.Module):
    """Two units that read one input; their spikes are added."""

    def __init__(self, *neurons):
        super().__init__()
        self.units = nn.ModuleList(SpikingLinear(7, 8, norm="none", neuron=neuron) for neuron in neurons)

    def forward(self, x, state=None):
        outs = [unit(x, v) for unit, v in zip(self.units, state or (None, None), strict=True)]
        return sum(s for s, _ in outs), tuple(v for _, v in outs)

    def init_state(self, batch_size, shape, **options):
        return None, (8,)


def forked(*neurons):
    torch.manual_seed(0)
    return SpikingNetwork([Fork(*neurons), Readout(8, 3)], input_shape=(7,)).double()


FAST, SLOW = {"name": "lif", "tau": 1.5, "v_threshold": 0.3}, {"name": "lif", "tau": 4.0, "v_threshold": 0.3}
LEARNED = [{"name": "plif", "tau": tau, "v_threshold": 0.3} for tau in (1.5, 4.0)]


@pytest.mark.parametrize("neurons", [(FAST, SLOW), (FAST, FAST), LEARNED], ids=["mixed", "equal", "learned"])
def test_two_synapses_that_read_one_input(neurons):
    net, (x, y) = forked(*neurons), sample()
    assert error(run(net, x, y, ottt()), bptt(net, x, y, LOSS)) <= EXACT


def test_synapses_of_one_input_and_one_leak_share_a_trace():
    def traces_of(*neurons, change=False):
        net, (x, _) = forked(*neurons), sample(T=3)
        sequence, state, traces = Sequence(net, ottt(), x), net.init_state(4), {}
        for t, x_t in enumerate(x):
            if change and t == 2:
                traces[paths[1]] = Trace(traces[paths[1]].a + 1, 1.0)
            _, state, traces = sequence.step(x_t, state, traces)
        return [traces[path].a for path in paths]

    paths = [f"blocks.0.units.{i}.synapse" for i in range(2)]
    one, other = traces_of(FAST, FAST)
    assert one is other
    one, other = traces_of(FAST, SLOW)
    assert not torch.equal(one, other)
    # traces are values: those that were handed in count, not what another synapse makes of its own
    one, other = traces_of(FAST, FAST, change=True)
    torch.testing.assert_close(other - one, torch.full_like(one, 1 / 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [9, 20])
def test_a_window_of_all_steps_is_bptt(window):
    net, (x, y) = dense_net((7, 8, 6), tau=2.0, detach_reset=False), sample()
    assert error(run(net, x, y, tbptt(window)), bptt(net, x, y, LOSS)) <= EXACT


def test_windows_are_bptt_of_each_with_the_state_cut():
    net, (x, y) = dense_net((7, 8, 6), tau=2.0), sample()
    got = run(net, x, y, tbptt(4))
    state = net.init_state(4)
    for part in x.split(4):
        logits, state = net.run(part, tuple(v if v is None else v.detach() for v in state))
        (LOSS(logits, y) * len(part) / 9).backward()
    wanted = gradients(net)
    assert error(got, wanted) <= EXACT
    assert error(got, bptt(net, x, y, LOSS)) > 0.01


@pytest.mark.parametrize("make", [sltt, ottt], ids=["sltt", "ottt"])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_the_mean_over_all_sets_of_k_steps_is_the_gradient_of_all(K, make):
    net, (x, y) = dense_net((7, 8, 6), tau=2.0), sample(T=5)
    wanted = run(net, x, y, make())
    for loss_norm, factor in (("K", 1), ("T", K / 5)):
        rule = {"loss_norm": loss_norm}
        all_sets = [
            run(net, x, y, TraceRule(mu=make().mu, sampler=Given(*s), **rule)) for s in combinations(range(5), K)
        ]
        mean = {n: sum(g[n] for g in all_sets) / len(all_sets) for n in wanted}
        assert error(mean, {n: factor * g for n, g in wanted.items()}) <= EXACT
