"""RevSResNet and RevSFormer: sizes, the same losses under every strategy, memory against depth, and bad options."""

import copy

import pytest
import torch

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, StrategyError
from spikefit.layers import SpikingAttention, TwoStreams
from spikefit.losses import create_loss
from spikefit.models.table import PRESETS
from spikefit.planning import profile, verify
from support import saved_bytes

# parameters at 10 and 100 classes
SIZES = {
    "revsresnet21": (10_967_690, 11_048_420),
    "revsresnet37": (23_510_154, 23_590_884),
    "revsformer_2_384": (5_766_586, 5_835_796),
    "revsformer_4_384": (9_323_962, 9_393_172),
}
SMALL = {
    "revsresnet21": {"width": 1 / 16, "input_shape": (3, 16, 16)},
    "revsformer_2_384": {"channels": 32, "heads": 4, "input_shape": (3, 16, 16)},
}
ORDERS = ("rev", "para")


def small(name, order="rev", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, order=order, **{**SMALL[name], **options})


def images(model, T=4, B=3):
    x = torch.rand(1, B, *model.input_shape, generator=torch.Generator().manual_seed(1))
    return x.expand(T, -1, -1, -1, -1)


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name):
    for classes, wanted in zip((10, 100), SIZES[name], strict=True):
        with torch.device("meta"):
            model = create_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize("name", SIZES)
def test_layers_of_the_name(name):
    with torch.device("meta"):
        model = create_model(name)
    nets = sum(len(block.nets) for block in model.blocks if isinstance(block, TwoStreams))
    weights = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    if name.startswith("revsresnet"):
        assert model.init_state(1, device="meta")[0] is None
        stages = sum(isinstance(block, TwoStreams) for block in model.blocks)
        assert int(name.removeprefix("revsresnet")) == stages + 1 + 2 * nets == len(weights)
    else:
        assert nets == 2 * int(name.split("_")[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SMALL)
def test_training_under_reversible_is_that_under_bptt(name, order):
    """Losses, parameters and statistics of ten steps, bit for bit."""
    ours, twin = small(name, order), small(name, order)
    use_strategy(ours, "reversible")
    losses = [[], []]
    for model, seen in zip((ours, twin), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for i in range(10):
            target = (torch.arange(3) + i) % 10
            loss = create_loss("ce_mean")(model(images(model)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 10, "the weights do not move"
    for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    counters = [b for key, b in ours.named_buffers() if key.endswith("num_batches_tracked")]
    # the sequence is one batch; a repeated one as well
    assert {int(c) for c in counters} == {10}


@pytest.mark.parametrize("strategy", ["lean:input", "lean:spikes", "checkpoint", "checkpoint:2", "reversible:off"])
@pytest.mark.parametrize("name", SMALL)
def test_other_strategies_agree_too(name, strategy):
    model = use_strategy(small(name), strategy)
    found = verify(model, images(model, T=3, B=2))
    assert found.passed, str(found)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SMALL)
def test_steps_equal_the_sequence(name, order):
    model = small(name, order).eval()
    x = torch.rand(5, 2, *model.input_shape, generator=torch.Generator().manual_seed(1))
    for strategy in ("bptt", "reversible"):
        use_strategy(model, strategy)
        state, made = model.init_state(2), []
        for step in x:
            logits, state = model.step(step, state)
            made.append(logits)
        assert torch.equal(torch.stack(made), model(x))


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_kept_does_not_grow_with_depth(order):
    def held(blocks, strategy):
        model = small("revsresnet21", order, blocks=(blocks, 1), width=1 / 8)
        use_strategy(model, strategy)
        weights = sum(p.numel() * p.element_size() for p in model.blocks[1].parameters())
        x = images(model, T=4, B=2)
        return saved_bytes(lambda: model(x)) - (weights if strategy == "reversible" else 0)

    slope = {s: (held(7, s) - held(1, s)) / 6 for s in ("bptt", "reversible")}
    # two checksums a block
    assert slope["reversible"] == 16
    assert slope["bptt"] > 100_000


def test_the_predicted_peak_does_not_grow_with_depth():
    def peak(blocks, strategy):
        options = {**SMALL["revsresnet21"], "width": 1 / 8, "blocks": (blocks, 1)}
        seen = profile("revsresnet21", **options, timesteps=4, batch=16, strategy=strategy, predict_only=True)
        return seen.predicted_peak_bytes

    slope = {s: peak(9, s) - peak(3, s) for s in ("bptt", "reversible")}
    assert slope["reversible"] <= 0.02 * slope["bptt"]


def test_attention_is_the_product_of_its_parts():
    torch.manual_seed(0)
    layer = SpikingAttention(8, heads=2, norm="none").double()
    for unit in (layer.query, layer.key, layer.value):
        torch.nn.init.normal_(unit.synapse.weight)
    x = torch.randn(3, 2, 8, 3, 3, dtype=torch.float64) + 1
    out, state = layer(x)
    s = layer.fire(x)[0]
    q, k, v = (unit(s)[0].unflatten(2, (2, 4)).flatten(4).mT for unit in (layer.query, layer.key, layer.value))
    assert 0.05 < q.mean() < 0.95
    # [T, B, heads, pixels, D / heads]
    product = 0.125 * (q @ k.mT) @ v
    current = product.mT.reshape(x.shape)
    assert current.max() >= 0.5
    torch.testing.assert_close(out, layer.out(layer.gate(current)[0])[0], rtol=0, atol=0)
    assert layer.gate.v_threshold == 0.5
    assert [tuple(membrane.shape) for membrane in state] == [(2, 8, 3, 3)] * 5


def test_presets():
    for name, model in (("revsresnet", "revsresnet21"), ("revsformer", "revsformer_2_384")):
        made = create_model(model, preset=name, **SMALL[model])
        neurons = [m for m in made.modules() if hasattr(m, "v_threshold")]
        assert {n.v_reset for n in neurons} == {0.0}
        assert {str(n.surrogate) for n in neurons} == {PRESETS[name].neuron["surrogate"]}
        assert all(n.detach_reset for n in neurons)


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="order must be one of rev, para"):
        create_model("revsresnet21", order="back")
    with pytest.raises(OptionError, match="4 to 20"):
        create_model("revsresnet37", stream_grid=2)
    with pytest.raises(OptionError, match="up to 4 stages"):
        create_model("revsresnet21", blocks=(1, 1, 1, 1, 1))
    with pytest.raises(OptionError, match="heads must divide"):
        create_model("revsformer_2_384", heads=7)
    with pytest.raises(StrategyError, match=r"no grid \(stream_grid=None\)|have none"):
        use_strategy(small("revsresnet21", stream_grid=None), "reversible")
    with pytest.raises(StrategyError, match="check, off"):
        use_strategy(small("revsresnet21"), "reversible:sometimes")
    with pytest.raises(StrategyError, match="neither blocks of two streams"):
        create_model("vgg6", strategy="reversible")
    model = small("revsresnet21")
    use_strategy(model, {"name": "reversible", "check": "off"})
    assert str(model.strategy) == "reversible:off"
    assert str(copy.deepcopy(model).strategy) == "reversible:off"
