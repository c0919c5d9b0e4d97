"""Parts of one's own that traces have to follow or refuse: neurons used twice, and gains that are learned alone."""

import pytest
import torch
from reference import Quadratic, bptt, error, gradients, sample
from torch import nn

from spikefit.errors import StrategyError
from spikefit.layers import Readout, SpikingLinear, SpikingUnit
from spikefit.models import SpikingNetwork
from spikefit.neurons import LIF, ParametricLIF
from spikefit.rules import drive, ndot, ottt, sltt, tbptt

LOSS = Quadratic()


def two_uses(neuron):
    torch.manual_seed(0)
    units = [SpikingUnit(nn.Linear(7, 7), None, neuron) for _ in range(2)]
    return SpikingNetwork([*units, Readout(7, 3)], input_shape=(7,)).double()


@pytest.mark.parametrize(("make", "rule"), [(LIF, ndot()), (ParametricLIF, ottt()), (ParametricLIF, ndot())])
def test_traces_of_a_neuron_that_two_units_use_are_refused(make, rule):
    x, y = sample()
    with pytest.raises(StrategyError, match=r"blocks\.0\.neuron is used twice in one step"):
        drive(two_uses(make()), x, y, LOSS, rule)


def test_rules_without_traces_of_neurons_take_such_a_neuron():
    x, y = sample()
    for rule in (sltt(), ottt(), tbptt(9)):
        drive(two_uses(LIF()), x, y, LOSS, rule)
    net = two_uses(ParametricLIF(v_threshold=0.2))
    drive(net, x, y, LOSS, tbptt(9))
    assert error(gradients(net), bptt(net, x, y, LOSS)) <= 1e-12


class GainLIF(LIF):
    """A leak that is fixed, and a gain that is learned."""

    def __init__(self):
        super().__init__(surrogate="sigmoid(4)")
        self.g = nn.Parameter(torch.tensor(0.8))

    def coefficients(self):
        return 1 - 1 / self.tau, self.g


def test_a_gain_that_is_learned_alone_is_traced():
    torch.manual_seed(0)
    net = SpikingNetwork([SpikingLinear(7, 8, neuron=GainLIF(), norm="none"), Readout(8, 3)], input_shape=(7,)).double()
    x, y = sample()
    drive(net, x, y, LOSS, ottt())
    assert error(gradients(net), bptt(net, x, y, LOSS)) <= 1e-10
