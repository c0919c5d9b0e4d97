"""The loop over time: what is chosen, cut, computed once, kept and moved, on small networks of the zoo."""

import copy

import pytest
import torch
from reference import Quadratic, bptt, dense_net, error, gradients, held_at_most, sample
from torch import nn

from spikefit import create_model, use_strategy
from spikefit.encoding import repeat
from spikefit.layers import Dropout, Readout, SpikingConv2d, SpikingLinear, SpikingUnit
from spikefit.layers.norm import BatchNorm, StepBatchNorm
from spikefit.losses import create_loss
from spikefit.models import SpikingNetwork
from spikefit.rules import AllSteps, EveryK, RandomK, drive, ndot, ottt, sltt, tbptt

LOSS = Quadratic()
NEURON = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.5}


def har(norm="step_bn", **options):
    torch.manual_seed(0)
    options = {"neuron": NEURON, "hidden": 12, "num_classes": 3, **options}
    return louder(create_model("har_mlp", norm=norm, **options))


def vgg6(norm="step_bn", **options):
    torch.manual_seed(0)
    options = {"neuron": NEURON, "width": 0.1, "num_classes": 3, "input_shape": (2, 8, 8), "pool": "avg", **options}
    return louder(create_model("vgg6", norm=norm, **options))


def louder(net):
    """In float64, and without a norm with weights that let deep layers fire."""
    with torch.no_grad():
        for unit in (m for m in net.modules() if isinstance(m, SpikingUnit) and m.norm is None):
            getattr(unit.synapse, "gain", unit.synapse.weight).mul_(3)
            unit.synapse.bias.fill_(0.1)
    return net.double()


NETS = {"har_mlp": (har, (9,)), "vgg6": (vgg6, (2, 8, 8))}


def buffers(net):
    return {n: b.clone() for n, b in net.named_buffers()}


def run(net, x, y, rule, loss=LOSS, **options):
    net.zero_grad()
    outcome = drive(net, x, y, loss, rule, **options)
    return gradients(net), outcome


@pytest.mark.parametrize("loss", ["quadratic", "tet", "ce_steps"])
@pytest.mark.parametrize("norm", ["step_bn", "ws", "none"])
@pytest.mark.parametrize("name", NETS)
def test_sltt_is_tbptt_of_one_step_bit_for_bit(name, norm, loss):
    make, shape = NETS[name]
    x, y = sample(T=6, shape=shape)
    loss = LOSS if loss == "quadratic" else create_loss(loss)
    got, wanted = (run(make(norm), x, y, rule, loss) for rule in (sltt(), tbptt(1)))
    assert all(g.norm() > 0 for n, g in wanted[0].items() if "weight" in n)
    for n in wanted[0]:
        assert torch.equal(got[0][n], wanted[0][n]), n
    assert torch.equal(got[1].loss, wanted[1].loss)


@pytest.mark.parametrize("rule", [sltt(), ottt(), ndot(), tbptt(3), sltt(k=2), ottt(sampler=EveryK(2, 1))], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_outputs_loss_and_statistics_are_those_of_stepping(name, rule):
    make, shape = NETS[name]
    x, y = sample(T=6, shape=shape)
    net, other = make(), make()
    _, outcome = run(net, x, y, rule, generator=torch.Generator().manual_seed(0))
    state, logits = other.init_state(4), []
    for x_t in x:
        logits_t, state = other.step(x_t, state)
        logits.append(logits_t.detach())
    total = logits[0].clone()
    for logits_t in logits[1:]:
        total += logits_t
    assert torch.equal(outcome.logits, total)
    steps = [LOSS.step(logits[t], y) for t in outcome.steps]
    torch.testing.assert_close(outcome.loss, sum(steps) / len(steps), rtol=1e-12, atol=0)
    moved = buffers(net)
    assert int(moved["blocks.0.norm.num_batches_tracked"]) == 6
    for n, b in buffers(other).items():
        assert torch.equal(moved[n], b), n


def test_steps_that_are_not_chosen_move_state_and_traces():
    # the gradient of the last step alone is that of the last loss alone, as exact as that of all
    net, (x, y) = dense_net((7, 8), tau=2.0), sample(T=5)
    got, outcome = run(net, x, y, ottt(sampler=EveryK(5, 4)))
    assert outcome.steps == (4,)
    LOSS.step(net(x)[-1], y).backward()
    assert error(got, gradients(net)) <= 1e-12


def test_samplers():
    generator = torch.Generator().manual_seed(0)
    assert AllSteps().draw(3) == (0, 1, 2)
    drawn = [RandomK(2).draw(4, generator) for _ in range(200)]
    assert all(len(s) == 2 and s[0] < s[1] for s in drawn)
    assert len(set(drawn)) == 6, "every pair is drawn, anew for every batch"
    assert EveryK(3, 1).draw(8) == (1, 4, 7)
    assert {EveryK(3).draw(7, generator) for _ in range(50)} == {(0, 3, 6), (1, 4), (2, 5)}
    assert {EveryK(9).draw(2, generator) for _ in range(50)} == {(0,), (1,)}


def calls_of(function, monkeypatch, where):
    """The number of calls of torch's own `where` during `function()`."""
    count, true = [0], getattr(torch.nn.functional, where)

    def counted(*args, **kwargs):
        count[0] += 1
        return true(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, where, counted)
    function()
    monkeypatch.setattr(torch.nn.functional, where, true)
    return count[0]


@pytest.mark.parametrize(
    "rule", [sltt(), ottt(), tbptt(2), sltt(sampler=EveryK(2, 1)), ottt(sampler=EveryK(3, 2))], ids=str
)
@pytest.mark.parametrize("norm", ["step_bn", "ws"])
def test_a_static_image_passes_the_first_synapse_once(rule, norm, monkeypatch):
    images = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, static = torch.tensor([0, 1, 2, 0]), repeat(images, 6)
    wanted, plain = run(vgg6(norm), static.contiguous(), y, rule)
    got, outcome = run(vgg6(norm), static, y, rule)
    assert error(got, {n: g for n, g in wanted.items() if g.norm() > 1e-9}) <= 1e-12
    assert torch.equal(outcome.logits, plain.logits)
    calls = [
        calls_of(lambda x=x: run(vgg6(norm), x, y, rule), monkeypatch, "conv2d") for x in (static, static.contiguous())
    ]
    assert calls[1] - calls[0] == 5, "5 of 6 calls of the first of six convolutions are saved"


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("rule", [sltt(), sltt(sampler=EveryK(2, 1)), tbptt(2), ottt(trace_first=False)], ids=str)
def test_the_norm_behind_a_static_image_runs_once_and_moves_its_statistics_by_all_steps(rule, momentum, monkeypatch):
    images = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, static, calls = torch.tensor([0, 1, 2, 0]), repeat(images, 6), []
    normalised = BatchNorm.normalised

    def counted(norm, *arguments):
        calls.append(norm)
        return normalised(norm, *arguments)

    monkeypatch.setattr(BatchNorm, "normalised", counted)
    nets = []
    for x in (static, static.contiguous()):
        net = vgg6()
        for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
            norm.momentum = momentum
        calls.clear()
        found, _ = run(net, x, y, rule)
        nets.append((net, found, calls.count(net.blocks[0].norm), len(calls)))
    (got, gradients_got, once, all_of_got), (wanted, gradients_wanted, often, all_of_wanted) = nets
    assert (once, often, all_of_wanted - all_of_got) == (1, 6, 5)
    assert error(gradients_got, {n: g for n, g in gradients_wanted.items() if g.norm() > 1e-9}) <= 1e-12
    for (name, a), b in zip(got.named_buffers(), wanted.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_norm_of_ones_own_behind_a_static_image_runs_in_every_step():
    class GainPerStep(StepBatchNorm):
        """A gain for each step, as in TEBN."""

        def __init__(self, channels):
            super().__init__(channels)
            self.gains, self.t = nn.Parameter(torch.linspace(0.5, 1.5, 6)), 0

        def normalised(self, z, weight, bias, repeats=1):
            self.t += 1
            x, *statistics = super().normalised(z, weight, bias, repeats)
            return x * self.gains[(self.t - 1) % 6], *statistics

    static, y = repeat(torch.rand(4, 2, 8, 8, dtype=torch.float64), 6), torch.tensor([0, 1, 2, 0])
    found = []
    for x in (static, static.contiguous()):
        net = vgg6()
        net.blocks[0].norm = GainPerStep(net.blocks[0].norm.channels).double()
        found.append(run(net, x, y, sltt())[0])
    assert error(found[0], {n: g for n, g in found[1].items() if g.norm() > 1e-9}) <= 1e-12


@pytest.mark.parametrize("rule", [sltt(sampler=EveryK(2, 1)), ottt(trace_first=False, sampler=EveryK(2, 1))], ids=str)
def test_a_static_image_reaches_the_first_synapse_in_half_precision_from_a_later_step(rule):
    images, y = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3
    static, around = repeat(images, 4), lambda: torch.autocast("cpu", torch.bfloat16)
    got, wanted = (run(vgg6().float(), x, y, rule, create_loss("tet"), around=around)[0] for x in (static, static + 0))
    first = "blocks.0.synapse.weight"
    assert wanted[first].norm() > 0
    assert error({first: got[first]}, {first: wanted[first]}) <= 0.05


@pytest.mark.parametrize("rule", [sltt(), ottt()], ids=lambda r: r.name)
@pytest.mark.parametrize("norm", ["none", "ws"])
def test_gradients_of_many_steps_are_not_summed_in_half_precision(rule, norm):
    torch.manual_seed(1)
    net = SpikingNetwork([SpikingLinear(32, 64, norm=norm), Readout(64, 4)], input_shape=(32,))
    static, y = repeat(torch.rand(16, 32), 256), torch.arange(16) % 4
    around = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    wanted, _ = run(net, static.contiguous(), y, rule, create_loss("tet"), around=around)
    got, _ = run(net, static, y, rule, create_loss("tet"), around=around)
    assert error(got, wanted) <= 0.02


def test_the_loss_is_that_of_the_steps_whatever_the_gradient_is_scaled_by():
    x, y = sample(T=6)
    chosen = {"sampler": EveryK(3, 1)}
    plain, scaled = (run(dense_net(), x, y, sltt(loss_norm=n, **chosen)) for n in ("K", "T"))
    assert torch.equal(plain[1].loss, scaled[1].loss)
    assert error(scaled[0], {n: g / 3 for n, g in plain[0].items()}) <= 1e-12


def test_a_loss_of_ones_own_reads_logits_and_classes():
    class Own:
        splits_per_step = reads_mean = True

        def step(self, logits, targets):
            return nn.functional.cross_entropy(logits, targets)

    x, y = sample(T=4)
    wanted, _ = run(dense_net(), x, y, sltt(), create_loss("ce_steps"))
    got, _ = run(dense_net(), x, y, sltt(), Own())
    # the library takes logarithms in float32
    assert error(got, wanted) <= 1e-5


def test_a_stem_that_is_shared_without_a_leaf_raises():
    net, (x, y) = har("none"), sample(T=2, shape=(9,))

    class Naive(nn.Module):
        init_state = net.init_state

        def step(self, x_t, state):
            if not hasattr(self, "made"):
                self.made = net.blocks[0](x[:1])[0]
            rest, after = self.made, []
            for block, before in zip(net.blocks[1:], state[1:], strict=True):
                rest, s = block(rest, before)
                after.append(s)
            return rest[0], (state[0], *after)

    with pytest.raises(RuntimeError, match="second time"):
        drive(Naive(), x, y, LOSS, sltt())


@pytest.mark.parametrize("rule", [sltt(), ottt()], ids=lambda r: r.name)
def test_a_standardised_weight_is_computed_once_and_per_step_with_updates_in_between(rule, monkeypatch):
    from spikefit.layers import weight

    count, true = [0], weight._standardize
    monkeypatch.setattr(weight, "_standardize", lambda *a: (count.__setitem__(0, count[0] + 1), true(*a))[1])
    x, y = sample(T=6, shape=(9,))
    once, _ = run(har("ws"), x, y, rule)
    assert count[0] == 4
    per_step, _ = run(har("ws"), x, y, type(rule)(mu=rule.mu, update_every="step"), update=lambda: None)
    assert count[0] == 4 + 4 * 6
    assert error(once, per_step) <= 1e-12


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("norm", ["ws", "none"])
def test_updates_behind_every_step_see_the_weights_of_their_step(norm, static):
    net, other, (x, y) = har(norm), har(norm), sample(T=5, shape=(9,))
    x = repeat(x[0], 5) if static else x
    optimizer, twin = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, other))

    def update():
        optimizer.step()
        optimizer.zero_grad()

    drive(net, x, y, LOSS, sltt(update_every="step"), update=update)
    state = other.init_state(4)
    for x_t in x:
        twin.zero_grad()
        logits, state = other.step(x_t, state)
        (LOSS.step(logits, y) / 5).backward()
        twin.step()
        state = tuple(v if v is None else v.detach() for v in state)
    for (n, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=n)


def test_one_dropout_mask_per_sequence():
    class Keep(nn.Module):
        def forward(self, x, state=None):
            self.seen = [*getattr(self, "seen", []), (x != 0)]
            return x, None

        def init_state(self, batch_size, shape, **options):
            return None, shape

    keep = Keep()
    first = SpikingLinear(9, 40, norm="none", neuron={**NEURON, "v_threshold": 1e-6})
    with torch.no_grad():
        first.synapse.weight.abs_()
    net = SpikingNetwork([first, Dropout(0.5), keep, Readout(40, 3)], input_shape=(9,)).double()
    x, y = torch.ones(5, 4, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(5)
    got, _ = run(net, x, y, ottt())
    assert len({tuple(s.flatten().tolist()) for s in keep.seen}) == 1
    assert 0.3 < keep.seen[0].double().mean() < 0.7
    keep.seen = []
    # the same draw, and the mask it makes as a fixed layer
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(1, 4, 40, dtype=torch.float64), 0.5)
    keep.forward = lambda x, state=None: (x * mask, None)
    net.blocks[1].p = 0.0
    LOSS(net(x), y).backward()
    assert error(got, gradients(net)) <= 1e-12
    net.eval()
    assert torch.equal(net.blocks[1](x)[0], x)


def test_labels_of_every_step_count_as_in_the_whole_loss():
    net, (x, _) = dense_net((7, 8), tau=1.0), sample(T=4)
    net = net.float()
    y = torch.tensor([[0, 1, -1, 2], [-1, -1, -1, -1], [1, 1, 1, 1], [2, -1, 0, -1]])
    loss = create_loss("ce_steps")
    got, outcome = run(net, x.float(), y, sltt(), loss)
    whole = loss(net(x.float()), y)
    whole.backward()
    torch.testing.assert_close(outcome.loss, whole.detach())
    assert error(got, gradients(net)) <= 1e-5


def test_backward_and_surroundings_are_those_handed_in():
    net, (x, y) = har(), sample(T=4, shape=(9,))
    wanted, _ = run(net, x, y, sltt())
    calls = []

    def scaled(value):
        calls.append(torch.is_autocast_enabled("cpu"))
        (8 * value).backward()

    got, _ = run(har(), x, y, sltt(), backward=scaled)
    assert calls == [False] * 4
    assert error(got, {n: 8 * g for n, g in wanted.items() if g.norm() > 1e-9}) <= 1e-12
    calls.clear()
    wide = create_model("har_mlp", norm="ws", neuron=NEURON, hidden=12, num_classes=3)
    inside, _ = run(wide, x.float(), y, ottt(), around=lambda: torch.autocast("cpu", torch.bfloat16), backward=scaled)
    outside, _ = run(wide, x.float(), y, ottt(), backward=scaled)
    assert calls == [False] * 8, "backward runs outside"
    assert error(inside, outside, "3.synapse.weight") < 0.5
    assert error(inside, outside, "3.synapse.weight") > 0


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", [sltt(), ottt(), ndot(), tbptt(2), sltt(k=2)], ids=lambda r: r.name)
def test_what_is_held_for_backward_does_not_grow_with_the_sequence(rule, name, static):
    make, shape = NETS[name]

    def at(T, rule):
        net, (x, y) = make(), sample(T=T, shape=shape)
        x = repeat(x[0], T) if static else x
        return held_at_most(net, x, lambda: bptt(net, x, y, LOSS) if rule is None else run(net, x, y, rule))

    found = [at(T, rule) for T in (2, 4, 8, 16)]
    assert found[0] > 0
    assert len(set(found)) == 1, found
    assert at(16, None) > at(4, None) > at(2, None) > 0


def test_nothing_of_the_graph_is_left_in_the_outcome_or_the_model():
    net, (x, y) = har("ws"), sample(T=3, shape=(9,))
    before = {m: set(vars(m)) for m in net.modules()}
    keys = list(net.state_dict())
    outcome = drive(net, x, y, LOSS, ottt())
    assert not outcome.loss.requires_grad
    assert not outcome.logits.requires_grad
    assert {m: set(vars(m)) for m in net.modules()} == before
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("strategy", ["lean:spikes", "lean:input", "checkpoint", "step_checkpoint"])
@pytest.mark.parametrize("norm", ["step_bn", "ws"])
def test_sltt_over_exact_strategies_is_sltt(strategy, norm):
    x, y = sample(T=4, shape=(2, 8, 8))
    wanted, plain = run(vgg6(norm), x, y, sltt())
    got, outcome = run(use_strategy(vgg6(norm), strategy), x, y, sltt())
    assert torch.equal(outcome.logits, plain.logits)
    assert error(got, {n: g for n, g in wanted.items() if g.norm() > 1e-9}) <= 1e-12


def test_sltt_over_reversible_depth_is_sltt():
    x, y = sample(T=3, shape=(3, 16, 16))
    torch.manual_seed(0)
    net = create_model("revsresnet21", norm="step_bn", num_classes=3, neuron=NEURON, input_shape=(3, 16, 16))
    twin = use_strategy(copy.deepcopy(net), "reversible")
    wanted, plain = run(net, x.float(), y, sltt())
    got, outcome = run(twin, x.float(), y, sltt())
    assert torch.equal(outcome.logits, plain.logits)
    assert error(got, {n: g for n, g in wanted.items() if g.norm() > 1e-4}) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_of_lower_precision_are_close(dtype):
    net, (x, y) = dense_net((7, 8, 6), tau=3.0), sample()  # a leak of 2/3: traces are no short numbers
    wanted, _ = run(net, x, y, ottt())
    got, _ = run(net, x, y, ottt(trace_dtype=dtype))
    assert 0 < error(got, wanted) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_values_under_a_rule_are_those_of_the_layers():
    # without a norm the static and the dense sequence, and a repeated one in eval mode, take the same rows
    for norm in ("none", "ws", "step_bn"):
        net, (x, y) = vgg6(norm), sample(T=4, shape=(2, 8, 8))
        outcomes = [run(vgg6(norm), x, y, rule)[1] for rule in (sltt(), ottt(), ndot())]
        total = net(x).detach()
        whole = total[0] + total[1] + total[2] + total[3]
        assert all(torch.equal(o.logits, whole) for o in outcomes), norm


def test_norms_in_evaluation_move_no_statistics():
    net, (x, y) = vgg6(), sample(T=3, shape=(2, 8, 8))
    for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
        norm.eval()
    before = buffers(net)
    drive(net, x, y, LOSS, ottt())
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_a_frozen_first_layer_trains_the_rest():
    net, (x, y) = vgg6("ws"), sample(T=3, shape=(2, 8, 8))
    wanted, _ = run(vgg6("ws"), x, y, ottt())
    net.blocks[0].requires_grad_(False)
    run(net, repeat(x[0], 3), y, ottt())
    got, _ = run(net, x, y, ottt())
    assert got["blocks.0.synapse.weight"].norm() == 0
    assert error(got, {n: g for n, g in wanted.items() if not n.startswith("blocks.0")}) <= 1e-12


def test_two_dimensional_convolutions_of_a_unit_alone():
    # a module of its own with init_state and step is driven too
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.unit = SpikingConv2d(2, 3, norm="none", neuron=NEURON)

        def init_state(self, batch_size, shape):
            return (None,)

        def step(self, x_t, state):
            spikes, v = self.unit(x_t[None], state[0])
            return spikes[0].mean((2, 3)), (v,)

    own, (x, y) = Own().double(), sample(T=6, shape=(2, 5, 5))
    got, _ = run(own, x, y, ottt())
    LOSS(own.unit(x)[0].mean((3, 4)), y).backward()
    assert error(got, gradients(own)) <= 1e-12
