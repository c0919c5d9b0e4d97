"""Oracle of the rate rule, by plain autograd, and the networks and losses of its tests."""

import torch
from reference import gradients
from torch import Tensor

from spikefit.encoding import repeat
from spikefit.layers import Flatten, Pool2d, Readout, SpikingConv2d, SpikingLinear, SpikingUnit
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.ops.surrogate import parse_surrogate
from spikefit.rules import drive_rate, rate

RESETS = {
    "soft, detached": {"v_reset": None, "detach_reset": True},
    "soft, attached": {"v_reset": None, "detach_reset": False},
    "hard, detached": {"v_reset": 0.1, "detach_reset": True},
    "hard, attached": {"v_reset": 0.1, "detach_reset": False},
}


class MeanQuadratic(Loss):
    """sum_{b,k} (mean_t o_t - (y + k) / 4)^2 / 2, in the dtype of the logits."""

    splits_per_step = False
    reads_mean = True

    def __call__(self, logits, targets):
        wanted = (targets[:, None] + torch.arange(logits.shape[2])).to(logits.dtype) / 4
        return (logits.mean(0) - wanted).square().sum() / 2


LOSS = MeanQuadratic()


def run(net, x, y, loss=LOSS, rule=None, **options):
    net.zero_grad()
    outcome = drive_rate(net, x, y, loss, rule or rate(), **options)
    return gradients(net), outcome


def bptt(net, x, y, loss=LOSS):
    net.zero_grad()
    loss(net(x), y).backward()
    return gradients(net)


def fires(net, x):
    """Whether every population fires sometimes and rests sometimes."""
    rates = []
    hooks = [
        m.neuron.register_forward_hook(lambda *a: rates.append(float(a[2][0].mean())))
        for m in net.modules()
        if isinstance(m, SpikingUnit) and m.neuron is not None
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return rates and all(0.02 < r < 0.98 for r in rates)


def constant(T=9, B=4, features=7, seed=1):
    x = torch.rand((B, features), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return repeat(x, T), torch.tensor([0, 1, 2, 0])


def simulated(currents: list[Tensor], neuron) -> tuple[list[Tensor], Tensor, Tensor]:
    """(spikes, r, k) of one population; k by autograd over time, from a current added at every step."""
    leak, gain = neuron.coefficients()
    extra, surrogate = torch.zeros_like(currents[0], requires_grad=True), parse_surrogate(neuron.surrogate)
    rest = neuron.v_reset or 0.0 if neuron.v_rest is None else neuron.v_rest
    v, spikes = torch.zeros_like(extra), []
    with torch.enable_grad():
        for x in currents:
            u = rest + leak * (v - rest) + gain * (x.detach() + extra)
            d = u - neuron.v_threshold
            fired = (d.detach() >= 0).to(d.dtype)
            # the value of the step with the derivative of the surrogate
            s = fired + surrogate.slope(d.detach()) * (d - d.detach())
            r = s.detach() if neuron.detach_reset else s
            if neuron.v_reset is not None:
                v = u + r * (neuron.v_reset - u)
            else:
                v = u - neuron.v_threshold * r
            spikes.append(s)
        mean = sum(spikes) / len(spikes)
        (k,) = torch.autograd.grad(mean.sum(), extra)
    return [s.detach() for s in spikes], mean.detach(), k


def normed(norm, values: list[Tensor], z: Tensor) -> tuple[list[Tensor], Tensor]:
    """(steps of a norm over the whole sequence, the norm of rates): `values` and `z` are what it gets.

    The rates are normalised by the statistics of the steps, whose derivatives are those of the statistics of `z`.
    """
    axes = [axis for axis in range(z.ndim) if axis != 1]
    weight, bias = (p.view(-1, *[1] * (z.ndim - 2)) for p in (norm.weight, norm.bias))

    def moments(steps):
        mean = steps.mean([0, *(a + 1 for a in axes)], keepdim=True)[0]
        return mean, (steps - mean).square().mean([0, *(a + 1 for a in axes)], keepdim=True)[0]

    (mean, var), (own_mean, own_var) = moments(torch.stack(values).detach()), moments(z[None])
    steps = [(weight * (v - mean) / (var + norm.eps).sqrt() + bias).detach() for v in values]
    m, w = mean + own_mean - own_mean.detach(), var + own_var - own_var.detach()
    return steps, weight * (z - m) / (w + norm.eps).sqrt() + bias


def rates_by_autograd(layers, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the rate rule; `layers` are (map, neuron or None, map behind the spikes[, norm behind the map])."""
    values, r = list(x), x.mean(0)
    for map_, neuron, behind, *norm in layers:
        with torch.no_grad():
            currents = [map_(v) for v in values]
        z = map_(r)
        if norm:
            currents, z = normed(norm[0], currents, z)
        if neuron is None:
            values, r = currents, z
            continue
        spikes, mean, k = simulated(currents, neuron)
        r = behind(mean + k * (z - z.detach()))
        values = [behind(s) for s in spikes]
    return LOSS(r[None], y)


def same(s):
    return s


def conv_net(pool="avg", **options):
    torch.manual_seed(0)
    neuron = {"name": "lif", "tau": 2.0, "surrogate": "sigmoid(4)", "v_threshold": 0.5, **options}
    blocks = [
        SpikingConv2d(2, 4, norm="none", neuron=neuron, pool=pool),
        Pool2d("avg", 3, stride=1),
        SpikingConv2d(4, 5, norm="ws", neuron=neuron),
        Flatten(),
        SpikingLinear(5 * 16, 6, norm="none", neuron=neuron),
        Readout(6, 3),
    ]
    net = SpikingNetwork(blocks, input_shape=(2, 8, 8)).double()
    with torch.no_grad():
        for unit in (m for m in net.modules() if isinstance(m, SpikingUnit)):
            getattr(unit.synapse, "gain", unit.synapse.weight).mul_(3)
            unit.synapse.bias.fill_(0.1)
    return net
