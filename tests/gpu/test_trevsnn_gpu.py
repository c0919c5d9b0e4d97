"""T-RevSNN on a GPU: the same step as plain autograd under every strategy, and what is kept against time."""

import pytest
import torch

from spikefit.losses import create_loss
from spikefit.models import create_model, use_strategy
from spikefit.planning.measured import cuda_peak_bytes
from spikefit.planning.target import mean_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STRATEGIES = ("step_checkpoint", "spike_bits", "spike_bits:2", "reversible", "reversible:2,0.001,repair")


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before


def make(strategy, **options):
    torch.manual_seed(0)
    return use_strategy(create_model("trevsnn_mini", **options).cuda(), strategy)


def batch(model, B=8):
    shape = (model.timesteps if len(model.body.head_of) == model.timesteps else 1, B, *model.input_shape)
    x = torch.rand(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return x.expand(model.timesteps, *shape[1:]), torch.arange(B, device="cuda") % 10


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("encode", ["repeat", "frames", "group"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_step_as_plain_autograd(strategy, encode, autocast):
    found = []
    for one in ("bptt", strategy):
        model = make(one, encode=encode)
        x, y = batch(model)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            if encode == "frames":
                loss = mean_cross_entropy(model(x), y)
            else:
                logits, auxiliary = model(x, auxiliary=True)
                loss = create_loss("ce_heads")(logits, y, auxiliary=auxiliary)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}, list(model.buffers())))
    (wanted, d_wanted, moved_wanted), (got, d_got, moved) = found
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(moved, moved_wanted, strict=True))
    # plain autograd keeps one copy of a weight in bfloat16 for all steps and adds up there
    tolerance = 2e-2 if autocast else 1e-4
    for name, b in d_wanted.items():
        if b is None:
            continue
        error = float((d_got[name] - b).abs().max() / b.abs().max().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: {error:.1e}"


def test_a_grid_is_exact_on_the_device():
    found = []
    for strategy in ("bptt", "reversible"):
        model = make(strategy, gain="one", state_grid=14, timesteps=8)
        x, y = batch(model)
        mean_cross_entropy(model(x), y).backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_equal_the_sequence():
    model = make("bptt").eval()
    x, _ = batch(model)
    with torch.no_grad():
        state = model.init_state(8)
        for one in x:
            logits, state = model.step(one, state)
        torch.testing.assert_close(logits, model(x)[0], rtol=0, atol=0)


def test_the_peak_grows_with_what_is_kept():
    def peak(strategy, T):
        options = {"timesteps": T, "auxiliary": False, "gain": "one", "state_grid": 14}
        model = make(strategy, **options)
        return cuda_peak_bytes(model, *batch(model, 64), mean_cross_entropy)

    slope = {s: peak(s, 16) - peak(s, 4) for s in ("bptt", "step_checkpoint", "reversible")}
    # weights of the steps and their gradients grow with T under every strategy
    own = 2 * 4 * 12 * 61_488
    assert slope["reversible"] - own <= 0.05 * slope["bptt"]
    assert slope["reversible"] < slope["step_checkpoint"] < 0.2 * slope["bptt"]
