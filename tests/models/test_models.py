"""The zoo: published sizes, streaming equal to one call, names and refusals."""

import pytest
import torch

from spikefit.errors import OptionError, ShapeError, StateError, StrategyError
from spikefit.layers import GlobalAveragePool, Readout, SpikingConv2d, SpikingLinear
from spikefit.models import MODELS, SpikingNetwork, create_model, use_strategy

# small forms of every model, for what does not depend on size
SMALL = {
    "mlp": {"input_shape": (3, 4, 4), "hidden": [32, 32]},
    "vgg6": {"input_shape": (3, 8, 8), "width": 0.125},
    "vgg9": {"input_shape": (3, 16, 16), "width": 0.0625},
    "vgg11": {"width": 0.0625},
    "vgg16": {"width": 0.0625, "input_shape": (3, 16, 16)},
    "resnet19": {"width": 0.0625, "input_shape": (3, 16, 16)},
    "revsresnet21": {"width": 0.0625, "input_shape": (3, 16, 16)},
    "revsresnet37": {"width": 0.0625, "input_shape": (3, 16, 16)},
    "revsformer_2_384": {"channels": 64, "heads": 2, "input_shape": (3, 16, 16)},
    "revsformer_4_384": {"channels": 64, "heads": 2, "input_shape": (3, 16, 16)},
    "trevsnn_tiny": {"widths": [8, 8, 8, 16], "input_shape": (3, 32, 32), "num_classes": 10},
    "trevsnn_small": {"widths": [8, 16, 8, 16], "input_shape": (3, 32, 32), "num_classes": 10},
    "trevsnn_dvs": {"widths": [8, 8, 16, 16], "input_shape": (2, 16, 16), "timesteps": 3},
    "trevsnn_mini": {"widths": [8, 8, 8, 16], "input_shape": (3, 16, 16)},
    "dmsn_cnn12": {"widths": [4, 8], "depths": [1, 1], "input_shape": (3, 16, 16)},
    "dmsn_lstm12": {"widths": [4, 8], "depths": [1, 1], "input_shape": (3, 16, 16)},
    "dmsn_cnn12_ann": {"widths": [4, 8], "depths": [1, 1], "input_shape": (3, 16, 16)},
    "dmsn_lstm12_ann": {"widths": [4, 8], "depths": [1, 1], "input_shape": (3, 16, 16)},
    "har_mlp": {"hidden": 32},
    "har_conv": {"timesteps": 16, "widths": [8, 8]},
}

# networks with a sub-network per step, or of one step, have tests of their own, test_trevsnn.py and test_dmsn.py
UNFOLDED = [name for name in MODELS if not name.startswith(("trevsnn", "dmsn"))]


def small(name, **options):
    torch.manual_seed(0)
    return create_model(name, **SMALL[name], **options)


def sequence(model, T=5, B=3):
    torch.manual_seed(1)
    return torch.randn(model.timesteps or T, B, *model.input_shape)


def rates(model, x):
    """Mean firing rate of every neuron layer."""
    found = []
    from spikefit.neurons import SpikingNeuron

    hooks = [
        m.register_forward_hook(lambda m, i, o: found.append(float(o[0].detach().float().mean())))
        for m in model.modules()
        if isinstance(m, SpikingNeuron)
    ]
    out = model(x)
    for hook in hooks:
        hook.remove()
    return found, out


def settled(model, x):
    """In evaluation, with running statistics of `x`, so that neurons fire."""
    for _ in range(30):
        with torch.no_grad():
            model(x)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet19", {}, 26_108_042),
        ("resnet19", {"num_classes": 100}, 26_154_212),
        ("resnet19", {"input_shape": (2, 32, 32)}, 26_106_890),
        ("resnet19", {"widths": "narrow"}, 12_585_866),
        ("vgg16", {}, 14_910_346),
        ("vgg16", {"widths": "base"}, 15_795_594),
        ("vgg16", {"num_classes": 100}, 14_956_516),
        ("har_conv", {}, 98_502),
    ],
)
def test_published_sizes(name, options, parameters):
    with torch.device("meta"):
        model = create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_small_forms_cover_the_table():
    assert set(SMALL) == set(MODELS)


@pytest.mark.parametrize("name", UNFOLDED)
def test_logits_and_gradients(name):
    model = small(name)
    x = sequence(model)
    fired, logits = rates(model, x)
    classes = 6 if name.startswith("har") else 10
    assert logits.shape == ((1 if name == "har_conv" else 5), 3, classes)
    assert all(0.01 < r < 0.9 for r in fired), fired
    logits.square().mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", UNFOLDED)
def test_steps_equal_one_call_bit_for_bit_in_evaluation(name):
    model = small(name)
    x = sequence(model)
    model = settled(model, x)
    with torch.no_grad():
        fired, whole = rates(model, x)
        state, steps = model.init_state(3), []
        for x_t in x:
            logits, state = model.step(x_t, state)
            steps.append(logits)
    assert all(0.005 < r < 0.95 for r in fired), fired
    steps = torch.stack(steps) if model.timesteps is None else steps[-1].unsqueeze(0)
    assert torch.equal(steps, whole)


@pytest.mark.parametrize("name", [n for n in UNFOLDED if n != "har_conv"])
def test_steps_equal_one_call_bit_for_bit_in_training_with_step_norms(name):
    model = small(name, norm="step_bn")
    x = sequence(model, T=4)
    with torch.no_grad():
        whole = model(x)
        half, state = model.run(x[:2], model.init_state(3))
        last, _ = model.run(x[2:], state)
    assert torch.equal(torch.cat([half, last]), whole)


def test_a_norm_over_the_sequence_refuses_steps_in_training():
    model = small("vgg6")
    with pytest.raises(ShapeError, match=r"blocks.0.norm normalises over the whole sequence.*step_bn"):
        model.step(sequence(model)[0], model.init_state(3))


def test_state_is_a_value():
    model = settled(small("vgg6"), sequence(small("vgg6")))
    x = sequence(model)
    keys = set(model.state_dict())
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        a, b = model.init_state(3), model.init_state(2)
        for x_t in x:
            one, a = model.step(x_t, a)
            _, b = model.step(x_t[:2], b)
    assert torch.equal(one, first[-1])
    assert set(model.state_dict()) == keys
    with pytest.raises(StateError, match="expected a membrane"):
        model.step(x[0], b)
    with pytest.raises(StateError, match="expected a state of 8 entries, got 2"):
        model.step(x[0], b[:2])
    with pytest.raises(StateError, match="init_state"):
        model.step(x[0], None)


@pytest.mark.parametrize("name", ["mlp", "vgg6", "resnet19", "har_conv"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_follows_the_parameters(name, dtype):
    model = small(name, **({} if name == "har_conv" else {"head_tau": 2.0})).to(dtype).eval()
    x = sequence(model).to(dtype)
    state = model.init_state(3)
    with torch.no_grad():
        for x_t in x:
            logits, state = model.step(x_t, state)
        assert torch.equal(logits, model(x)[-1])
    meta = model.to("meta").init_state(2)
    assert {s.device.type for s in leaves(meta)} == {"meta"}
    assert {s.dtype for s in leaves(model.init_state(2, device="cpu", dtype=torch.float16))} == {torch.float16}


def leaves(state):
    """The tensors of a state."""
    if isinstance(state, tuple):
        return [leaf for entry in state for leaf in leaves(entry)]
    return [] if state is None else [state]


def stepped(name, batch_of_state, batch):
    model = small(name).eval()
    return model.step(torch.rand(batch, *model.input_shape), model.init_state(batch_of_state))


def test_other_image_sides_work_where_the_head_pools():
    model = small("vgg6")
    assert model(torch.rand(2, 2, 3, 12, 16)).shape == (2, 2, 10)
    assert model.init_state(2, (3, 12, 16))[0].shape == (2, 8, 12, 16)


def test_own_network_and_backends():
    pytest.importorskip("numba", reason="numba is not installed")
    torch.manual_seed(0)
    blocks = [SpikingConv2d(2, 8, pool="max"), GlobalAveragePool(), SpikingLinear(8, 8), Readout(8, 3, tau=2.0)]
    model = SpikingNetwork(blocks, input_shape=(2, 6, 6))
    x = torch.randint(0, 16, (4, 5, 2, 6, 6)) / 16
    from spikefit.ops.dispatch import use_backend

    outputs = []
    for backend in ("numba", "reference"):
        with use_backend(backend):
            outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    assert model.init_state(5)[-1].shape == (5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_model("vgg8"), OptionError, "Did you mean vgg"),
        (lambda: create_model("vgg9", widht=2), OptionError, "unknown option 'widht'.*Did you mean width"),
        (lambda: create_model("vgg9", strategy="ceckpoint"), StrategyError, "Did you mean checkpoint"),
        (lambda: create_model("vgg6", width=0), OptionError, "width must be > 0 and finite"),
        (lambda: create_model("vgg6", width=float("inf")), OptionError, "width must be > 0 and finite.* got inf"),
        (
            lambda: create_model("resnet19", width=float("nan")),
            OptionError,
            "width must be > 0 and finite.* got nan",
        ),
        (lambda: create_model("vgg6", pool="mean"), OptionError, "pool must be"),
        (lambda: create_model("vgg11", input_shape=(3, 16, 16)), OptionError, "at least 32 pixels"),
        (lambda: create_model("resnet19", widths="huge"), OptionError, "wide, narrow"),
        (lambda: create_model("mlp", hidden=[]), OptionError, "at least one width"),
        (lambda: create_model("mlp", hidden=[8, 0]), OptionError, r"mlp: hidden must .*at least 1, got \[8, 0\]"),
        (lambda: create_model("mlp", hidden=8), OptionError, "mlp: hidden must list"),
        (lambda: create_model("mlp", input_shape=()), OptionError, "mlp: expected input_shape as the shape of one"),
        (lambda: create_model("vgg6", input_shape=(32, 32)), OptionError, r"vgg6: expected .*\(C, H, W\).*\(32, 32\)"),
        (lambda: create_model("vgg6", input_shape=32), OptionError, r"vgg6: expected input_shape as \(C, H, W\)"),
        (lambda: create_model("resnet19", input_shape=(3,)), OptionError, r"resnet19: .*\(C, H, W\).*\(3,\)"),
        (lambda: create_model("har_mlp", input_shape=(9, 9)), OptionError, r"har_mlp: .*\(channels,\)"),
        (lambda: create_model("har_mlp", layers=0), OptionError, "har_mlp: layers must be .*at least 1, got 0"),
        (lambda: create_model("har_mlp", hidden=-1), OptionError, "har_mlp: hidden must be .*at least 1, got -1"),
        (lambda: create_model("har_mlp", hidden=2.5), OptionError, "har_mlp: hidden must be a whole number"),
        (lambda: create_model("har_conv", timesteps=0), OptionError, "har_conv: timesteps must be .*got 0"),
        (lambda: create_model("har_conv", timesteps=-3), OptionError, "har_conv: timesteps must be .*got -3"),
        (lambda: create_model("har_conv", widths=[]), OptionError, "har_conv: widths must list"),
        *[
            (lambda n=n, w=w: create_model(n, width=w), OptionError, f"{n}: width must be > 0 and finite.*got {w}")
            for n in ("vgg6", "resnet19")
            for w in (-1, float("nan"), float("inf"))
        ],
        *[
            (lambda n=n: create_model(n, num_classes=0, **SMALL[n]), OptionError, "num_classes must be at least 1")
            for n in UNFOLDED
        ],
        (lambda: small("vgg6")(torch.rand(2, 3, 8, 8)), ShapeError, r"\[T, B, 3, 8, 8\], got \(2, 3, 8, 8\).*repeat"),
        (lambda: small("vgg6")(torch.rand(0, 2, 3, 8, 8)), ShapeError, "at least one time step"),
        (lambda: small("vgg6")(torch.rand(2, 0, 3, 8, 8)), ShapeError, "one sample"),
        (lambda: small("vgg6")(torch.ones(2, 2, 3, 8, 8, dtype=torch.long)), ShapeError, "floating point"),
        (lambda: small("har_conv")(torch.rand(15, 2, 9)), ShapeError, "made for T = 16, got T = 15"),
        (lambda: small("vgg6")(torch.rand(2, 2, 4, 8, 8)), ShapeError, r"3 channels, .*input_shape=\(4, 8, 8\)"),
        (lambda: small("vgg6")(torch.rand(2, 2, 8, 8, 3)), ShapeError, r"movedim\(-1, 2\)"),
        (lambda: small("vgg6")(torch.rand(2, 2, 3, 4, 4)), ShapeError, r"blocks.5 \(pool: .*got 1x1\).*\(3, 4, 4\)"),
        (
            lambda: small("vgg6", strategy="lean:spikes")(torch.rand(2, 2, 3, 4, 4)),
            ShapeError,
            r"blocks.5 \(pool: .*got 1x1\).*Resize",
        ),
        (
            lambda: small("vgg9")(torch.rand(2, 2, 3, 32, 32)),
            ShapeError,
            r"samples of \(3, 16, 16\).*got \(3, 32, 32\).*blocks.8 \(SpikingLinear.*input_shape=\(3, 32, 32\)",
        ),
        (lambda: small("mlp").init_state(2, (3, 5, 5)), ShapeError, r"blocks.1 \(SpikingLinear: .*\[T, B, 48\]"),
        (lambda: small("har_mlp")(torch.rand(4, 9, 128)), ShapeError, r"x.permute\(2, 0, 1\)"),
        (lambda: small("har_conv")(torch.rand(16, 9)), ShapeError, r"batch axis: x.unsqueeze\(1\)"),
        (lambda: small("har_conv").eval().run(torch.rand(16, 2, 9), ()), ShapeError, "needs all 16 time steps"),
        (lambda: stepped("har_conv", 2, 3), StateError, r"window of the last 16.*got \(3, 9\) and \(16, 2, 9\)"),
        (lambda: stepped("vgg6", 2, 3), StateError, r"state is not one of 3 samples.*model.init_state\(3\)"),
        (lambda: stepped("resnet19", 2, 1), StateError, "state is not one of 1 samples"),
        (lambda: small("vgg6").init_state(0), OptionError, "batch_size must be .*at least 1"),
        (lambda: SpikingNetwork([], input_shape=(3,)), OptionError, "at least one block"),
        (lambda: SpikingNetwork([Readout(3, 2)], input_shape=(3,), timesteps=4), OptionError, "leave it out"),
        (lambda: use_strategy(torch.nn.Linear(2, 2), "bptt"), StrategyError, "contains no SpikingNetwork"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
