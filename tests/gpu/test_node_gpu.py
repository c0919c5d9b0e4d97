"""The two-group node compiled on a GPU: the parity cases of tests/ops, and what only a device can show."""

import pytest
import torch

from spikefit.errors import ReconstructionError
from spikefit.models import create_model, use_strategy
from spikefit.ops.node import Reversal, two_group
from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from support import NODE_RESETS, assert_close, assert_same_node_run, backends_called, dyadic, run_node

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
STRATEGIES = ["bptt", "streamlined", "generic"]
SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]


def inputs(T, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, *shape, generator=generator) * 1.5 + 0.5
    return x.to(DEVICE), (torch.rand(*shape, generator=generator) - 0.25).to(DEVICE)


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("reset", NODE_RESETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matches_reference(strategy, reset, detach_reset):
    options = NODE_RESETS[reset] | {"detach_reset": detach_reset}
    for T in (1, 4, 7):
        x, v_0 = inputs(T, 2, 6, 35)
        got = run_node("triton", strategy, x, v_0, anchor_every=3, check="spikes", **options)
        assert_same_node_run(got, run_node("reference", "bptt", x, v_0, **options), 2e-5)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_surrogate(strategy, surrogate):
    x = (dyadic(3, 2, 4, 5, high=3.0) + 0.01).to(DEVICE)
    v_0 = dyadic(2, 4, 5, low=-0.5, high=0.75, seed=1).to(DEVICE)
    wanted = run_node("reference", "bptt", x, v_0, surrogate=surrogate)
    assert_same_node_run(run_node("triton", strategy, x, v_0, surrogate=surrogate), wanted, 1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(3, 8, 64, 32, 32), (2, 5, 2, 100003), (2, 700, 8)], ids=str)
def test_wide_layers_and_ragged_ends(shape, strategy):
    """A few of millions of neurons may lie so close to the threshold that a spike comes back wrong."""
    x, v_0 = inputs(*shape)
    got, wanted = run_node("triton", strategy, x, v_0), run_node("reference", "bptt", x, v_0)
    assert torch.equal(got["y"], wanted["y"])
    assert torch.equal(got["v_T"], wanted["v_T"])
    off = (got["d x"] - wanted["d x"]).abs() > 1e-3 * wanted["d x"].abs().max()
    assert int(off.sum()) <= 1e-5 * off.numel()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("view", [lambda x: x.permute(0, 1, 4, 2, 3), lambda x: x[:1].expand(3, *x.shape[1:])])
def test_layouts(view, strategy):
    x = view(inputs(3, 2, 4, 3, 8)[0])
    v_0 = torch.zeros_like(x[0])
    wanted = run_node("reference", "bptt", x, v_0)
    assert_same_node_run(run_node("triton", strategy, x, v_0, anchor_every=2), wanted, 2e-5)


@pytest.mark.parametrize("strategy", ["streamlined", "generic"])
def test_long_sequences_with_anchors_and_wrong_spikes_without(strategy):
    x, v_0 = inputs(64, 2, 16, 8)
    wanted = run_node("reference", "bptt", x, v_0)
    assert_same_node_run(run_node("triton", strategy, x, v_0, anchor_every=4), wanted, 1e-4)
    with pytest.warns(UserWarning, match="gradients will be off"):
        y, _ = two_group(x.requires_grad_(), v_0, alpha=0.1, check="spikes", reversal=Reversal(strategy, 8))
    with pytest.raises(ReconstructionError, match="lower anchor_every"):
        y.sum().backward()


@pytest.mark.parametrize("strategy", ["bptt", "streamlined", "generic"])
def test_networks(strategy):
    found = []
    for name in ("bptt", strategy):
        torch.manual_seed(0)
        model = use_strategy(create_model("vgg6", neuron="two_group", width=0.25).to(DEVICE), name)
        x = torch.randn(4, 4, *model.input_shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

        def step(model=model, x=x):
            logits = model(x)
            logits.square().mean().backward()
            found.append((logits.detach(), [p.grad for p in model.parameters()]))

        assert backends_called(step, "two_group") == {"triton"}
    (logits, gradients), (others, other_gradients) = found
    assert torch.equal(logits, others)
    for a, b in zip(gradients, other_gradients, strict=True):
        assert_close(b, a, 1e-2)


def test_streamlined_holds_states_and_nothing_in_between():
    T, N = 16, 2**20
    x = torch.randn(T, 1, 2, N, device=DEVICE, requires_grad=True)
    two_group(x, reversal=Reversal())[0].sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, v_T = two_group(x, check="off", reversal=Reversal("streamlined", 4))
    # outputs, 4 states and the state it started from
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 6 * v_T.nbytes + 2**20
    g = torch.ones_like(y)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(y, x, g)
    # dx, and the gradients of the state before and after
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes + 3 * v_T.nbytes + 2**20
