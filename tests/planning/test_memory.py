"""Bytes of a training step: slopes that follow from the design, prediction against measurement, nothing left behind."""

import pytest
import torch
from torch import nn

from spikefit.errors import OptionError, SpikefitError
from spikefit.layers import SpikingConv2d
from spikefit.models import create_model, use_strategy
from spikefit.neurons import LIF
from spikefit.planning import (
    Target,
    memory_against_timesteps,
    predicted_bytes,
    profile,
    random_sample,
    saved_bytes,
    watch_saved,
)
from spikefit.planning.measured import measured_peak_bytes, measured_peak_bytes_of
from spikefit.planning.target import mean_cross_entropy

UNIT = (8, 8, 8)  # C, H, W of the unit under test; input and output alike


def unit_bytes(T, *, neuron=None, dtype=torch.float32, pool=None):
    """Kept bytes of one conv -> norm -> LIF unit, by category."""
    unit = SpikingConv2d(8, 8, neuron=neuron or {"name": "lif"}, pool=pool).to(dtype)
    x = torch.rand(T, 2, *UNIT, dtype=dtype).requires_grad_()
    with watch_saved(unit) as saved:
        out = unit(x)
    del out
    return saved.categories()


def per_neuron_step(category, **options):
    """Slope of a category in T, in bytes per neuron and step."""
    more, less = unit_bytes(9, **options)[category], unit_bytes(5, **options)[category]
    return (more - less) / 4 / (2 * 8 * 8 * 8)


@pytest.mark.parametrize(
    ("category", "bytes_per_element"),
    [("weight input", 4), ("norm input", 4), ("neuron input", 4)],
)
def test_a_unit_keeps_three_floats_per_neuron_and_step(category, bytes_per_element):
    assert per_neuron_step(category, neuron={"name": "lif", "backend": "numba"}) == bytes_per_element
    assert (
        per_neuron_step(category, neuron={"name": "lif", "backend": "numba"}, dtype=torch.float64)
        == 2 * bytes_per_element
    )


def test_a_max_pool_keeps_its_input_and_positions():
    # spikes 4 bytes, and one int64 position for every 4 neurons
    assert per_neuron_step("pool", neuron={"name": "lif", "backend": "numba"}, pool="max") == 4 + 8 / 4


@pytest.mark.parametrize(
    ("options", "bytes_per_element"),
    [
        # the difference u - theta for the slope
        ({"v_reset": None, "detach_reset": True}, 4),
        # the same, and the spike that scales v_reset - u
        ({"v_reset": 0.0, "detach_reset": True}, 8),
        # the same, and v_reset - u, which scales the slope
        ({"v_reset": 0.0, "detach_reset": False}, 12),
    ],
)
def test_the_reference_loop_keeps_one_tensor_per_operation(options, bytes_per_element):
    neuron, held = LIF(backend="reference", **options), []
    for T in (5, 9):
        x = torch.rand(T, 4, 16, requires_grad=True)
        with watch_saved(neuron) as saved:
            neuron(x)
        held.append(saved.total)
    assert (held[1] - held[0]) / 4 / 64 == bytes_per_element


def test_fake_and_real_steps_hold_the_same_bytes():
    for strategy in ("bptt", "checkpoint", "checkpoint:1"):
        model = create_model("vgg6", input_shape=(3, 8, 8), width=0.25, strategy=strategy)
        x, y = random_sample((3, 8, 8), 6, 4)
        with watch_saved(model) as saved:
            loss = mean_cross_entropy(model(x), y)
        assert saved.layers == saved_bytes(model, x, y).layers
        assert saved.total > 0
        del loss


def test_checkpoint_holds_the_inputs_of_its_runs_and_nothing_else():
    model = create_model("vgg6", input_shape=(3, 8, 8), width=0.25)
    x, y = random_sample((3, 8, 8), 6, 4)
    full = saved_bytes(model, x, y)
    some = saved_bytes(use_strategy(model, "checkpoint"), x, y)
    assert set(some.categories()) == {"segment", "other"}
    # the image, and the spikes behind the units 2, 4 and 6 of 8 blocks in runs of 2
    spikes = 6 * 4 * 4 * (16 * 4 * 4 + 32 * 2 * 2 + 64)
    assert some.categories()["segment"] == 4 * 3 * 8 * 8 * 4 + spikes
    assert some.total < full.total / 10
    slope = [memory_against_timesteps(use_strategy(model, s), x, y, timesteps=(4, 8)) for s in ("bptt", "checkpoint")]
    plain, checkpointed = (rows[1]["saved_bytes"] - rows[0]["saved_bytes"] for rows in slope)
    assert 0 < checkpointed < plain / 10


@pytest.mark.parametrize("strategy", ["bptt", "checkpoint", "lean:spikes"])
def test_what_is_alive_at_the_peak_adds_up(strategy):
    model = use_strategy(create_model("vgg6", width=0.25), strategy)
    predicted = predicted_bytes(model, *random_sample((3, 32, 32), 4, 2, repeated=True))
    assert sum(predicted.alive.values()) == max(predicted.stages.values())
    assert all(": " in label or label == "working memory inside operations" for label in predicted.alive)


def test_prediction_leaves_the_model_alone():
    model = create_model("resnet19", width=0.0625, input_shape=(3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pointers = {k: v.data_ptr() for k, v in model.state_dict().items()}
    predicted_bytes(model, *random_sample((3, 16, 16), 4, 2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.data_ptr() == pointers[key], key
    assert all(p.grad is None for p in model.parameters())


# five networks, large enough that the interpreter's own memory does not count
PROMISE = {
    "vgg6": ({"width": 0.5}, 8, 8, (3, 32, 32)),
    "vgg9": ({"width": 0.5}, 4, 8, (3, 32, 32)),
    "resnet19": ({"width": 0.25}, 4, 8, (3, 32, 32)),
    "mlp": ({"hidden": [512, 512, 512]}, 16, 256, (1, 28, 28)),
    "har_mlp": ({}, 128, 128, (9,)),
}


@pytest.mark.parametrize("strategy", ["bptt", "checkpoint", "lean:input", "lean:spikes"])
@pytest.mark.parametrize("name", PROMISE)
def test_measured_peak_lies_below_the_prediction_and_close_to_it(name, strategy):
    options, T, B, shape = PROMISE[name]
    target = Target(name, options=options, timesteps=T, batch=B, strategy=strategy, input_shape=shape)
    model = target.build()
    predicted = predicted_bytes(model, *target.sample(model)).peak
    measured = measured_peak_bytes(target)
    assert measured <= predicted <= 1.15 * measured


def test_a_prediction_says_whether_it_is_a_promise():
    words = {"timesteps": 4, "batch": 16, "predict_only": True}
    large = {"image": "3x32x32", "width": 0.5, **words}
    assert profile("vgg6", **large).settings["prediction"] == "measured <= predicted <= 1.15 measured"
    for settings, reason in (
        ({**large, "dtype": "bfloat16"}, "half precision"),
        ({**words, "image": "3x8x8", "width": 0.25, "strategy": "lean"}, "below 32 MiB"),
    ):
        assert profile("vgg6", **settings).settings["prediction"].startswith(f"estimate ({reason}")


def test_a_measurement_repeats_within_one_percent_whatever_heap_the_caller_has(monkeypatch):
    target = Target("vgg6", options={"width": 0.5}, timesteps=4, batch=8, input_shape=(3, 32, 32))
    first = measured_peak_bytes(target)
    # without mappings of its own a block would never go back to the system
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8000000000")
    assert abs(first - measured_peak_bytes(target)) <= 0.01 * first


def test_a_model_in_memory_is_measured_like_its_name():
    target = Target("vgg6", options={"width": 0.5}, timesteps=4, batch=8, input_shape=(3, 32, 32))
    model = target.build()
    by_name, in_memory = measured_peak_bytes(target), measured_peak_bytes_of(model, *target.sample(model))
    assert abs(by_name - in_memory) <= 0.02 * by_name


def test_what_cannot_be_done_is_said():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * int(x.sum().item() > 0)

    x, y = random_sample((4,), 3, 2)
    with pytest.raises(SpikefitError, match=r"cannot run on fake tensors.*remove .item"):
        predicted_bytes(Counting(), x, y)
    with pytest.raises(SpikefitError, match=r"cannot be handed to a fresh process.*package.module:function"):
        measured_peak_bytes_of(Counting(), x, y)
    with pytest.raises(OptionError, match="needs a sample"):
        profile(Counting())
    for bad in ({"timesteps": 0}, {"batch": 0}, {"encoding": "rate"}, {"dtype": "int8"}):
        with pytest.raises(OptionError, match="profile: "):
            Target("vgg6", **bad)
    with pytest.raises(OptionError, match="cannot find the factory"):
        Target("nowhere:model").build()
