"""What rules refuse, and what their messages say: who, what was expected, what came, what to do."""

import pytest
import torch
from reference import Quadratic, dense_net, error, gradients, sample
from torch import nn

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers import Readout, SpikingAttention, SpikingConv2d, SpikingLinear
from spikefit.losses import TET, create_loss
from spikefit.models import SpikingNetwork
from spikefit.rules import TBPTT, EveryK, RandomK, TopActivity, TraceRule, drive, ndot, ottt, sltt, tbptt
from spikefit.rules.driver import detached

LOSS = Quadratic()


def refuses(error, match, net, rule, *, x=None, y=None, loss=LOSS, **options):
    shape = net.input_shape if hasattr(net, "input_shape") else (7,)
    made = sample(T=4, shape=shape)
    with pytest.raises(error, match=match):
        drive(net, made[0] if x is None else x, made[1] if y is None else y, loss, rule, **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TraceRule(mu="tau"), "mu must be one of zero, leak, ratio, got 'tau'"),
        (lambda: sltt(k=0), "k must be a whole number of at least 1, got 0"),
        (lambda: sltt(k=2, sampler=RandomK(2)), "drop one"),
        (lambda: tbptt(0), "tbptt: k must be"),
        (lambda: TBPTT(k=True), "tbptt: k must be"),
        (lambda: ottt(lag=1), "lag belongs to mu='ratio'"),
        (lambda: ndot(lag=2), "lag must be 0 or 1 steps, got 2"),
        (lambda: ottt(grad_scale=0), "grad_scale must be a finite number > 0, got 0"),
        (lambda: ottt(loss_norm="k"), "loss_norm must be one of K, T, got 'k'"),
        (lambda: ottt(trace_first=1), "trace_first must be True or False, got 1"),
        (lambda: ottt(trace_dtype=torch.float16), "trace_dtype must be torch.float32, torch.bfloat16 or None"),
        (lambda: sltt(update_every="batch"), "update_every must be one of sequence, step, got 'batch'"),
        (lambda: EveryK(3, 3), "offset must be 'random' or a whole number of at least 0 and below k=3, got 3"),
        (lambda: TopActivity(0), r"p must lie in \(0, 1\], got 0"),
        (lambda: RandomK(5).draw(4), "k of at most T = 4, the steps of the sequence, got 5"),
        (lambda: EveryK(9, 5).draw(4), "an offset below T = 4"),
    ],
)
def test_options(make, match):
    with pytest.raises(OptionError, match=match):
        make()


def test_steps_by_activity_are_not_known_in_advance():
    refuses(
        StrategyError,
        "TopActivity.*Use look_ahead=True.*or RandomK or EveryK",
        dense_net(),
        sltt(sampler=TopActivity(0.5)),
    )
    with pytest.raises(StrategyError, match=r"TopActivity.*use look_ahead=True, or RandomK or EveryK"):
        TopActivity(0.5).draw(4)


def test_models_and_losses_that_need_all_steps():
    over_time = create_model("har_conv", timesteps=8, input_shape=(7,), norm="step_bn").double()
    refuses(
        StrategyError,
        r"blocks.0 \(and blocks.3, blocks.5\) is SpikingConv1d and needs all time steps at once",
        over_time,
        sltt(),
    )
    whole = create_model("har_mlp", input_shape=(7,), norm="bn").double()
    refuses(StrategyError, r"blocks.0.norm \(and 3 more\) is BatchNorm and needs all T steps.*step_bn", whole, sltt())
    refuses(
        StrategyError,
        r"the loss CrossEntropyMean \(ce_mean\) needs the logits of all steps.*loss=tet",
        dense_net(),
        ottt(),
        loss=create_loss("ce_mean"),
    )
    refuses(
        StrategyError,
        "the loss cross_entropy needs.*CrossEntropySteps",
        dense_net(),
        ottt(),
        loss=nn.functional.cross_entropy,
    )
    refuses(StrategyError, "rule sltt: Linear has no init_state and step", nn.Linear(7, 3), sltt())


def test_models_with_a_readout_at_the_last_step_alone():
    net = create_model("trevsnn_mini", num_classes=3)
    x, y = sample(T=net.timesteps or 4, shape=net.input_shape)
    refuses(StrategyError, "rule sltt: TRevSNN has a read-out at some steps only", net, sltt(), x=x.float(), y=y)


def test_shapes_and_updates():
    x, y = sample(T=4)
    refuses(ShapeError, r"rule sltt: expected x as \[T, B, ...\]", Alone(), sltt(), x=x[0, 0])
    refuses(ShapeError, r"with T of at least 1, got \(0, 4, 7\)", Alone(), sltt(), x=x[:0])
    refuses(ShapeError, r"at least one time step and one sample, got .*\(0, 4, 7\)", dense_net(), sltt(), x=x[:0])
    # targets of images without a time axis fit nothing, and are not what is wrong
    refuses(ShapeError, r"A static input needs a time axis: encoding.repeat", dense_net(), sltt(), x=x[0])
    refuses(ShapeError, r"expected targets \(4,\), or \(4, 4\)", dense_net(), sltt(), y=y[:2])
    refuses(ShapeError, r"TET: expected int64 .* call targets.long", dense_net(), sltt(), y=y.float(), loss=TET())
    refuses(OptionError, "depends on none; free a parameter", dense_net().requires_grad_(False), sltt())
    refuses(StrategyError, "Give the model inside a data-parallel wrapper", nn.DataParallel(dense_net()), sltt())
    refuses(OptionError, "a function that steps the optimiser", dense_net(), sltt(update_every="step"))
    refuses(OptionError, "goes with no update", dense_net(), sltt(), update=lambda: None)


@pytest.mark.parametrize("rule", [ottt(), ndot()], ids=lambda r: r.name)
def test_traces_never_miss_a_backward_that_runs_again(rule):
    for strategy in ("checkpoint", "step_checkpoint", "replay"):
        refuses(StrategyError, f"has strategy='{strategy}', whose.*use sltt", use_strategy(dense_net(), strategy), rule)


def test_membranes_without_one_leak():
    shared = create_model("har_mlp", input_shape=(7,), hidden=8, share="layer", strategy="bptt").double()
    refuses(StrategyError, "share='layer', where no single leak", shared, ottt())
    grouped = Alone()
    grouped.unit.neuron.groups = 7
    refuses(StrategyError, "rule ottt: unit.neuron is LIF with groups=7", grouped, ottt())
    node = SpikingNetwork([SpikingLinear(7, 8, norm="none", neuron="two_group"), Readout(8, 3)], input_shape=(7,))
    refuses(StrategyError, "TwoGroupNode with a forward of its own", node.double(), ottt())


def test_ratios_of_membranes():
    refuses(
        StrategyError,
        r"blocks.0.neuron \(and blocks.1.neuron\) has a hard reset, and ndot needs a soft reset",
        dense_net(v_reset=0.0),
        ndot(),
    )
    refuses(StrategyError, "a membrane on a grid.*frac_bits=8", dense_net(frac_bits=8), ndot())
    pooled = [SpikingConv2d(2, 3, norm="none", pool="max"), SpikingConv2d(3, 3, norm="none")]
    net = SpikingNetwork(pooled, input_shape=(2, 4, 4)).double()
    refuses(StrategyError, "rule ndot: no neuron can be told behind the max pool of blocks.0 .*pool='avg'", net, ndot())


class Own(nn.Module):
    """A block of a user: a linear map of its own around a unit."""

    def __init__(self, plain=True, past=False):
        super().__init__()
        self.unit, self.past = SpikingLinear(7, 7, norm="none"), past
        self.plain = nn.Linear(7, 7) if plain else nn.Identity()

    def forward(self, x, state=None):
        if self.past:
            return self.unit.neuron(self.unit.synapse(x), state)
        return self.unit(self.plain(x), state)

    def init_state(self, batch_size, shape, **options):
        return None, shape


def test_parameters_that_no_trace_reaches():
    def made(block):
        return SpikingNetwork([block, Readout(7, 3)], input_shape=(7,)).double()

    refuses(
        StrategyError,
        r"blocks.0.plain.weight \(and blocks.0.plain.bias\) is trained and belongs to no synapse",
        made(Own()),
        ottt(),
    )
    frozen = made(Own())
    frozen.blocks[0].plain.requires_grad_(False)
    drive(frozen, *sample(T=3), LOSS, ottt())
    # a unit that feeds no neuron that is known, behind which all is as it was
    unit = SpikingLinear(7, 7, norm="step_bn", neuron=None)
    ahead = SpikingNetwork([unit, SpikingLinear(7, 7, norm="none"), Readout(7, 3)], input_shape=(7,)).double()
    refuses(StrategyError, r"rule ottt: blocks.0.synapse.weight \(and .*\) is trained", ahead, ottt())
    unit.requires_grad_(False)
    drive(ahead, *sample(T=3), LOSS, ottt())
    assert ahead.blocks[1].synapse.weight.grad.norm() > 0
    past = made(Own(plain=False, past=True))
    refuses(StrategyError, r"blocks.0.unit.synapse \(Linear\) was not applied in the first step", past, ottt())
    drive(past, *sample(T=3), LOSS, sltt())
    attention = SpikingNetwork(
        [SpikingAttention(8, norm="none"), SpikingConv2d(8, 3, norm="none")], input_shape=(8, 2, 2)
    )
    # the parameters inside are of no unit with a neuron, which is said of the block alone
    refuses(StrategyError, "rule ottt: blocks.0 is SpikingAttention and multiplies two", attention.double(), ottt())
    refuses(StrategyError, "trace_first=False.*none was found in Alone", Alone(), ottt(trace_first=False))


class Alone(nn.Module):
    """A unit outside a `SpikingNetwork`, used once or twice a step."""

    def __init__(self, uses=1):
        super().__init__()
        self.unit, self.uses = SpikingLinear(7, 7, norm="none").double(), uses

    def init_state(self, batch_size, shape):
        return [None] * self.uses

    def step(self, x_t, state):
        out, after = x_t[None], []
        for v in state:
            out, v = self.unit(out, v)
            after.append(v)
        return out[0], after


def test_a_synapse_that_is_used_twice_in_a_step():
    refuses(StrategyError, "unit.synapse is used twice in one step", Alone(uses=2), ottt())
    drive(Alone(uses=2), *sample(T=3), LOSS, sltt())


def test_states_that_cannot_be_cut():
    class Holder:
        pass

    with pytest.raises(StrategyError, match=r"rule sltt: expected a state of tensors.*got Holder"):
        detached((torch.zeros(1), [Holder()]), "rule sltt")
    v = torch.ones(1, requires_grad=True) * 2
    state = detached((v, {"a": [v, None]}, 3), "rule sltt")
    assert not state[0].requires_grad
    assert not state[1]["a"][0].requires_grad
    assert state[1]["a"][1] is None


def test_other_views_of_a_repeated_input():
    class Halves(Alone):
        def init_state(self, batch_size, shape):
            return 0, None

        def step(self, x_t, state):
            out, v = self.unit(x_t[None, :, state[0] : state[0] + 7], state[1])
            return out[0], (state[0] + 1, v)

    x = torch.ones(1, 4, 9, dtype=torch.float64).expand(3, 4, 9)
    refuses(StrategyError, r"unit.synapse reads another part.*contiguous", Halves(), sltt(), x=x)
    drive(Halves(), x.contiguous(), sample()[1], Quadratic(), sltt())


def test_compiled_steps_are_served_or_refused_and_never_missed():
    net, (x, y) = dense_net(), sample(T=3)
    drive(net, x, y, LOSS, ottt())
    wanted = gradients(net)
    net(x)  # a compiled graph without a rule, which must not be used under one
    net.step = torch.compile(net.step, backend="eager")
    net.step(x[0], net.init_state(4))
    drive(net, x, y, LOSS, ottt())
    assert error(gradients(net), wanted) <= 1e-12
    net.step = torch.compile(type(net).step.__get__(net), backend="eager", fullgraph=True)
    refuses(Exception, "fullgraph", net, ottt())
