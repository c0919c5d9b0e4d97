"""Bytes of a training step under a rule: none of them grows with T, and predictions hold."""

import math

import pytest
import torch

from spikefit import create_model, profile
from spikefit.encoding import repeat
from spikefit.losses import create_loss
from spikefit.planning import memory_against_timesteps, predicted_bytes, random_sample, saved_bytes
from spikefit.planning.measured import measured_peak_bytes_of
from spikefit.planning.memory import PROMISED_FROM, reliability
from spikefit.rules import parse_driver

NEURON = {"name": "lif", "tau": 2.0, "v_threshold": 0.5}
STEPS = (2, 4, 8, 16)
STEPWISE = ["sltt", "sltt_k:2", "ottt", "ndot", "tbptt:2"]
SHAPES = {"har_mlp": (9,), "vgg6": (2, 8, 8)}


def small(name, norm="step_bn"):
    torch.manual_seed(0)
    options = {"hidden": 12} if name == "har_mlp" else {"width": 0.1, "pool": "avg"}
    return create_model(name, norm=norm, neuron=NEURON, num_classes=3, input_shape=SHAPES[name], **options)


def loss_for(text):
    return create_loss("ce_mean" if text.startswith("rate") else "tet")


def sequence(name, T, *, static=False):
    x, y = torch.rand(T, 4, *SHAPES[name]), torch.tensor([0, 1, 2, 0])
    return (repeat(x[0], T) if static else x), y


def against(name, text, *, static=False, steps=STEPS):
    """[(saved bytes, predicted peak)] for every number of steps."""
    found = []
    for T in steps:
        x, y = sequence(name, T, static=static)
        predicted = predicted_bytes(small(name), x, y, loss=loss_for(text), driver=parse_driver(text))
        found.append((predicted.saved.total, predicted.peak))
    return found


@pytest.mark.parametrize(
    ("text", "static"), [*((text, False) for text in (*STEPWISE, "rate")), ("sltt", True), ("ottt", True)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_that_is_held_grows_with_the_sequence(name, text, static):
    found = against(name, text, static=static)
    assert found[0][0] > 0
    assert len({saved for saved, _ in found}) == 1, found
    # from the second window on there are gradients to add to, and traces to decay
    assert len({peak for _, peak in found[1:]}) == 1, found
    assert found[0][1] <= found[1][1]


@pytest.mark.parametrize("name", SHAPES)
def test_backward_over_the_whole_sequence_grows(name):
    found = against(name, "bptt")
    slopes = [(b[0] - a[0]) / (T - S) for a, b, S, T in zip(found, found[1:], STEPS, STEPS[1:], strict=False)]
    assert slopes[0] > 0
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-2)
    assert [peak for _, peak in found] == sorted({peak for _, peak in found})
    rule = against(name, "sltt", steps=(16,))
    assert rule[0][0] < found[-1][0] / 10


def test_windows_hold_their_steps_and_rates_of_layers_pass_through():
    at = {k: against("vgg6", f"tbptt:{k}", steps=(8,))[0][0] for k in (1, 2, 4, 8)}
    assert at[1] == against("vgg6", "sltt", steps=(8,))[0][0]
    assert at[2] - at[1] == pytest.approx((at[8] - at[1]) / 7, rel=1e-2)
    # what goes from step to step is kept beside what BPTT keeps
    assert 1 < at[8] / against("vgg6", "bptt", steps=(8,))[0][0] < 1.5
    # layer by layer the sequences of one layer exist at a time, and none is held
    found = against("vgg6", "rate:sequence")
    assert len({saved for saved, _ in found}) == 1
    assert found[0][0] == against("vgg6", "rate", steps=(2,))[0][0]
    assert found[-1][1] > found[0][1]


@pytest.mark.parametrize("text", ["sltt", "ottt", "tbptt:2"])
def test_a_unit_that_runs_lean_holds_less_of_its_step(text):
    driver, loss = parse_driver({"name": text, "inside": "lean:spikes"}), loss_for(text)
    lean = saved_bytes(driver.apply(small("vgg6")), *sequence("vgg6", 4), loss=loss, driver=driver)
    plain = saved_bytes(small("vgg6"), *sequence("vgg6", 4), loss=loss, driver=parse_driver(text))
    assert lean.total < 0.7 * plain.total
    assert lean.categories()["packed spikes"] > 0
    longer = saved_bytes(driver.apply(small("vgg6")), *sequence("vgg6", 8), loss=loss, driver=driver)
    assert longer.layers == lean.layers


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_harness_counts_what_hooks_see(name, static):
    """The most at any time; the hooks leave out the input, of which one step is held."""
    x, y = sequence(name, 5, static=static)
    driver, loss, net, seen = parse_driver("sltt"), loss_for("sltt"), small(name), Hooks()
    with torch.autograd.graph.saved_tensors_hooks(seen.pack, seen.unpack):
        seen.known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
        driver.run(net, x, y, loss)
    own = saved_bytes(small(name), x, y, loss=loss, driver=driver).total
    assert own == seen.most + x[0].numel() * x.element_size()


class Hooks:
    """The most bytes that saved tensors hold at one time, outside the storages in `known`."""

    def __init__(self):
        self.held, self.most, self.known = {}, 0, set()

    def pack(self, t):
        return Saved(self, t)

    def unpack(self, saved):
        return saved.tensor


class Saved:
    def __init__(self, hooks, t):
        self.hooks, self.tensor, self.key = hooks, t, t.untyped_storage().data_ptr()
        if self.key not in hooks.known:
            count, _ = hooks.held.get(self.key, (0, 0))
            hooks.held[self.key] = count + 1, t.untyped_storage().nbytes()
            hooks.most = max(hooks.most, sum(size for _, size in hooks.held.values()))

    def __del__(self):
        count, size = self.hooks.held.get(self.key, (0, 0))
        if count > 1:
            self.hooks.held[self.key] = count - 1, size
        else:
            self.hooks.held.pop(self.key, None)


def test_rows_against_the_number_of_steps():
    x, y = sequence("har_mlp", 6)
    options = {"loss": loss_for("sltt"), "timesteps": (2, 4, 8)}
    rows = memory_against_timesteps(small("har_mlp"), x, y, driver=parse_driver("sltt"), **options)
    assert [row["timesteps"] for row in rows] == [2, 4, 8]
    assert len({row["saved_bytes"] for row in rows}) == len({row["predicted_peak_bytes"] for row in rows}) == 1
    # of two steps no four can be chosen
    rows = memory_against_timesteps(small("har_mlp"), x, y, driver=parse_driver("sltt_k:4"), **options)
    assert [row["timesteps"] for row in rows] == [4, 8]
    assert rows[0]["saved_bytes"] == rows[1]["saved_bytes"]


def test_a_prediction_leaves_model_gradients_and_chance_alone():
    net, (x, y) = small("vgg6", "osr"), sequence("vgg6", 4)
    before, chance = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    saved_bytes(net, x, y, loss=loss_for("sltt"), driver=parse_driver("sltt"))
    assert torch.equal(torch.get_rng_state(), chance)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in net.parameters())


def test_measured_peak_lies_below_the_prediction():
    torch.manual_seed(0)
    net = create_model("vgg6", norm="step_bn", neuron=NEURON, width=0.5)
    driver, loss = parse_driver("sltt"), create_loss("tet")
    x, y = random_sample((3, 32, 32), 3, 32)
    predicted = predicted_bytes(net, x, y, loss=loss, driver=driver)
    assert predicted.peak > PROMISED_FROM
    assert measured_peak_bytes_of(net, x, y, loss, driver=driver) <= predicted.peak
    assert reliability(x, predicted, autocast=False, driver=driver).startswith("estimate (under a rule")


def test_a_profile_says_which_rule_and_what_runs_inside():
    options = {"norm": "step_bn", "width": 0.1, "image": "3x8x8", "batch": 2, "predict_only": True}
    found = {T: profile("vgg6", strategy="sltt", loss=create_loss("tet"), timesteps=T, **options) for T in (4, 8)}
    for one in found.values():
        assert one.settings["strategy"] == "sltt"
        assert one.settings["inside"] == "bptt"
    assert found[4].saved_bytes == found[8].saved_bytes > 0
    assert found[4].predicted_peak_bytes == found[8].predicted_peak_bytes
    assert profile("vgg6", timesteps=4, **options).settings["inside"] is None
    # the driver of a model in memory, with the strategy that it is made with
    net, x_y = small("vgg6"), sequence("vgg6", 4)
    net = parse_driver("lean:spikes").apply(net)
    one = profile(net, x_y, strategy="tbptt:2", loss=create_loss("tet"), predict_only=True)
    assert (one.settings["strategy"], one.settings["inside"]) == ("tbptt:2", "lean:spikes")
    assert math.isfinite(one.predicted_peak_bytes)
