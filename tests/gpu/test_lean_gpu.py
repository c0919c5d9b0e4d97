"""Lean units on a GPU: bits, gradients and peak memory against plain autograd on the same device."""

import pytest
import torch

from spikefit.models import create_model, use_strategy
from spikefit.ops.packbits import pack, unpack
from spikefit.planning.measured import cuda_peak_bytes
from spikefit.planning.target import mean_cross_entropy, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = {"vgg6": {"width": 0.5}, "resnet19": {"width": 0.25}}


def batch(T=4, B=8):
    torch.manual_seed(1)
    image = torch.randn(B, 3, 32, 32, device="cuda")
    return image.expand(T, *image.shape), torch.randint(10, (B,), device="cuda")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_comes_back(bits):
    values = torch.randint(2**bits, (7, 5, 1003), device="cuda")
    packed = pack(values, bits)
    assert torch.equal(unpack(packed, 1003, bits, dtype=torch.int64), values)
    assert torch.equal(packed.cpu(), pack(values.cpu(), bits, backend="reference"))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["input", "spikes"])
@pytest.mark.parametrize("name", MODELS)
def test_same_step_as_plain_autograd(name, keep, autocast):
    found = {}
    for strategy in ("bptt", f"lean:{keep}"):
        torch.manual_seed(0)
        model = create_model(name, strategy=strategy, **MODELS[name]).cuda()
        x, y = batch()
        logits = []
        handle = model.register_forward_hook(lambda module, inputs, output, seen=logits: seen.append(output.detach()))
        training_step(model, x, y, mean_cross_entropy, autocast=autocast)
        handle.remove()
        found[strategy] = logits[0], [p.grad for p in model.parameters()], list(model.buffers())
    (logits, gradients, buffers), (other, others, other_buffers) = found.values()
    assert torch.equal(logits, other)
    for a, b in zip(buffers, other_buffers, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() <= (2e-2 if autocast else 1e-4) * a.abs().max()


def test_peak_memory():
    x, y = batch(T=16, B=32)
    peaks = {}
    for strategy in ("bptt", "lean:input", "lean:spikes"):
        model = use_strategy(create_model("vgg6"), strategy).cuda()
        peaks[strategy] = cuda_peak_bytes(model, x, y, mean_cross_entropy, autocast=False)
    assert peaks["lean:input"] < peaks["bptt"] / 2
    assert peaks["lean:spikes"] < peaks["bptt"] / 5
