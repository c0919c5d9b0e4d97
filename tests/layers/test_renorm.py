"""Online renormalisation: the value of evaluation, the gradient of batch norm, one move per sequence."""

import pytest
import torch
from torch import nn

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, StrategyError
from spikefit.layers import (
    BatchNorm,
    Chain,
    OnlineRenorm,
    SpikingConv2d,
    SpikingLinear,
    StepBatchNorm,
    TwoStreams,
    create_norm,
    frozen_statistics,
)
from spikefit.layers.coupled_steps import CoupledSteps, Head
from spikefit.layers.gains import Gains
from spikefit.layers.running import Sums
from spikefit.models import SpikingNetwork
from spikefit.ops.norm import Moments, moments
from support import dyadic, saved_bytes

SHAPES = [(4, 3, 5), (3, 2, 4, 6), (3, 2, 4, 3, 5), (1, 4, 3, 2, 2)]
BACKENDS = ["reference", "numba"]


def sequence(shape=(3, 2, 4, 3, 5), dtype=torch.float64, seed=0):
    """A sequence whose steps differ in mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator, dtype=dtype)
    steps = torch.arange(shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    return z * (1 + steps / 2) + steps - 1


def filled(norm, seed=0):
    """`norm` in its dtype with random parameters and running statistics that it has seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -1), (norm.running_mean, -1), (norm.running_var, 0.5)):
            tensor.copy_(low + 2 * torch.rand(tensor.shape, generator=generator))
        norm.num_batches_tracked.fill_(1)
    return norm


def run(norm, z, seed=3):
    """(x, dz, dweight, dbias) for a random gradient of x."""
    z = z.clone().requires_grad_()
    x = norm(z)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return x.detach(), *torch.autograd.grad((x * g).sum(), [z, norm.weight, norm.bias])


def by_channel(v, ndim):
    """[T, C] or [1, C] as [T, 1, C, 1, ...]."""
    return v.view(len(v), 1, -1, *[1] * (ndim - 3))


def close(got, wanted, tolerance=1e-12):
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, *shape[1:]) for shape in SHAPES])
def test_is_batch_norm_where_running_statistics_are_those_of_the_step(shape, backend):
    z = sequence(shape)
    ours = filled(OnlineRenorm(shape[2], backend=backend).double())
    theirs = filled(StepBatchNorm(shape[2]).double())
    mean, var = moments(z, per_step=True)
    ours.running_mean.copy_(mean[0])
    ours.running_var.copy_(var[0])
    for got, wanted in zip(run(ours, z), run(theirs, z), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_that_of_evaluation_bit_for_bit(shape, dtype, backend):
    norm, z = filled(OnlineRenorm(shape[2], backend=backend).to(dtype)), sequence(shape).to(dtype)
    wanted = norm.eval()(z)
    got = norm.train()(z)
    assert torch.equal(got, wanted)
    assert not torch.equal(norm.eval()(z), wanted), "nothing has moved"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_is_that_of_batch_norm_times_p(shape, backend):
    z, ours, theirs = (
        sequence(shape),
        filled(OnlineRenorm(shape[2], backend=backend).double()),
        filled(StepBatchNorm(shape[2]).double()),
    )
    var = moments(z, per_step=True)[1]
    p = ((var + ours.eps) / (ours.running_var + ours.eps)).sqrt()
    normal = (z - by_channel(ours.running_mean[None], z.ndim)) / by_channel(
        (ours.running_var[None] + ours.eps).sqrt(), z.ndim
    )
    (_, got, d_weight, d_bias), (_, wanted, _, d_bias_wanted) = run(ours, z), run(theirs, z)
    close(got, wanted * by_channel(p, z.ndim))
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype)
    close(d_weight, (g * normal).sum([a for a in range(z.ndim) if a != 2]))
    close(d_bias, d_bias_wanted)
    assert ((p - 1).abs() > 0.05).any(), "p = 1 proves nothing"


def test_gradient_is_the_finite_difference_of_a_twin_with_constants():
    z, norm = sequence((2, 3, 2, 2)), filled(OnlineRenorm(2).double())
    mean, var = (by_channel(v, z.ndim) for v in moments(z, per_step=True))
    m_r, w_r = (by_channel(v[None].clone(), z.ndim) for v in (norm.running_mean, norm.running_var))
    p, o = ((var + norm.eps) / (w_r + norm.eps)).sqrt(), (mean - m_r) / (w_r + norm.eps).sqrt()

    def twin(z, weight, bias):
        m, w = z.mean((1, 3), keepdim=True), z.var((1, 3), keepdim=True, unbiased=False)
        normal = (z - m) / (w + norm.eps).sqrt()
        return by_channel(weight[None], z.ndim) * (normal * p + o) + by_channel(bias[None], z.ndim)

    inputs = [z, norm.weight.detach(), norm.bias.detach()]
    x, *got = run(norm, z)
    close(x, twin(*inputs))
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype)
    for k, found in enumerate(got):
        wanted = torch.zeros_like(found)
        for i in range(wanted.numel()):
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in inputs]
                moved[k].view(-1)[i] += sign * 1e-6
                values.append((twin(*moved) * g).sum())
            wanted.view(-1)[i] = (values[0] - values[1]) / 2e-6
        close(found, wanted, 1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_steps_add_up_to_mean_and_variance_of_all_samples(offset):
    z = sequence((5, 3, 4, 2)) + offset
    sums = None
    for z_t in z:
        mean, var = moments(z_t[None], per_step=True)
        sums = Sums.of(Moments(mean, var, 6), before=sums)
    rows = z.movedim(2, 0).flatten(1)
    torch.testing.assert_close(sums.mean, rows.mean(1), rtol=1e-12, atol=0)
    # the digits of z itself end here
    tolerance = 1e-12 if offset == 0 else 1e-9
    torch.testing.assert_close(sums.var, rows.var(1, unbiased=False), rtol=tolerance, atol=0)
    torch.testing.assert_close(sums.unbiased, rows.var(1), rtol=tolerance, atol=0)
    assert sums.values == 30


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_a_call_moves_running_statistics_once(momentum):
    ours, theirs = (filled(kind(4, momentum=momentum).double()) for kind in (OnlineRenorm, BatchNorm))
    for norm in (ours, theirs):
        for seed in range(3):
            norm(sequence(seed=seed))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
    close(ours.running_mean, theirs.running_mean)
    close(ours.running_var, theirs.running_var)


def test_the_first_sequence_gives_its_own_statistics():
    for momentum in (0.1, None):
        norm, z = OnlineRenorm(4, momentum=momentum).double(), sequence()
        x = norm(z)
        rows = z.movedim(2, 0).flatten(1)
        close(norm.running_mean, rows.mean(1))
        close(norm.running_var, rows.var(1))
        close(x, (z - by_channel(rows.mean(1)[None], 5)) / by_channel((rows.var(1)[None] + norm.eps).sqrt(), 5))
        assert norm.num_batches_tracked == 1
        wanted = norm.eval()(z)
        assert torch.equal(norm.train()(z), wanted), "the second sequence starts from the first"


def test_frozen_statistics_stay():
    norm, z = OnlineRenorm(4).double(), sequence()
    wanted = OnlineRenorm(4).double()(z)
    before = [b.clone() for b in norm.buffers()]
    with frozen_statistics([norm]):
        assert torch.equal(norm(z), wanted)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))


def test_a_repeated_step_counts_as_often_as_it_is_shown():
    found = []
    for repeats in (1, 5):
        norm, z = OnlineRenorm(4).double(), sequence((1, 2, 4, 3))
        x = norm(z.expand(5, -1, -1, -1)) if repeats == 1 else norm(z, repeats=5).expand(5, -1, -1, -1)
        found.append([x, norm.running_mean, norm.running_var])
    for got, wanted in zip(*found, strict=True):
        close(got, wanted)


def test_keys_are_those_of_batch_norm():
    norm, other = filled(OnlineRenorm(4), seed=1), nn.BatchNorm2d(4)
    assert norm.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(norm.state_dict())
    copy = OnlineRenorm(4)
    copy.load_state_dict(other.state_dict())
    z = sequence(dtype=torch.float32)
    torch.testing.assert_close(norm.eval()(z)[1], other.eval()(z[1]))
    assert torch.equal(norm.train()(z), copy(z))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), copy.buffers(), strict=True))


def test_by_name():
    norm = create_norm("osr", 3, momentum=0.2)
    assert type(norm) is OnlineRenorm
    assert (norm.time_scope, norm.momentum) == ("step", 0.2)
    torch.manual_seed(0)
    for name in ("vgg6", "resnet19"):
        net = create_model(name, num_classes=4, input_shape=(3, 32, 32), width=0.125, norm="osr")
        norms = [m for m in net.modules() if isinstance(m, OnlineRenorm)]
        assert norms
        assert all(type(m) is OnlineRenorm for m in net.modules() if isinstance(m, BatchNorm))
        net(torch.rand(2, 2, 3, 32, 32)).sum().backward()
        assert {int(m.num_batches_tracked) for m in norms} == {1}


def net(strategy=None, share="none", **options):
    """Convolutions behind each other, pooled, and a residual sum."""
    torch.manual_seed(0)
    blocks = [SpikingConv2d(3, 4, norm="osr", pool="max"), SpikingConv2d(4, 4, norm="osr", **options)]
    made = SpikingNetwork(
        [*blocks, SpikingConv2d(4, 6, norm="osr", pool="avg")],
        input_shape=(3, 8, 8),
        share=share,
        groups=2 if share == "channel" else 1,
        strategy=strategy,
    )
    return made.double()


def three_sequences(model):
    """Outputs, gradients and buffers of three sequences, the first of which finds no running statistics."""
    found = []
    for seed in range(3):
        x = (2 * dyadic(4, 2, *model.input_shape, low=-2, seed=seed)).double().requires_grad_()
        out = model(x)
        loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum()
        found += [out.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]
        found += [b.clone() for b in model.buffers()]
    return found


def same_as_bptt(made, plain):
    got, wanted = three_sequences(made), three_sequences(plain)
    buffers, values = len(list(plain.buffers())), len(list(plain.parameters())) + 2
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        place = i % (values + buffers)
        if place == 0 or place >= values:
            assert torch.equal(a, b), place
        else:
            close(a, b, 1e-10)
    assert wanted[0].std() > 0.02, "silent neurons prove nothing"


@pytest.mark.parametrize("strategy", ["checkpoint:1", "checkpoint:2", "lean:spikes", "lean:input", "replay"])
def test_backward_that_runs_again_sees_the_running_statistics_of_forward(strategy):
    same_as_bptt(net(strategy), net("bptt"))


def test_groups_of_channels_may_share_a_membrane():
    same_as_bptt(net("replay", share="channel"), net("bptt", share="channel"))


def test_residual_blocks_and_lean_units():
    make = lambda strategy: create_model(  # noqa: E731
        "resnet19", num_classes=3, input_shape=(3, 8, 8), width=0.0625, norm="osr", strategy=strategy
    )
    found = []
    for strategy in ("bptt", "lean:spikes"):
        torch.manual_seed(0)
        found.append(make(strategy).double())
    same_as_bptt(found[1], found[0])


def test_streams_run_backwards_in_depth():
    found = []
    for strategy in ("bptt", "reversible"):
        torch.manual_seed(0)
        half = lambda: Chain(  # noqa: E731
            SpikingConv2d(2, 2, norm="osr"), SpikingConv2d(2, 2, norm="osr", neuron=None)
        )
        blocks = [SpikingConv2d(3, 4, norm="osr"), TwoStreams([(half(), half()) for _ in range(2)])]
        found.append(SpikingNetwork(blocks, input_shape=(3, 6, 6), strategy=strategy).double())
    same_as_bptt(found[1], found[0])


def test_a_lean_unit_keeps_no_more_than_with_batch_norm():
    held = []
    for name in ("step_bn", "osr"):
        model = use_strategy(create_model("har_mlp", input_shape=(40,), hidden=64, norm=name), "lean:spikes")
        held.append(saved_bytes(lambda model=model: model(torch.rand(8, 4, 40))))
    assert held[1] == held[0]


def test_pieces_of_a_sequence_are_refused():
    with pytest.raises(StrategyError, match=r"step_checkpoint: blocks\.0\.norm needs the whole sequence.*'checkpoint'"):
        net("step_checkpoint")
    with pytest.raises(StrategyError, match=r"blocks\.0: inverse runs backwards step by step.*'replay'"):
        net("inverse")
    with pytest.raises(OptionError, match=r"share='layer' runs step by step, and blocks\.0\.norm needs the whole"):
        create_model("har_mlp", input_shape=(7,), hidden=8, share="layer", norm="osr")
    gains, branches = Gains((2,), 2, kind="free"), [[nn.Identity()], [nn.Identity()]]
    for parts in ({"shared": [OnlineRenorm(2)], "heads": {}}, {"heads": {"a": Head("state", OnlineRenorm(2))}}):
        with pytest.raises(OptionError, match=r"shared modules and heads.*use StepBatchNorm"):
            CoupledSteps(branches, gains, head_of={}, classes=2, **parts)


def test_a_step_outside_a_rule_is_a_sequence():
    model = net()
    norm = model.blocks[0].norm
    state, x = model.init_state(2), dyadic(3, 2, 3, 8, 8).double()
    for t in range(3):
        _, state = model.step(x[t], state)
        assert norm.num_batches_tracked == t + 1
    single = OnlineRenorm(4).double()
    for t in range(3):
        single(model.blocks[0]._weighted(x[t : t + 1]))
    close(norm.running_var, single.running_var)


def test_compiled_units_move_statistics_too():
    unit = SpikingLinear(5, 4, norm="osr")
    other = SpikingLinear(5, 4, norm="osr")
    other.load_state_dict(unit.state_dict())
    x = dyadic(4, 3, 5)
    run_once = torch.compile(unit, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(run_once(x)[0], other(x)[0])
    for got, wanted in zip(unit.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
