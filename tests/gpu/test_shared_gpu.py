"""Shared membranes on a GPU: rebuilt backwards against plain autograd on the same device."""

import pytest
import torch

from spikefit.models import create_model
from spikefit.planning.measured import cuda_peak_bytes
from spikefit.planning.target import mean_cross_entropy, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHARES = {"none": 1, "layer": 1, "channel": 2, "layer_channel": 2}
NEURONS = {"replay": {}, "inverse": {}, "integer": {"frac_bits": 16}}


def make(share, strategy, neuron, width=0.25):
    torch.manual_seed(0)
    options = {"share": share, "groups": SHARES[share], "norm": "step_bn", "width": width}
    return create_model("resnet19", neuron={"name": "lif", "tau": 4 / 3, **neuron}, strategy=strategy, **options).cuda()


def batch(T, B):
    torch.manual_seed(1)
    image = torch.randn(B, 3, 32, 32, device="cuda")
    return image.expand(T, *image.shape), torch.randint(10, (B,), device="cuda")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("strategy", NEURONS)
def test_same_step_as_plain_autograd(strategy, share):
    x, y = batch(T=4, B=8)
    found = []
    for name in ("bptt", strategy):
        model = make(share, name, NEURONS[strategy])
        loss = training_step(model, x, y, mean_cross_entropy)
        found.append((loss, [p.grad for p in model.parameters()], list(model.buffers())))
    (loss, gradients, buffers), (other, others, other_buffers) = found
    assert torch.equal(loss, other)
    for a, b in zip(buffers, other_buffers, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() <= (1e-2 if strategy == "inverse" else 1e-4) * a.abs().max()


def test_peak_memory():
    x, y = batch(T=16, B=32)
    peaks = {s: cuda_peak_bytes(make("layer", s, {}, width=0.5), x, y, mean_cross_entropy) for s in ("bptt", "replay")}
    assert peaks["replay"] < peaks["bptt"] / 3
