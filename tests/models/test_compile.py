"""torch.compile takes a whole network as one graph, in training and evaluation, and changes no result."""

import pytest
import torch
from torch import nn

from spikefit.layers import GlobalAveragePool, Readout, ResidualBlock, SpikingConv2d, SpikingLinear
from spikefit.models import SpikingNetwork, create_model
from support import saved_bytes


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(norm="bn", **options):
    torch.manual_seed(0)
    blocks = [
        SpikingConv2d(2, 4, norm=norm, pool="max"),
        ResidualBlock(4, 6, stride=2, norm=norm),
        GlobalAveragePool(),
        SpikingLinear(6, 5, norm=norm),
        Readout(5, 3, tau=2.0),
    ]
    return SpikingNetwork(blocks, input_shape=(2, 8, 8), **options)


def sequence():
    torch.manual_seed(1)
    return 3 * torch.randn(3, 2, 2, 8, 8)


def step(model, run):
    """Logits, gradients and buffers of one step, by name."""
    logits = run(sequence())
    logits.square().sum().backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach()} | gradients | dict(model.named_buffers())


@pytest.mark.parametrize(
    ("norm", "training", "backend", "strategy"),
    [
        ("bn", True, "eager", "bptt"),
        ("bn", True, "aot_eager", "bptt"),
        ("bn", False, "aot_eager", "bptt"),
        ("step_bn", True, "aot_eager", "bptt"),
        ("ws", True, "eager", "bptt"),
        ("bn", True, "aot_eager", "lean:input"),
        ("bn", True, "aot_eager", "lean:spikes"),
    ],
)
def test_one_graph(norm, training, backend, strategy):
    plain, model = (network(norm, strategy=strategy).train(training) for _ in range(2))
    wanted = step(plain, plain)
    got = step(model, torch.compile(model, fullgraph=True, backend=backend))
    assert wanted["logits"].abs().max() > 0
    assert torch.equal(got["logits"], wanted["logits"])
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_graph_keeps_bits_alone_under_lean():
    def held(compiled):
        torch._dynamo.reset()
        model = SpikingNetwork(
            [SpikingConv2d(2, 16), SpikingConv2d(16, 16), GlobalAveragePool(), Readout(16, 3)],
            input_shape=(2, 8, 8),
            strategy="lean:spikes",
        )
        run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else model
        sizes = []
        for T in (2, 6):
            x = torch.randn(T, 2, 2, 8, 8)
            run(x)
            sizes.append(saved_bytes(lambda x=x: run(x)))
        return sizes[1] - sizes[0]

    assert held(True) == held(False) > 0


def test_statistics_with_equal_shares_are_part_of_the_graph():
    plain, model = network(), network()
    for net in (plain, model):
        for module in net.modules():
            if hasattr(module, "momentum"):
                module.momentum = None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        plain(sequence()), compiled(sequence())
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)
    assert int(plain.blocks[0].norm.num_batches_tracked) == 2


def test_steps_and_other_sides():
    model = network().eval()
    x = sequence()
    with torch.no_grad():
        step = torch.compile(model.step, fullgraph=True, backend="eager")
        state = model.init_state(2)
        for x_t in x:
            logits, state = step(x_t, state)
        assert torch.equal(logits, model(x)[-1])
        wide = nn.functional.pad(x, (2, 2))
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(wide), model(wide))


@pytest.mark.parametrize(
    ("options", "one_graph"),
    [
        ({"norm": "bn"}, True),
        ({"coding": "bernoulli_ste", "mlp": "spiking", "carry": "layer"}, True),
        ({"coding": "heaviside", "or_grad": "release"}, True),
        # what runs again in backward is no part of a graph
        ({"strategy": "lean"}, False),
        ({"cell": "lstm", "strategy": "lean"}, False),
    ],
)
def test_windows_of_one_step(options, one_graph):
    def trained(compiled):
        torch.manual_seed(0)
        net = {"widths": (8, 16), "depths": (2, 2), "input_shape": (3, 16, 16), "dropout": 0.0}
        model = create_model("dmsn_cnn12", **net, **options)
        nn.init.normal_(model.blocks[-1].linear.weight)
        run = torch.compile(model, fullgraph=one_graph, backend="aot_eager") if compiled else model
        torch.manual_seed(1)
        logits = run(torch.rand(1, 3, 3, 16, 16))
        logits.square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())

    (wanted, tensors), (got, found) = trained(False), trained(True)
    assert torch.equal(got, wanted)
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
