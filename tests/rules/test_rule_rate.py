"""The rate rule: known numbers, exact cases, the equations written without the rule, memory, and what it refuses."""

import pytest
import torch
from rate_reference import (
    LOSS,
    RESETS,
    MeanQuadratic,
    bptt,
    constant,
    conv_net,
    fires,
    rates_by_autograd,
    run,
    same,
    simulated,
)
from reference import dense_net, error, gradients, held_at_most, sample
from torch import nn
from torch.nn import functional as F

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers import (
    Chain,
    Dropout,
    GlobalAveragePool,
    Pool2d,
    Readout,
    ResidualBlock,
    SpikingAttention,
    SpikingConv2d,
    SpikingLinear,
    SpikingUnit,
)
from spikefit.losses import create_loss
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.rules import drive, drive_rate, rate, sltt
from spikefit.rules.rate_passes import rate_norm


def test_the_example_by_hand():
    unit = SpikingLinear(
        1, 1, norm="none", neuron={"name": "lif", "tau": 2.0, "surrogate": "triangle(1)", "detach_reset": True}
    )
    net = SpikingNetwork([unit], input_shape=(1,)).double()
    with torch.no_grad():
        unit.synapse.weight.fill_(0.6)
        unit.synapse.bias.zero_()

    class MeanSpikes(Loss):
        splits_per_step = False
        reads_mean = True

        def __call__(self, logits, targets):
            return logits.mean(0).sum()

    x = torch.ones(3, 1, 1, dtype=torch.float64)
    got, outcome = run(net, x, torch.tensor([0]), MeanSpikes())
    wanted = (0.6 + 1.5 * 0.9 + 1.75 * 0.95) / 3
    assert abs(float(got["blocks.0.synapse.weight"]) - wanted) <= 1e-12
    assert round(wanted, 7) == 1.2041667
    assert abs(float(outcome.loss) - 1 / 3) <= 1e-12
    assert outcome.steps == (0, 1, 2)


@pytest.mark.parametrize("norm", ["none", "ws", "step_bn"])
@pytest.mark.parametrize("reset", RESETS)
def test_one_step_is_bptt(reset, norm):
    net, (x, y) = dense_net((7, 8, 6, 5), norm=norm, tau=2.0, v_threshold=0.6, **RESETS[reset]), sample(T=1)
    assert fires(net, x)
    got, _ = run(net, x, y)
    # a bias in front of a norm is no parameter here; all that have a gradient are compared
    assert error(got, bptt(net, x, y)) <= 1e-12


@pytest.mark.parametrize("norm", ["none", "ws", "step_bn"])
@pytest.mark.parametrize("options", [{}, {"decay_input": True, "v_threshold": 0.3, "tau": 3.0}, {"v_rest": 0.2}])
@pytest.mark.parametrize("reset", RESETS)
def test_one_layer_with_a_constant_input_is_bptt_and_with_events_it_is_not(reset, options, norm):
    net, (x, y) = dense_net((7, 8), norm=norm, **{"tau": 2.0, **options}, **RESETS[reset]), constant()
    assert fires(net, x)
    got, _ = run(net, x, y)
    assert error(got, bptt(net, x, y)) <= 1e-12
    events, y = sample()
    assert fires(net, events)
    got, _ = run(net, events, y)
    weight = "blocks.0.synapse.weight"
    assert error(got, bptt(net, events, y), weight) > 0.1


def test_no_reset_and_no_leak():
    for options in ({"reset": False, "v_threshold": 2.0}, {"name": "if"}):
        net, (x, y) = dense_net((7, 8), **options), constant()
        assert fires(net, x)
        assert error(run(net, x, y)[0], bptt(net, x, y)) <= 1e-12


@pytest.mark.parametrize("reset", RESETS)
def test_dense_networks_by_the_equations(reset):
    net, (x, y) = dense_net((7, 8, 6, 5), tau=2.5, v_threshold=0.7, **RESETS[reset]), sample()
    assert fires(net, x)
    units, head = net.blocks[:-1], net.blocks[-1]
    layers = [(u.synapse, u.neuron, same) for u in units]
    rates_by_autograd([*layers, (head.linear, None, same)], x, y).backward()
    wanted = gradients(net)
    got, _ = run(net, x, y)
    assert error(got, wanted) <= 1e-12


@pytest.mark.parametrize("reset", RESETS)
def test_convolutions_and_pools_by_the_equations(reset):
    net, (x, y) = conv_net(**RESETS[reset]), sample(T=6, shape=(2, 8, 8))
    assert fires(net, x)
    first, _, second, _, third, head = net.blocks

    def standardised(r):
        return F.conv2d(r, second.synapse.standardized(), second.synapse.bias, padding=1)

    layers = [
        (first.synapse, first.neuron, lambda s: F.avg_pool2d(F.avg_pool2d(s, 2), 3, 1, 1)),
        (standardised, second.neuron, lambda s: s.flatten(1)),
        (third.synapse, third.neuron, same),
        (head.linear, None, same),
    ]
    rates_by_autograd(layers, x, y).backward()
    wanted = gradients(net)
    got, _ = run(net, x, y)
    assert error(got, wanted) <= 1e-12


def test_residual_blocks_by_the_equations():
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.3}
    block = ResidualBlock(2, 4, stride=2, norm="none", neuron=neuron)
    net = SpikingNetwork([Chain(block, GlobalAveragePool()), Readout(4, 3)], input_shape=(2, 6, 6)).double()
    x, y = sample(T=5, shape=(2, 6, 6))
    assert fires(net, x)
    a, b, short, head = block.first, block.second, block.short, net.blocks[1].linear
    with torch.no_grad():
        s, r_a, k_a = simulated([a.synapse(x_t) for x_t in x], a.neuron)
        currents = [b.synapse(s_t) + short.synapse(x_t) for s_t, x_t in zip(s, x, strict=True)]
        _, r_b, k_b = simulated(currents, b.neuron)
    z = a.synapse(x.mean(0))
    r = r_a + k_a * (z - z.detach())
    z = b.synapse(r) + short.synapse(x.mean(0))
    r = r_b + k_b * (z - z.detach())
    LOSS(head(r.mean((2, 3)))[None], y).backward()
    wanted = gradients(net)
    got, _ = run(net, x, y)
    assert error(got, wanted) <= 1e-12


def test_the_norm_of_rates_by_its_derivative():
    generator = torch.Generator().manual_seed(0)
    z, g = (torch.randn(1, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias, mean = torch.randn(3, 3, generator=generator, dtype=torch.float64).unbind()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    z.requires_grad_()
    weight.requires_grad_()
    x = rate_norm(z, weight, bias, mean, scale)
    wide = (1, 1, 3, 1)
    c = z.detach() - mean.view(wide)
    torch.testing.assert_close(x, weight.view(wide) * c * scale.view(wide) + bias.view(wide), rtol=1e-12, atol=1e-12)
    dz, dw = torch.autograd.grad(x, (z, weight), g)
    axes = (0, 1, 3)
    # dz = weight R (g - mean g - R^2 (z - own mean) mean(g (z - m))), R = scale
    own = z.detach() - z.detach().mean(axes).view(wide)
    inner = (g * c).mean(axes).view(wide) * own * scale.view(wide) ** 2
    by_hand = (weight * scale).detach().view(wide) * (g - g.mean(axes).view(wide) - inner)
    torch.testing.assert_close(dz, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dw, (g * c * scale.view(wide)).sum(axes), rtol=1e-12, atol=1e-12)


def test_statistics_are_means_over_steps_and_move_as_in_a_forward():
    net, twin, (x, y) = (*(dense_net((7, 8), norm="step_bn") for _ in range(2)), sample(T=6))
    got, _ = run(net, x, y)
    unit, head = twin.blocks[0], twin.blocks[1].linear
    before = {n: b.clone() for n, b in twin.named_buffers()}
    twin(x)
    for n, b in net.named_buffers():
        assert torch.equal(b, dict(twin.named_buffers())[n]), n
        assert not torch.equal(b, before[n]), n
    z = torch.stack([unit.synapse(x_t) for x_t in x]).detach()
    scales = (z.var(1, correction=0) + unit.norm.eps).rsqrt()
    normal = (z - z.mean(1, keepdim=True)) * scales[:, None]
    _, r, k = simulated(list(normal * unit.norm.weight + unit.norm.bias), unit.neuron)
    r, k, mean = r.detach(), k.detach(), z.mean((0, 1))
    output = head(r)
    LOSS(output[None], y).backward()
    d = torch.autograd.grad(LOSS(head(leaf := r.clone().requires_grad_())[None], y), leaf)[0] * k
    wanted = (d * (z.mean(0) - mean) * scales.mean(0)).sum(0)
    torch.testing.assert_close(got["blocks.0.norm.weight"], wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got["blocks.0.norm.bias"], d.sum(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got["blocks.1.linear.weight"], head.weight.grad, rtol=1e-10, atol=1e-12)


def test_norms_with_running_statistics():
    net, (x, y) = dense_net((7, 8), norm="bn", v_threshold=0.5), constant()
    net(x)
    net.eval()
    before = {n: b.clone() for n, b in net.named_buffers()}
    assert fires(net, x)
    assert error(run(net, x, y)[0], bptt(net, x, y)) <= 1e-12
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


@pytest.mark.parametrize("norm", ["none", "ws", "step_bn"])
@pytest.mark.parametrize("loss", ["ce_mean", "rate_mse"])
def test_logits_and_loss_are_those_of_the_model(loss, norm):
    net, (x, y) = create_model("har_mlp", norm=norm, input_shape=(7,), hidden=8, num_classes=3).double(), sample()
    _, outcome = run(net, x, y, create_loss(loss))
    logits = net(x).detach()
    total = logits[0]
    for logits_t in logits[1:]:
        total = total + logits_t
    assert torch.equal(outcome.logits, total)
    torch.testing.assert_close(outcome.loss, create_loss(loss)(logits, y))
    assert not outcome.loss.requires_grad
    assert not outcome.logits.requires_grad


def test_the_loss_reads_the_mean_of_the_first_pass_to_the_bit():
    class Seen(MeanQuadratic):
        def __call__(self, logits, targets):
            self.logits = logits.detach()
            return super().__call__(logits, targets)

    # bfloat16 shows which pass a mean is of
    net, (x, y), seen = dense_net((7, 8, 6)).float(), sample(), Seen()
    _, outcome = run(net, x.float(), y, seen, around=lambda: torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(seen.logits, (outcome.logits / 9)[None])


def test_gradients_are_taken_where_autograd_is_off_too():
    net, (x, y) = dense_net((7, 8)), constant()
    wanted, _ = run(net, x, y, LOSS)
    with torch.no_grad():
        got, _ = run(net, x, y, LOSS)
    assert error(got, wanted) == 0


@pytest.mark.parametrize("loss", ["ce_mean", "rate_mse"])
def test_losses_of_the_table(loss):
    net, (x, y) = dense_net((7, 8)), constant()
    wanted = bptt(net, x, y, create_loss(loss))
    assert error(run(net, x, y, create_loss(loss))[0], wanted) <= 1e-5


def test_one_dropout_mask_for_both_passes():
    first = SpikingLinear(7, 40, norm="none", neuron={"name": "lif", "v_threshold": 0.2})
    net, (x, y) = SpikingNetwork([first, Dropout(0.5), Readout(40, 3)], input_shape=(7,)).double(), constant()
    torch.manual_seed(5)
    got, _ = run(net, x, y)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(1, 4, 40, dtype=torch.float64), 0.5)
    assert 0.2 < float((mask == 0).double().mean()) < 0.8
    LOSS(net.blocks[2](net.blocks[0](x)[0] * mask)[0], y).backward()
    assert error(got, gradients(net)) <= 1e-12


def test_backward_and_surroundings_are_those_handed_in():
    net, (x, y) = dense_net((7, 8, 6)), sample(T=4)
    wanted, plain = run(net, x, y)
    calls = []

    def scaled(value):
        calls.append(torch.is_autocast_enabled("cpu"))
        (8 * value).backward()

    got, outcome = run(net, x, y, rule=rate(grad_scale=0.5), backward=scaled)
    assert error(got, {n: 4 * g for n, g in wanted.items()}) <= 1e-12
    assert torch.equal(outcome.loss, plain.loss), "grad_scale does not show in the loss"
    net = net.float()
    inside, _ = run(net, x.float(), y, backward=scaled, around=lambda: torch.autocast("cpu", torch.bfloat16))
    outside, _ = run(net, x.float(), y, backward=scaled)
    assert calls == [False] * 3, "backward runs outside"
    assert 0 < error(inside, outside, "linear.weight") < 0.5


@pytest.mark.parametrize("norm", ["none", "step_bn"])
def test_what_is_held_for_backward_does_not_grow_with_the_sequence(norm):
    def at(T, exact):
        net = dense_net((7, 8, 6), norm=norm) if norm == "step_bn" else conv_net()
        x, y = sample(T=T, shape=net.input_shape)
        return held_at_most(net, x, lambda: bptt(net, x, y) if exact else run(net, x, y))

    found = [at(T, False) for T in (2, 4, 8, 16)]
    assert found[0] > 0
    assert len(set(found)) == 1, found
    assert at(16, True) > at(4, True) > at(2, True) > 0


def refuses(match, net, *, error=StrategyError, x=None, y=None, loss=LOSS):
    made = sample(T=4, shape=getattr(net, "input_shape", (7,)))
    before = {n: b.clone() for n, b in net.named_buffers()}
    with pytest.raises(error, match=match):
        drive_rate(net, made[0] if x is None else x, made[1] if y is None else y, loss, rate())
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers()), "what is refused leaves the model alone"
    assert all(p.grad is None for p in net.parameters())


def test_blocks_that_are_not_linear_in_rates():
    refuses(r"rule rate: the max pool of blocks.0 is not linear in rates. Use pool='avg'", conv_net(pool="max"))
    pooled = SpikingNetwork([SpikingConv2d(2, 3, norm="none"), Pool2d("max")], input_shape=(2, 8, 8))
    refuses(r"rule rate: the max pool of blocks.1 is not linear in rates", pooled.double())
    attention = SpikingNetwork([Chain(SpikingAttention(8, norm="none"))], input_shape=(8, 2, 2))
    refuses(r"rule rate: blocks.0.blocks.0 is SpikingAttention and multiplies two", attention.double())
    over_time = create_model("har_conv", timesteps=8, input_shape=(7,), norm="step_bn")
    refuses(r"blocks.0 \(and .* is SpikingConv1d and needs all time steps at once", over_time.double())
    streams = create_model("revsresnet21", norm="step_bn", num_classes=3, input_shape=(3, 16, 16))
    refuses(r"blocks.1 \(and 3 more\) is TwoStreams, which is not known to be linear in rates.*sltt", streams)
    windows = create_model("dmsn_cnn12", num_classes=3)
    refuses(r"blocks.1 \(and \d+ more\) is WindowSpike, which is not known to be linear", windows)
    refuses("TRevSNN is not run as a SpikingNetwork", create_model("trevsnn_mini", num_classes=3))
    refuses("Linear has no init_state and step", nn.Linear(7, 3))


def test_norms_and_readouts():
    whole = create_model("har_mlp", input_shape=(7,), norm="bn").double()
    refuses(r"rule rate: blocks.0.norm \(and 3 more\) is BatchNorm and needs all T steps.*norm=step_bn", whole)
    foreign = SpikingUnit(nn.Linear(7, 8), nn.LayerNorm(8), dense_net().blocks[0].neuron)
    other = SpikingNetwork([foreign], input_shape=(7,)).double()
    refuses("blocks.0.norm is LayerNorm, and expected is a BatchNorm or StepBatchNorm", other)
    refuses(r"blocks.2.membrane weighs steps differently \(tau=2\).*head_tau=None", dense_net(head_tau=2.0))


def test_neurons_without_one_fixed_leak():
    node = SpikingNetwork([SpikingLinear(7, 8, norm="none", neuron="two_group"), Readout(8, 3)], input_shape=(7,))
    refuses("blocks.0.neuron is TwoGroupNode with a forward of its own", node.double())
    refuses(r"blocks.0.neuron \(and blocks.1.neuron\) has a membrane on a grid \(frac_bits=8\)", dense_net(frac_bits=8))
    learned = dense_net(neurons=[{"name": "plif"}, {}])
    refuses("blocks.0.neuron is ParametricLIF, which learns its leak, and rates carry no gradient", learned)
    learned.blocks[0].neuron.requires_grad_(False)
    x, y = constant()
    got, _ = run(learned, x, y)
    assert got["blocks.0.synapse.weight"].norm() > 0
    refuses("share='layer'", create_model("har_mlp", input_shape=(7,), hidden=8, share="layer", strategy="bptt"))
    grouped = dense_net((7, 8))
    grouped.blocks[0].neuron.groups = 2
    refuses("LIF with groups=2", grouped)


def test_strategies_that_run_units_again():
    for strategy in ("checkpoint", "step_checkpoint", "replay"):
        refuses(f"SpikingNetwork has strategy='{strategy}'", use_strategy(dense_net(), strategy))
    refuses(r"blocks.0 \(and blocks.1\) runs lean.*use_strategy", use_strategy(dense_net(), "lean:spikes"))


def test_a_neuron_that_is_used_twice_in_a_step():
    unit = SpikingLinear(7, 7, norm="none")
    net = SpikingNetwork([unit, unit, Readout(7, 3)], input_shape=(7,)).double()
    refuses("blocks.0.neuron is used twice in one step", net)


def test_losses_shapes_and_options():
    refuses(
        r"CrossEntropySteps \(ce_steps\) reads more than the mean of the logits.*loss=ce_mean",
        dense_net(),
        loss=create_loss("ce_steps"),
    )
    refuses("TET .* reads more", dense_net(), loss=create_loss("tet"))
    refuses("CrossEntropyHeads .* reads more", dense_net(), loss=create_loss("ce_heads"))
    refuses("cross_entropy reads more", dense_net(), loss=F.cross_entropy)
    x, y = sample(T=4)
    refuses("A static input needs a time axis: encoding.repeat", dense_net(), error=ShapeError, x=x[0])
    refuses("expected at least one time step and one sample", dense_net(), error=ShapeError, x=x[:0])
    refuses("depends on none; free a parameter", dense_net().requires_grad_(False), error=OptionError)
    refuses(r"expected targets \(4,\).*sltt", dense_net(), error=ShapeError, y=y.expand(4, 4))
    with pytest.raises(OptionError, match="rate: grad_scale must be a finite number > 0, got 0"):
        rate(grad_scale=0)
    with pytest.raises(OptionError, match=r"got RateRule.*rate\(\) goes with drive_rate"):
        drive(dense_net(), x, y, LOSS, rate())
    with pytest.raises(OptionError, match=r"drive_rate: expected rate\(\), got TraceRule.*drive"):
        drive_rate(dense_net(), x, y, LOSS, sltt())
