"""Blocks of two streams on a GPU: the same training as plain autograd, and memory against depth."""

import pytest
import torch

from spikefit.models import create_model, use_strategy
from spikefit.planning.measured import cuda_peak_bytes
from spikefit.planning.target import mean_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = {"revsresnet21": {"width": 0.25}, "revsformer_2_384": {"channels": 96, "heads": 12}}


def batch(T, B):
    image = torch.randn(B, 3, 32, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return image.expand(T, *image.shape), torch.arange(B, device="cuda") % 10


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("order", ["rev", "para"])
@pytest.mark.parametrize("name", MODELS)
def test_same_step_as_plain_autograd(name, order, autocast):
    """The checksums hold on the device, and gradients are those of bptt."""
    found = []
    for strategy in ("bptt", "reversible"):
        torch.manual_seed(0)
        model = use_strategy(create_model(name, order=order, **MODELS[name]).cuda(), strategy)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = mean_cross_entropy(model(batch(4, 8)[0]), batch(4, 8)[1])
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    (wanted, d_wanted), (got, d_got) = found
    assert torch.equal(got, wanted)
    for a, b in zip(d_got, d_wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-8)


def test_the_peak_does_not_grow_with_depth():
    def peak(blocks, strategy):
        torch.manual_seed(0)
        model = create_model("revsresnet21", blocks=(blocks,), strategy=strategy).cuda()
        return cuda_peak_bytes(model, *batch(4, 32), mean_cross_entropy)

    slope = {s: peak(8, s) - peak(2, s) for s in ("bptt", "reversible")}
    assert slope["reversible"] <= 0.02 * slope["bptt"]
