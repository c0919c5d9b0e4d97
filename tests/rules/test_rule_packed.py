"""OTTT and NDOT over lean units: gradients and spikes of the same rule over plain units, from bits and traces."""

import weakref

import pytest
import torch
from reference import Quadratic, bptt, dense_net, error, gradients, held_at_most, ottt_by_record, sample
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikefit import use_backend, use_strategy
from spikefit.encoding import repeat
from spikefit.errors import StrategyError
from spikefit.layers import (
    Flatten,
    GlobalAveragePool,
    Readout,
    ResidualBlock,
    SpikingConv1d,
    SpikingConv2d,
    SpikingLinear,
    SpikingUnit,
)
from spikefit.layers.norm import BatchNorm
from spikefit.layers.packed import dense
from spikefit.models import SpikingNetwork
from spikefit.rules import EveryK, drive, ndot, ottt, sltt
from spikefit.rules.driver import detached
from spikefit.rules.sequence import Sequence

LOSS = Quadratic()
LEAN = ["lean:spikes", "lean:input"]
RULES = [ottt(), ndot(), ndot(lag=1), ottt(trace_first=False)]
NORMS = ["step_bn", "ws", "none"]
FAST = {"name": "lif", "tau": 1.6, "surrogate": "sigmoid(4)", "v_threshold": 0.5}
SLOW = {**FAST, "tau": 3.0, "decay_input": True}


def conv(norm):
    first = SpikingConv2d(2, 4, norm=norm, neuron=SLOW, pool="avg", chunk=3)
    second = SpikingConv2d(4, 6, 1, stride=2, norm=norm, neuron=FAST)
    return [first, second, Flatten(), SpikingLinear(24, 5, norm=norm, neuron=SLOW), Readout(5, 3)], (2, 8, 8)


def residual(norm):
    blocks = [SpikingConv2d(2, 4, norm=norm, neuron=SLOW), ResidualBlock(4, 4, norm=norm, neuron=FAST)]
    blocks.append(ResidualBlock(4, 6, stride=2, norm=norm, neuron=SLOW))
    return [*blocks, GlobalAveragePool(), Readout(6, 3)], (2, 6, 6)


def line(norm):
    first = SpikingConv1d(2, 4, stride=2, dilation=2, padding=2, norm=norm, neuron=FAST)
    second = SpikingConv1d(4, 6, 1, groups=2, padding=0, norm=norm, neuron=SLOW, pool="avg")
    return [first, second, GlobalAveragePool(), Readout(6, 3)], (2, 12)


def har(norm):
    widths = [(9, 12), (12, 12), (12, 10)]
    units = [SpikingLinear(a, b, norm=norm, neuron=n) for (a, b), n in zip(widths, (FAST, SLOW, FAST), strict=True)]
    return [*units, Readout(10, 3, tau=4.0)], (9,)


NETS = {"conv": conv, "residual": residual, "line": line, "har": har}


def made(name, norm, strategy="bptt", dtype=torch.float64):
    """A small network that fires in every layer, with norms that have seen data."""
    torch.manual_seed(0)
    blocks, shape = NETS[name](norm)
    net = SpikingNetwork(blocks, input_shape=shape)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, SpikingUnit) and module.norm is None:
                getattr(module.synapse, "gain", module.synapse.weight).mul_(3)
                module.synapse.bias.uniform_(0, 0.3)
            if isinstance(module, BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(0.0, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.05, 0.1)
    return use_strategy(net.to(dtype), strategy), shape


def run(net, x, y, rule, **options):
    """(gradients, outcome, buffers, spikes and membranes of every unit and step) of a sequence."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module, args, out):
        if out[1] is not None:
            seen.append((dense(out[0]).detach(), out[1].detach()))

    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, SpikingUnit)]
    net.zero_grad()
    outcome = drive(net, x, y, LOSS, rule, **options)
    for hook in hooks:
        hook.remove()
    return gradients(net), outcome, {n: b.clone() for n, b in net.named_buffers()}, seen


def assert_same(got, wanted, tolerance):
    assert error(got[0], wanted[0]) <= tolerance
    assert torch.equal(got[1].logits, wanted[1].logits)
    assert torch.equal(got[1].loss, wanted[1].loss)
    for name, buffer in wanted[2].items():
        assert torch.equal(got[2][name], buffer), name
    assert len(got[3]) == len(wanted[3]) > 0
    for (s, v), (s_wanted, v_wanted) in zip(got[3], wanted[3], strict=True):
        assert torch.equal(s, s_wanted)
        assert torch.equal(v, v_wanted)
    assert 0.05 < torch.cat([s.flatten() for s, _ in wanted[3]]).mean() < 0.95


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_equals_the_rule_over_plain_units(name, norm):
    x, y = sample(T=5, shape=made(name, norm)[1])
    for rule in RULES:
        for given in (x, repeat(x[0] + x[1] / 2, 5)):
            wanted = run(made(name, norm)[0], given, y, rule)
            for strategy in LEAN:
                assert_same(run(made(name, norm, strategy)[0], given, y, rule), wanted, 1e-10)


@pytest.mark.parametrize("strategy", LEAN)
@pytest.mark.parametrize("name", ["conv", "residual", "har"])
def test_in_single_precision(name, strategy):
    x, y = sample(T=5, shape=made(name, "step_bn")[1])
    for norm in ("step_bn", "ws"):
        for rule in (ottt(), ndot()):
            wanted = run(made(name, norm, dtype=torch.float32)[0], x.float(), y, rule)
            assert_same(run(made(name, norm, strategy, torch.float32)[0], x.float(), y, rule), wanted, 1e-5)


@pytest.mark.parametrize("strategy", LEAN)
def test_ottt_of_every_synapse_is_the_sum_of_what_was_recorded(strategy):
    for norm in NORMS:
        net, shape = made("residual", norm)
        x, y = sample(T=5, shape=shape)
        assert error(run(made("residual", norm, strategy)[0], x, y, ottt())[0], ottt_by_record(net, x, y, LOSS)) < 1e-10


def test_the_traces_make_a_difference():
    x, y = sample(T=5, shape=(9,))
    found = [run(made("har", "step_bn", "lean:spikes")[0], x, y, rule)[0] for rule in (ottt(), ndot(), sltt())]
    assert error(found[0], found[2], "0.synapse") > 0.1
    assert error(found[0], found[2], "0.norm") > 0.1
    assert error(found[0], found[1], "1.synapse") > 0.01


@pytest.mark.parametrize("strategy", LEAN)
def test_norms_in_evaluation(strategy):
    for name in ("conv", "residual"):
        net, shape = made(name, "step_bn")
        x, y = sample(T=5, shape=shape)
        wanted = run(net.eval(), x, y, ottt())
        assert_same(run(made(name, "step_bn", strategy)[0].eval(), x, y, ottt()), wanted, 1e-10)
    # for one layer the rule is exact, which plain autograd shows
    net, (x, y) = use_strategy(dense_net((7, 8), norm="step_bn"), strategy), sample()
    net.blocks[0].norm.running_mean.uniform_(-0.5, 0.5)
    net.eval()
    assert error(run(net, x, y, ottt())[0], bptt(net, x, y, LOSS)) <= 1e-12


@pytest.mark.parametrize("rule", [ottt(), ndot()], ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["conv", "residual"])
def test_plans_that_mix_what_units_keep(name, rule):
    net, shape = made(name, "step_bn")
    x, y = sample(T=4, shape=shape)
    wanted = run(net, x, y, rule)
    for first in range(3):
        mixed, _ = made(name, "step_bn")
        for i, unit in enumerate(m for m in mixed.modules() if isinstance(m, SpikingUnit)):
            unit.keep = ("all", "spikes", "input")[(first + i) % 3]
        assert_same(run(mixed, x, y, rule), wanted, 1e-10)


@pytest.mark.parametrize("strategy", LEAN)
def test_what_is_frozen_and_steps_that_are_not_chosen(strategy):
    def frozen(kind):
        net, shape = made("residual", "step_bn", kind)
        net.blocks[0].synapse.requires_grad_(False)
        net.blocks[1].first.norm.weight.requires_grad_(False)
        net.blocks[2].short.norm.bias.requires_grad_(False)
        return net, sample(T=5, shape=shape)

    for rule in (ottt(), ottt(sampler=EveryK(3, 1)), ndot(sampler=EveryK(5, 4))):
        net, (x, y) = frozen("bptt")
        wanted = run(net, x, y, rule)
        got = run(frozen(strategy)[0], x, y, rule)
        still = [n for n, p in net.named_parameters() if not p.requires_grad]
        assert len(still) == 3
        assert all(found.pop(n).norm() == 0 for found in (got[0], wanted[0]) for n in still)
        assert_same(got, wanted, 1e-10)


@pytest.mark.parametrize("strategy", LEAN)
def test_updates_behind_every_step(strategy):
    ends = []
    for kind in ("bptt", strategy):
        net, shape = made("conv", "ws", kind)
        x, y = sample(T=4, shape=shape)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

        def update(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        drive(net, x, y, LOSS, ottt(update_every="step"), update=update)
        ends.append(dict(net.named_parameters()))
    start = dict(made("conv", "ws")[0].named_parameters())
    for name, parameter in ends[0].items():
        assert not torch.equal(parameter, start[name]), name
        torch.testing.assert_close(ends[1][name], parameter, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strategy", LEAN)
def test_traces_of_lower_precision_and_autocast(strategy):
    x, y = sample(T=5, shape=made("conv", "ws")[1])
    short = ottt(trace_dtype=torch.bfloat16)
    # without a norm both round the same traces
    wanted = run(made("conv", "ws")[0], x, y, short)
    assert_same(run(made("conv", "ws", strategy)[0], x, y, short), wanted, 1e-10)
    full = run(made("conv", "ws")[0], x, y, ottt())[0]
    assert error(wanted[0], full, "1.synapse") > 1e-6
    net, lean = (made("conv", "ws", kind, torch.float32)[0] for kind in ("bptt", strategy))
    inside = {"around": lambda: torch.autocast("cpu", torch.bfloat16)}
    found = [run(n, x.float(), y, ottt(), **inside) for n in (net, lean)]
    assert error(found[1][0], found[0][0]) <= 3e-2
    assert torch.equal(found[1][1].logits, found[0][1].logits)


@pytest.mark.parametrize("strategy", LEAN)
@pytest.mark.parametrize("options", [{}, {"v_rest": 0.25}, {"v_reset": 0.1}], ids=str)
def test_learned_leaks(options, strategy):
    def net(kind, widths=(7, 8, 6)):
        return use_strategy(dense_net(widths, name="plif", tau=1.7, **options), kind)

    x, y = sample()
    for rule in (ottt(), ottt(sampler=EveryK(4, 2)), *([] if "v_reset" in options else [ndot()])):
        assert_same(run(net(strategy), x, y, rule), run(net("bptt"), x, y, rule), 1e-10)
    if "v_reset" not in options:
        one = net(strategy, (7, 8))
        assert error(run(one, x, y, ottt())[0], bptt(one, x, y, LOSS)) <= 1e-12


def test_learned_gains_are_refused_by_name_and_frozen_ones_run():
    def net(kind="lean:spikes"):
        return use_strategy(dense_net(name="plif", decay_input=True, v_threshold=0.5), kind)

    x, y = sample(T=4)
    for rule in (ottt(), ottt(sampler=EveryK(4, 3))):
        with pytest.raises(StrategyError, match=r"rule ottt: blocks.0 runs lean and learns its gain.*keep='all'"):
            drive(net(), x, y, LOSS, rule)
    mixed = net()
    for block in mixed.blocks[:2]:
        block.keep = "all"
    assert_same(run(mixed, x, y, ottt()), run(net("bptt"), x, y, ottt()), 1e-10)
    drive(net(), x, y, LOSS, sltt())
    frozen = [net(kind) for kind in ("lean:spikes", "bptt")]
    for one in frozen:
        for block in one.blocks[:2]:
            block.neuron.requires_grad_(False)
    found = [run(one, x, y, ottt()) for one in frozen]
    assert all(f[0].pop(f"blocks.{i}.neuron.w").norm() == 0 for f in found for i in range(2))
    assert_same(*found, 1e-10)


@pytest.mark.parametrize("strategy", LEAN)
def test_on_the_reference_backend(strategy):
    x, y = sample(T=4, shape=made("residual", "step_bn")[1])
    with use_backend("reference"):
        wanted = run(made("residual", "step_bn")[0], x, y, ottt())
        assert_same(run(made("residual", "step_bn", strategy)[0], x, y, ottt()), wanted, 1e-10)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rule", [ottt(), ndot()], ids=lambda r: r.name)
@pytest.mark.parametrize("name", NETS)
def test_less_is_held_and_it_does_not_grow_with_the_sequence(name, rule, static):
    def held(strategy, T):
        net, shape = made(name, "step_bn", strategy)
        x, y = sample(T=T, shape=shape)
        x = repeat(x[0], T) if static else x
        return held_at_most(net, x, lambda: drive(net, x, y, LOSS, rule))

    plain, kept, bits = ([held(s, T) for T in (2, 4, 8)] for s in ("bptt", "lean:input", "lean:spikes"))
    assert len(set(kept)) == len(set(bits)) == 1, (kept, bits)
    assert bits[0] < kept[0] < plain[0]


def beside_traces(strategy):
    """Bytes that one step holds for backward besides parameters, the input, membranes and traces."""
    net, shape = made("conv", "step_bn", strategy)
    x, _ = sample(T=2, B=8, shape=shape)
    sequence, state, traces, held = Sequence(net, ottt(), x), net.init_state(8), {}, {}

    def storages(*values):
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}

    _, state, traces = sequence.step(x[0], state, traces)
    state = detached(state, "test")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.update(storages(t)), t)[1], lambda t: t):
        logits, after, traces = sequence.step(x[1], state, traces)
    parts = [t for t in tree_leaves((state, after, traces, list(net.parameters()), x)) if isinstance(t, Tensor)]
    assert logits.requires_grad
    return sum(size for key, size in held.items() if key not in storages(*parts))


def test_beside_traces_a_step_holds_bits():
    # float64 numbers of 8 samples: [4, 8, 8] and [6, 2, 2] and 5 neurons; statistics and the read-out come on top
    neurons, statistics = 8 * (4 * 64 + 6 * 4 + 5), 2 * (4 + 6 + 5)
    plain, kept, bits = (beside_traces(s) for s in ("bptt", *reversed(LEAN)))
    # one byte for up to eight channels; the read-out, which keeps nothing, has dense spikes of five neurons
    packed, readout = 8 * (64 + 4 + 1), 8 * 8 * 5
    assert packed + readout <= bits <= packed + readout + 8 * (statistics + 4)
    assert kept - bits == 8 * neurons, "z of every unit"
    assert plain > 16 * neurons


def test_traces_are_shared_by_synapses_of_one_packed_input_and_none_is_made_of_a_static_one():
    net, shape = made("residual", "step_bn", "lean:spikes")
    x, _ = sample(T=2, shape=shape)
    sequence, state, traces = Sequence(net, ottt(), repeat(x[0], 3)), net.init_state(4), {}
    for _ in range(2):
        _, state, traces = sequence.step(sequence.repeated[0], state, traces)
    assert traces["blocks.0.synapse"].a is None
    assert traces["blocks.2.first.synapse"].a is traces["blocks.2.short.synapse"].a
    assert traces["blocks.1.first.synapse"].a is not traces["blocks.2.first.synapse"].a


def test_the_graph_of_a_step_holds_no_traces_of_the_step_before():
    net, shape = made("residual", "step_bn", "lean:spikes")
    x, _ = sample(T=2, shape=shape)
    sequence, state = Sequence(net, ottt(), x), net.init_state(4)
    state, traces = sequence.step(x[0], state, {})[1:]
    before = [weakref.ref(t.a) for n, t in traces.items() if n != "blocks.0.synapse"]
    state = detached(state, "test")
    logits, state, traces = sequence.step(x[1], state, traces)
    assert logits.requires_grad
    assert len(before) > 5
    assert all(reference() is None for reference in before)


def test_units_of_a_module_of_ones_own_and_dense_hand_over():
    class Own(nn.Module):
        """Two units that hand on dense spikes; the membranes start from nothing."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            first = SpikingConv2d(2, 4, neuron=FAST, norm="step_bn")
            self.units = nn.ModuleList([first, ResidualBlock(4, 4, neuron=SLOW, norm="step_bn")])

        def init_state(self, batch_size, shape):
            return (None, None)

        def step(self, x_t, state):
            s, first = self.units[0](x_t[None], state[0])
            s, second = self.units[1](s, state[1])
            return s[0].mean((2, 3)), (first, second)

    x, y = sample(T=5, shape=(2, 5, 5))
    wanted = run(Own().double(), x, y, ottt())
    for strategy in LEAN:
        assert_same(run(use_strategy(Own().double(), strategy), x, y, ottt()), wanted, 1e-10)
