"""Steps chosen by activity: the most active ones call backward, and the pass that ranks them leaves nothing behind."""

import pytest
import torch
from reference import Quadratic, dense_net, error, gradients, held_at_most, sample

from spikefit import use_strategy
from spikefit.errors import OptionError
from spikefit.layers import Dropout, Readout, SpikingLinear
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron
from spikefit.rules import GivenSteps, TopActivity, drive, ottt, parse_driver, sltt

LOSS = Quadratic()


def spikes_of_a_forward(net, x):
    """Spikes of every step, by hooks on the neurons of a forward over the whole sequence."""
    found = torch.zeros(len(x), dtype=torch.float64)

    def add(module, inputs, output):
        found.add_(output[0].flatten(1).sum(1))

    handles = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, SpikingNeuron)]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("make", [sltt, ottt], ids=["sltt", "ottt"])
@pytest.mark.parametrize("strategy", ["bptt", "lean:spikes"])
def test_the_most_active_steps_call_backward(make, strategy):
    net = dense_net(v_threshold=0.7)
    x, y = sample(T=8)
    x[:3] *= 0  # nothing fires at first
    counts = spikes_of_a_forward(net, x)
    use_strategy(net, strategy)
    wanted = tuple(sorted(counts.argsort(descending=True, stable=True)[:3].tolist()))
    assert set(wanted) != {0, 1, 2}
    outcome = drive(net, x, y, LOSS, make(sampler=TopActivity(3 / 8, look_ahead=True)))
    assert outcome.steps == wanted
    got = gradients(net)
    drive(net, x, y, LOSS, make(sampler=GivenSteps(wanted)))
    assert error(got, gradients(net)) == 0


def test_the_ranking_pass_leaves_statistics_and_random_numbers_alone():
    def net():
        torch.manual_seed(0)
        blocks = [SpikingLinear(7, 9, norm="step_bn"), Dropout(0.3), SpikingLinear(9, 6, norm="osr"), Readout(6, 3)]
        return SpikingNetwork(blocks, input_shape=(7,)).double()

    x, y = sample(T=6)
    first, second = net(), net()
    torch.manual_seed(5)
    steps = drive(first, x, y, LOSS, sltt(sampler=TopActivity(0.5, look_ahead=True))).steps
    after = torch.rand(3)
    torch.manual_seed(5)
    drive(second, x, y, LOSS, sltt(sampler=GivenSteps(steps)))
    assert torch.equal(after, torch.rand(3))
    assert error(gradients(first), gradients(second)) == 0
    for (name, a), b in zip(first.named_buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_it_holds_what_a_step_holds():
    def held(rule):
        net = dense_net()
        x, y = sample(T=12)
        return held_at_most(net, x, lambda: drive(net, x, y, LOSS, rule))

    assert held(sltt(sampler=TopActivity(0.5, look_ahead=True))) == held(sltt())


def test_options():
    rule = parse_driver({"name": "sltt_k", "sampler": "top_activity", "p": 0.5}).rule
    assert rule.sampler == TopActivity(0.5, look_ahead=True)
    assert len(parse_driver({"name": "sltt_k", "sampler": "top_activity"}).drawn(8).rule.sampler.steps) == 2
    for options, match in (({"p": 0.5}, "k, a number"), ({"k": 2, "sampler": "top_activity"}, "p, a share")):
        with pytest.raises(OptionError, match=match):
            parse_driver({"name": "sltt_k", **options})
    with pytest.raises(OptionError, match="look_ahead must be"):
        TopActivity(0.5, look_ahead=1)
    with pytest.raises(OptionError, match="p must lie"):
        TopActivity(True)
    assert TopActivity(0.3).most_active(torch.tensor([1.0, 5.0, 5.0, 0.0])) == (1, 2)
