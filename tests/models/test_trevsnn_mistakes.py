"""T-RevSNN: every kind of bad input is refused, and the message says who, what was expected, what came, what to do."""

import math
import re

import pytest
import torch

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, ShapeError, SpikefitError, StateError, StrategyError

WIDTHS = (8, 8, 8, 16)


def small(name="trevsnn_mini", **options):
    torch.manual_seed(0)
    sides = (32, 32) if name in ("trevsnn_tiny", "trevsnn_small") else (8, 8)
    channels = 2 if options.get("encode") == "frames" or name == "trevsnn_dvs" else 3
    return create_model(name, **{"widths": WIDTHS, "input_shape": (channels, *sides), **options})


def refused(error, function, *parts):
    """`function()` raises `error`, whose message has every one of `parts`."""
    with pytest.raises(error) as found:
        function()
    missing = [part for part in parts if part not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


def test_a_sequence_of_another_length():
    model = small()
    x = torch.rand(3, 2, 3, 8, 8)
    refused(
        ShapeError, lambda: model(x), "TRevSNN", "T = 4", "(3, 2, 3, 8, 8)", "T = 3", "encoding.repeat(x, timesteps=4)"
    )
    frames = small("trevsnn_dvs")
    x = torch.rand(3, 2, 2, 8, 8)
    refused(
        ShapeError, lambda: frames(x), "T = 8", "(3, 2, 2, 8, 8)", "event_frames(events, timesteps=8", "timesteps=3"
    )


def test_an_image_without_a_time_axis():
    x = torch.rand(2, 3, 8, 8)
    refused(
        ShapeError, lambda: small()(x), "TRevSNN", "[T, B, 3, 8, 8]", "(2, 3, 8, 8)", "encoding.repeat(x, timesteps=4)"
    )


def test_an_image_for_a_network_of_frames():
    frames = small("trevsnn_dvs")
    for x in (torch.rand(2, 3, 8, 8), torch.rand(8, 2, 3, 8, 8)):
        refused(
            ShapeError, lambda x=x: frames(x), "[T, B, 2, 8, 8]", str(tuple(x.shape)), "event_frames", "timesteps=8"
        )


def test_frames_for_a_network_of_images():
    x = torch.rand(4, 2, 2, 8, 8)
    refused(ShapeError, lambda: small()(x), "[T, B, 3, 8, 8]", "(4, 2, 2, 8, 8)", "encoding.repeat(x, timesteps=4)")


@pytest.mark.parametrize(("name", "multiple", "sides"), [("trevsnn_tiny", 16, (40, 32)), ("trevsnn_mini", 4, (8, 10))])
def test_sides_that_stages_do_not_halve(name, multiple, sides):
    words = (f"multiples of {multiple}", str((3, *sides)))
    refused(ShapeError, lambda: small(name, input_shape=(3, *sides)), *words)
    x = torch.rand(1, 2, 3, *sides).expand(4, -1, -1, -1, -1)
    refused(ShapeError, lambda: small(name)(x), *words)
    refused(ShapeError, lambda: small(name).init_state(2, (3, *sides)), *words)


def test_sides_of_frames():
    refused(ShapeError, lambda: small("trevsnn_dvs", input_shape=(2, 10, 8)), "multiples of 4", "(2, 10, 8)")


def test_auxiliary_heads_where_the_steps_are_no_multiple_of_four():
    for T in (1, 2, 6):
        words = (f"timesteps={T}", "multiple of 4", "auxiliary_steps=(", "auxiliary=False")
        refused(OptionError, lambda T=T: small(timesteps=T), "trevsnn_mini", *words)
    assert small(timesteps=6, auxiliary_steps=(2, 3)).auxiliary_heads == 2
    assert small(timesteps=6, auxiliary=False).auxiliary_heads == 0
    for steps in ((3, 2), (2, 6), (2, 2)):
        refused(OptionError, lambda s=steps: small(timesteps=6, auxiliary_steps=s), "T = 6", str(steps))


def test_groups_of_channels_that_do_not_come_out_even():
    refused(
        OptionError,
        lambda: create_model("trevsnn_mini", encode="group", stem_channels=30),
        "trevsnn_mini",
        "T = 4",
        "stem_channels=30",
        "use 28",
    )
    refused(OptionError, lambda: small(encode="group", stem_channels=64), "64", "T = 4", "16 channels", str(WIDTHS))


@pytest.mark.parametrize("encode", ["frames", "repeat"])
def test_groups_of_frames(encode):
    words = ("stem_channels=64", "T = 4", "encode='group' only", repr(encode))
    refused(OptionError, lambda: create_model("trevsnn_mini", encode=encode, stem_channels=64), *words)


@pytest.mark.parametrize(
    ("strategy", "value"),
    [("reversible", 0.0), ("spike_bits", 9e-4), ("reversible:1", -9e-4), ("reversible", math.nan)],
)
def test_gains_too_small_to_divide_by_come_with_a_checkpoint(strategy, value):
    model = use_strategy(small(gain="free"), strategy)
    state = model.state_dict()
    state["blocks.1.gains.raw.2"][3 * 8 + 5] = value
    model.load_state_dict(state)
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    words = ("blocks.1", "stage 3 of step 4", "at least 0.001", f"got {abs(value):g}", "divides", "step_checkpoint")
    refused(StrategyError, lambda: model(x), strategy.partition(":")[0], *words)
    use_strategy(model, "step_checkpoint")(x)


def test_gains_that_are_no_numbers_in_a_bounded_network():
    model = use_strategy(small(), "reversible")
    with torch.no_grad():
        model.body.gains.raw[0][8] = math.nan
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    refused(StrategyError, lambda: model(x), "stage 1 of step 2", "at least 0.5", "'bounded'", "got nan")


@pytest.mark.parametrize("strategy", ["reversible", "reversible:15", "spike_bits", "spike_bits:14"])
def test_an_inverse_whose_error_could_exceed_the_tolerance(strategy):
    model = use_strategy(small(gain="free", timesteps=16), strategy)
    x = torch.rand(1, 2, 3, 8, 8).expand(16, -1, -1, -1, -1)
    name = strategy.partition(":")[0]
    advice = "spike_bits" if name == "reversible" else "step_checkpoint"
    with pytest.raises(StrategyError) as found:
        model(x)
    text = str(found.value)
    for part in (name, "|a| down to 0.5", "R = ", "E = ", "0.001 accepted", "anchor_every is ", advice, "float64"):
        assert part in text, text
    safe = re.search(r"strategy='(\w+:\d+)'", text).group(1)
    use_strategy(model, safe)(x)
    use_strategy(model, f"{name}:{15 if strategy.endswith('15') else 'none'},10")(x)
    use_strategy(model, strategy).double()(x.double())


def test_states_in_half_precision():
    model = small()
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    _, state = model.run(x[:2], model.init_state(2))
    for dtype in (torch.float16, torch.bfloat16):
        half = (state[0], (state[1][0], *(v.to(dtype) for v in state[1][1:])))
        refused(StateError, lambda half=half: model.run(x[2:], half), str(dtype), "float32 or float64", "rounding")


def test_bits_where_branches_read_states():
    words = ("spike_bits", "all_deeper", "analog states", "step_checkpoint", "reversible")
    refused(StrategyError, lambda: small(fusion="all_deeper", strategy="spike_bits"), *words)


@pytest.mark.parametrize("kernel", [2, 4, 0])
def test_kernels(kernel):
    word = "odd" if kernel else "kernel"
    refused(OptionError, lambda: small(kernel=kernel), "trevsnn_mini", word, f"got {kernel}")


@pytest.mark.parametrize("option", ["0", "-1", "1.5", "x", "4,0", "4,-1", "4,nan", "4,0.1,fix", "4,0.1,raise,1"])
def test_options_of_reversible(option):
    words = ("anchor_every", "repair", repr(option))
    refused(StrategyError, lambda: use_strategy(small(), f"reversible:{option}"), "reversible", *words)


@pytest.mark.parametrize("option", ["0", "-3", "check", "4,0.1,repair", "none,inf"])
def test_options_of_spike_bits(option):
    words = ("anchor_every", "1 or more", "none", repr(option))
    refused(StrategyError, lambda: use_strategy(small(), f"spike_bits:{option}"), "spike_bits", *words)


@pytest.mark.parametrize("option", ["check", "off"])
def test_options_of_reversible_blocks_in_depth(option):
    words = (repr(option), "two streams", "anchor_every")
    refused(StrategyError, lambda: use_strategy(small(), f"reversible:{option}"), *words)
    table = {"name": "reversible", "check": option}
    refused(StrategyError, lambda: use_strategy(small(), table), *words)


def test_options_in_time_for_blocks_in_depth():
    words = ("'4'", "coupled in time", "two streams", "check or off")
    refused(StrategyError, lambda: create_model("revsresnet21", width=1 / 16, strategy="reversible:4"), *words)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("fusion", "adjacent, all_deeper"),
        ("encode", "repeat, frames, group"),
        ("gain", "free, bounded, one"),
        ("strategy", "reversible"),
    ],
)
def test_unknown_names(option, known):
    refused(SpikefitError, lambda: small(**{option: "other"}), known, "'other'", option)


def test_an_unknown_network():
    refused(OptionError, lambda: create_model("trevsnn_huge"), "trevsnn_huge", "trevsnn_tiny")


@pytest.mark.parametrize("step", [0, 9, -1, None, 1.0])
def test_states_of_no_step(step):
    model = small()
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    _, (stem, (_, *v)) = model.run(x[:2], model.init_state(2))
    words = ("an initial state is not accepted", "init_state") if step == 0 else ("step of 0 to 4", repr(step))
    refused(StateError, lambda: model.run(x[2:], (stem, (step, *v))), "TRevSNN", *words)


def test_states_of_another_batch_or_network():
    model = small()
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    _, (stem, (_, *v)) = model.run(x[:2], model.init_state(2))
    refused(StateError, lambda: model.run(x[2:, :1], (stem, (2, *v))), "4 states of 1 samples", "(2, 8, 8, 8)")
    refused(StateError, lambda: model.run(x[2:], (stem, (2, *v[1:]))), "4 states")
    refused(StateError, lambda: model.run(x[2:], (2, *v)), "2 entries", "5 entries", "init_state")


def test_more_steps_than_there_are():
    model = small().eval()
    x = torch.rand(1, 2, 3, 8, 8).expand(6, -1, -1, -1, -1)
    words = ("4 time steps", "have run", "init_state", "timesteps=")
    refused(ShapeError, lambda: model.run(x, model.init_state(2)), "got 6", *words)
    _, state = model.run(x[:4], model.init_state(2))
    refused(ShapeError, lambda: model.step(x[0], state), "4 have run", *words)
    feature = model.features(x[:4])[0]
    refused(ShapeError, lambda: model.step_features(feature, state), "4 have run", *words)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"encode": "frames", "auxiliary": True}, ("frames", "auxiliary")),
        ({"encode": "frames", "auxiliary_steps": (1,)}, ("auxiliary_steps=(1,)", "frames")),
        ({"auxiliary": False, "auxiliary_steps": (1,)}, ("auxiliary_steps=(1,)", "auxiliary=False")),
        ({"gain": "one", "learn_gain": False}, ("gain='one'", "learn_gain")),
        ({"state_grid": 14}, ("state_grid=14", "gain='bounded'", "gain='one'")),
        ({"gain": "one", "state_grid": 3}, ("4 to 20",)),
        ({"widths": (8, 8, 8)}, ("widths", "4 stages", "(8, 8, 8)")),
        ({"timesteps": 0}, ("timesteps",)),
        ({"num_classes": 0}, ("num_classes",)),
        ({"neuron": {"name": "lif"}}, ("neuron",)),
        ({"norm": "bn"}, ("norm",)),
        ({"share": "layer"}, ("share",)),
    ],
)
def test_options_without_effect(options, parts):
    refused(SpikefitError, lambda: small(**options), *parts)


def test_auxiliary_logits_that_are_not_there():
    x = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    refused(OptionError, lambda: small(auxiliary=False)(x, auxiliary=True), "no auxiliary heads", "auxiliary=True")
    deployed = small().deployed()
    refused(OptionError, lambda: deployed(x, auxiliary=True), "no auxiliary heads")
    refused(OptionError, deployed.deployed, "it is deployed")


def test_an_image_where_features_are_expected():
    model = small()
    refused(
        ShapeError,
        lambda: model.step_features(torch.rand(2, 3, 8, 8), model.init_state(2)),
        "features",
        "(2, 3, 8, 8)",
        "step",
    )
    image = torch.rand(1, 2, 3, 8, 8).expand(3, -1, -1, -1, -1)
    refused(ShapeError, lambda: model.features(image), "T = 3", "timesteps=4")
