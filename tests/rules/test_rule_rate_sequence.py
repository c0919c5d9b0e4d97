"""The rate rule layer by layer over whole sequences: that of single steps, norms over the sequence, and memory."""

import pytest
import torch
from rate_reference import (
    LOSS,
    RESETS,
    bptt,
    constant,
    conv_net,
    fires,
    normed,
    rates_by_autograd,
    run,
    same,
    simulated,
)
from reference import dense_net, error, gradients, held_at_most, live_at_most, sample
from torch import nn
from torch.nn import functional as F

from spikefit import create_model
from spikefit.encoding import repeat
from spikefit.errors import OptionError, StrategyError
from spikefit.layers import (
    Dropout,
    GlobalAveragePool,
    Readout,
    ResidualBlock,
    SpikingConv1d,
    SpikingConv2d,
    SpikingLinear,
    SpikingUnit,
)
from spikefit.models import SpikingNetwork
from spikefit.neurons import LIF
from spikefit.rules import drive_rate, rate, rate_passes

WHOLE = rate("sequence")


def buffers(net):
    return {n: b.clone() for n, b in net.named_buffers()}


def dense(norm, **options):
    return dense_net((7, 8, 6, 5), norm=norm, v_threshold=0.6, **options)


def evaluated(**options):
    net = dense("bn", **options)
    for norm in (unit.norm for unit in net.blocks[:-1]):
        norm.momentum = None
    for seed in range(3):
        net(sample(seed=seed)[0])
    return net.eval()


def residual(norm="none", **options):
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.3, **options}
    block, plain = (ResidualBlock(n, 4, stride=3 - n // 2, norm=norm, neuron=neuron) for n in (2, 4))
    net = SpikingNetwork([block, plain, GlobalAveragePool(), Readout(4, 3)], input_shape=(2, 6, 6)).double()
    return louder(net) if norm == "none" else net


def louder(net):
    """With weights that let deep layers fire without a norm."""
    with torch.no_grad():
        for unit in (m for m in net.modules() if isinstance(m, SpikingUnit) and m.norm is None):
            unit.synapse.weight.mul_(2)
    return net


def vgg6(norm="step_bn", **options):
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.5, **options}
    made = {"width": 0.1, "num_classes": 3, "input_shape": (2, 8, 8), "pool": "avg", "neuron": neuron}
    return create_model("vgg6", norm=norm, **made).double()


NETS = {
    "dense": lambda **options: dense("none", **options),
    "dense, ws": lambda **options: dense("ws", **options),
    "dense, step_bn": lambda **options: dense("step_bn", **options),
    "dense, bn in evaluation": evaluated,
    "convolutions": conv_net,
    "convolutions, step_bn": vgg6,
    "residual": residual,
    "residual, step_bn": lambda **options: residual("step_bn", **options),
}


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", NETS)
def test_is_that_of_single_steps(name, reset, T):
    net, twin = (NETS[name](**RESETS[reset]) for _ in range(2))
    x, y = sample(T=T, shape=net.input_shape)
    before = buffers(net)
    got, outcome = run(net, x, y, rule=WHOLE)
    wanted, stepped = run(twin, x, y)
    assert T == 1 or fires(twin.eval(), x)
    assert error(got, {n: g for n, g in wanted.items() if g.norm() > 1e-12}) <= 1e-10
    assert sum(g.norm() > 1e-12 for g in wanted.values()) >= len(wanted) - 1
    assert torch.equal(outcome.logits, stepped.logits)
    assert torch.equal(outcome.loss, stepped.loss)
    assert outcome.steps == stepped.steps
    after = buffers(twin)
    assert all(torch.equal(b, after[n]) for n, b in net.named_buffers())
    assert ("step_bn" in name) == any(not torch.equal(b, before[n]) for n, b in net.named_buffers())


@pytest.mark.parametrize("name", ["convolutions", "convolutions, step_bn", "residual"])
def test_a_repeated_image_passes_the_first_synapse_once(name, monkeypatch):
    net, twin = (NETS[name]() for _ in range(2))
    x, y = sample(T=7, shape=net.input_shape)
    x = repeat(x[0], 7)
    wanted, _ = run(twin, x, y)
    calls, true, weight = [0], F.conv2d, net.blocks[0]
    weight = (weight.first if isinstance(weight, ResidualBlock) else weight).synapse.weight

    def counted(x, w, *options):
        calls[0] += w.shape == weight.shape
        return true(x, w, *options)

    monkeypatch.setattr(F, "conv2d", counted)
    got, _ = run(net, x, y, rule=WHOLE)
    assert calls == [2], "once in each pass"
    run(net, x.contiguous(), y, rule=WHOLE)
    assert calls == [2 + 8]
    assert error(got, wanted) <= 1e-10


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("norm", ["bn", "tdbn"])
def test_dense_networks_with_norms_over_the_sequence(norm, reset):
    net, twin = (dense(norm, tau=2.5, **RESETS[reset]) for _ in range(2))
    x, y = sample(T=6)
    got, outcome = run(net, x, y, rule=WHOLE)
    units, head = twin.blocks[:-1], twin.blocks[-1]
    assert all(round(u.norm.weight[0].item(), 6) == (0.6 if norm == "tdbn" else 1.0) for u in units)
    layers = [(u.synapse, u.neuron, same, u.norm) for u in units]
    rates_by_autograd([*layers, (head.linear, None, same)], x, y).backward()
    assert error(got, gradients(twin)) <= 1e-10
    before = buffers(twin)
    assert fires(twin, x)
    after = buffers(twin)
    assert all(torch.equal(b, after[n]) for n, b in net.named_buffers()), "statistics move as in a forward"
    assert not torch.equal(before["blocks.0.norm.running_mean"], after["blocks.0.norm.running_mean"])
    assert int(net.blocks[0].norm.num_batches_tracked) == 1
    torch.testing.assert_close(outcome.logits, twin(x).detach().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("norm", ["bn", "tdbn"])
def test_convolutions_with_norms_over_the_sequence(norm, static):
    net, twin, (x, y) = vgg6(norm), vgg6(norm), sample(T=5, shape=(2, 8, 8))
    x = repeat(x[0], 5) if static else x
    got, _ = run(net, x, y, rule=WHOLE)
    *units, _, head = twin.blocks
    assert fires(vgg6(norm), x)
    layers = [(u.synapse, u.neuron, F.avg_pool2d if u.pool else same, u.norm) for u in units]
    layers = [(s, n, (lambda t: F.avg_pool2d(t, 2)) if b is F.avg_pool2d else b, norm) for s, n, b, norm in layers]
    rates_by_autograd([*layers, (lambda s: head.linear(s.mean((2, 3))), None, same)], x, y).backward()
    assert error(got, gradients(twin)) <= 1e-10
    twin(x)
    for n, b in buffers(twin).items():
        torch.testing.assert_close(b, dict(net.named_buffers())[n], rtol=1e-12, atol=1e-12)


def test_residual_blocks_with_norms_over_the_sequence():
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.5}
    torch.manual_seed(0)
    block = ResidualBlock(2, 4, stride=2, norm="bn", neuron=neuron)
    net = SpikingNetwork([block, GlobalAveragePool(), Readout(4, 3)], input_shape=(2, 6, 6)).double()
    x, y = sample(T=5, shape=(2, 6, 6))
    assert fires(net, x)
    a, b, short, head = block.first, block.second, block.short, net.blocks[2].linear
    currents, z = normed(a.norm, [a.synapse(x_t) for x_t in x], a.synapse(x.mean(0)))
    s, r_a, k_a = simulated(currents, a.neuron)
    r = r_a + k_a * (z - z.detach())
    left, z_left = normed(b.norm, [b.synapse(s_t) for s_t in s], b.synapse(r))
    right, z_right = normed(short.norm, [short.synapse(x_t) for x_t in x], short.synapse(x.mean(0)))
    _, r_b, k_b = simulated([i + j for i, j in zip(left, right, strict=True)], b.neuron)
    z = z_left + z_right
    LOSS(head((r_b + k_b * (z - z.detach())).mean((2, 3)))[None], y).backward()
    wanted = gradients(net)
    got, _ = run(net, x, y, rule=WHOLE)
    assert error(got, wanted) <= 1e-10


@pytest.mark.parametrize("norm", ["bn", "tdbn"])
@pytest.mark.parametrize("reset", RESETS)
def test_norms_over_the_sequence_where_the_rule_is_exact(reset, norm):
    net, (x, y) = dense(norm, **RESETS[reset]), sample(T=1, B=8)
    assert fires(net, x)
    assert error(run(net, x, y, rule=WHOLE)[0], bptt(net, x, y)) <= 1e-10
    net, (x, y) = dense_net((7, 8), norm=norm, **RESETS[reset]), constant()
    assert fires(net, x)
    assert error(run(net, x, y, rule=WHOLE)[0], bptt(net, x, y)) <= 1e-10
    events, y = sample()
    assert error(run(net, events, y, rule=WHOLE)[0], bptt(net, events, y), "0.synapse.weight") > 0.1


EQUATIONS = {
    **RESETS,
    "rest": {"v_rest": 0.2},
    "hard, rest": {"v_reset": -0.1, "v_rest": 0.1, "detach_reset": False},
    "no reset": {"reset": False, "v_threshold": 2.0},
    "input decays": {"decay_input": True, "v_threshold": 0.4},
}


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_derivative_of_rates_by_autograd_over_time(equation, backend, monkeypatch):
    neuron = LIF(tau=2.5, surrogate="sigmoid(4)", backend=backend, **EQUATIONS[equation])
    current = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    if equation == "no reset":
        wanted = _without_reset(current, neuron)
    else:
        wanted = 6 * simulated(list(current), neuron)[2]
    assert 0.05 < float(neuron(current)[0].mean()) < 0.95
    got = rate_passes.slope_sums(neuron, current, None)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    # in pieces, of a sequence in another order, and in half precision as the float32 numbers that it holds
    monkeypatch.setattr(rate_passes, "PIECE", 6 * 3 * 4 * 2)
    torch.testing.assert_close(rate_passes.slope_sums(neuron, current, None), got, rtol=1e-14, atol=0)
    last = current[..., None].contiguous().flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (6, 5))
    sums = rate_passes.slope_sums(neuron, last, None)[..., 0]
    torch.testing.assert_close(sums, got, rtol=1e-14, atol=0)
    half = current.bfloat16()
    got = rate_passes.slope_sums(neuron, half, None)
    assert got.dtype == torch.float32
    assert torch.equal(got, rate_passes.slope_sums(neuron, half.float(), None))


def _without_reset(current, neuron):
    """sum_t slope(u[t]) sum_{k<=t} gain leak^(t-k)."""
    (leak, gain), total, q, v = neuron.coefficients(), 0.0, 0.0, torch.zeros_like(current[0])
    for x in current:
        v, q = leak * v + gain * x, gain + leak * q
        total = total + q * neuron.surrogate.slope(v - neuron.v_threshold)
    return total


def test_from_a_membrane():
    neuron = LIF(surrogate="sigmoid(4)", detach_reset=False)
    current = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    first, v = neuron(current[:1])
    got = rate_passes.slope_sums(neuron, current[1:], v)
    extra = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(neuron(current[1:] + extra, v)[0].sum(), extra)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert first.any()
    assert (got - rate_passes.slope_sums(neuron, current[1:], None)).abs().max() > 1e-3


def test_one_dropout_mask_for_the_sequence():
    first = SpikingLinear(7, 40, norm="none", neuron={"name": "lif", "v_threshold": 0.2})
    net, (x, y) = SpikingNetwork([first, Dropout(0.5), Readout(40, 3)], input_shape=(7,)).double(), sample()
    found = []
    for rule in (rate(), WHOLE):
        torch.manual_seed(5)
        found.append(run(net, x, y, rule=rule))
    assert error(found[1][0], found[0][0]) <= 1e-12
    assert torch.equal(found[1][1].logits, found[0][1].logits)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(1, 4, 40, dtype=torch.float64), 0.5)
    assert 0.2 < float((mask == 0).double().mean()) < 0.8
    logits = net.blocks[2](net.blocks[0](x)[0] * mask)[0]
    torch.testing.assert_close(found[1][1].logits, logits.detach().sum(0), rtol=1e-12, atol=1e-12)


def test_backward_and_surroundings_are_those_handed_in():
    net, (x, y) = dense("bn"), sample(T=4)
    wanted, plain = run(net, x, y, rule=WHOLE)
    calls, entered = [], [0]

    def scaled(value):
        calls.append(torch.is_autocast_enabled("cpu"))
        (8 * value).backward()

    def around():
        entered[0] += 1
        return torch.autocast("cpu", torch.bfloat16)

    net = dense("bn")
    got, outcome = run(net, x, y, rule=rate("sequence", grad_scale=0.5), backward=scaled)
    assert error(got, {n: 4 * g for n, g in wanted.items()}) <= 1e-12
    assert torch.equal(outcome.loss, plain.loss), "grad_scale does not show in the loss"
    net = net.float()
    inside, outcome = run(net, x.float(), y, rule=WHOLE, backward=scaled, around=around)
    assert entered == [2], "once around each pass"
    outside, _ = run(net, x.float(), y, rule=WHOLE, backward=scaled)
    assert calls == [False] * 3, "backward runs outside"
    assert 0 < error(inside, outside, "linear.weight") < 0.5
    assert not outcome.loss.requires_grad
    assert not outcome.logits.requires_grad


def test_layers_along_space_and_frozen_leaks():
    neuron = {"name": "plif", "surrogate": "sigmoid(4)", "v_threshold": 0.3}
    torch.manual_seed(0)
    unit = SpikingConv1d(2, 4, norm="step_bn", neuron=neuron, pool="avg")
    net = SpikingNetwork([unit, GlobalAveragePool(), Readout(4, 3)], input_shape=(2, 8)).double()
    unit.neuron.requires_grad_(False)
    x, y = sample(T=5, shape=(2, 8))
    assert fires(net, x)
    got, wanted = (run(net, x, y, rule=rule)[0] for rule in (WHOLE, rate()))
    assert error(got, {n: g for n, g in wanted.items() if "neuron" not in n}) <= 1e-10


def deep_net(norm):
    """Six convolutions of one shape."""
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.5}
    units = [SpikingConv2d(2 if i == 0 else 8, 8, norm=norm, neuron=neuron) for i in range(6)]
    return SpikingNetwork([*units, GlobalAveragePool(), Readout(8, 3)], input_shape=(2, 8, 8)).double()


@pytest.mark.parametrize("norm", ["none", "step_bn", "bn"])
def test_memory_in_the_length_of_the_sequence(norm, monkeypatch):
    # layers that are worth counting have more values than a piece
    monkeypatch.setattr(rate_passes, "PIECE", 1)

    def at(T, rule):
        """(held for backward, alive at most) in sequences of one step of one layer."""
        net, (x, y) = deep_net(norm), sample(T=T, shape=(2, 8, 8))
        train = (lambda: bptt(net, x, y)) if rule is None else (lambda: run(net, x, y, rule=rule))
        layer = x.shape[1] * 8 * 8 * 8 * x.element_size()
        return held_at_most(net, x, train) / layer, live_at_most(train) / layer

    def slopes(rule):
        found = [at(T, rule) for T in (8, 16)]
        assert all(size > 0 for pair in found for size in pair)
        return [(after - before) / 8 for before, after in zip(*found, strict=True)]

    if norm != "bn":
        assert slopes(rate()) == [0, 0]
    held, alive = slopes(WHOLE)
    assert held == 0
    # what a layer gets, its current and its spikes, and a sample of gradients
    assert 2 < alive <= 3.5
    held, alive = slopes(None)
    assert alive >= held > 10


def test_mode_and_refusals():
    with pytest.raises(OptionError, match="rate: mode must be one of step, sequence, got 'layer'"):
        rate("layer")
    assert rate().mode == "step"
    x, y = sample(T=4)

    def refuses(match, net, rule, x=x):
        before = buffers(net)
        with pytest.raises(StrategyError, match=match):
            drive_rate(net, x, y, LOSS, rule)
        assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
        assert all(p.grad is None for p in net.parameters())

    refuses(r"blocks.0.norm .* is BatchNorm and needs all T.*Use rate\(mode='sequence'\)", dense("bn"), rate())
    run(dense("bn").eval(), x, y)
    images = torch.ones(4, 4, 2, 8, 8, dtype=torch.float64)
    refuses("the max pool of blocks.0 .*is not linear in rates", conv_net(pool="max"), WHOLE, images)
    refuses("Linear has no init_state and step", nn.Linear(7, 3), WHOLE)
    unit = SpikingLinear(7, 7, norm="none")
    twice = SpikingNetwork([unit, unit, Readout(7, 3)], input_shape=(7,)).double()
    refuses("rule rate: blocks.0.neuron is used twice in one step", twice, WHOLE)

    class Other(SpikingNetwork):
        def forward(self, x):
            return super().forward(2 * x)

    other = Other(dense("none").blocks, input_shape=(7,))
    refuses("Other is not run as a SpikingNetwork", other, WHOLE)
    run(other, x, y)
