"""Profile: operations, energy and rates by layer, against known answers."""

import json

import pytest
import torch
from torch import nn

from spikefit.errors import OptionError, SpikefitError
from spikefit.layers import Dropout, Flatten, Readout, SpikingConv2d
from spikefit.models import SpikingNetwork, create_model
from spikefit.planning import (
    Operations,
    energy_report,
    profile,
    random_sample,
)
from spikefit.planning.energy import exact_synops, macs_of, operations
from spikefit.planning.target import with_targets


def test_energy_of_a_known_network():
    # conv 3->16 on analog input, conv 16->32 at rate 0.2, dense 2048->10 at rate 0.1; 8x8 maps, T = 4
    conv1, conv2, dense = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Linear(2048, 10)
    macs = [macs_of(conv1, (16, 8, 8)), macs_of(conv2, (32, 8, 8)), macs_of(dense, (10,))]
    assert macs == [27_648, 294_912, 20_480]
    spiking = [Operations(macs[1], 4, True, 0.2), Operations(macs[2], 4, True, 0.1)]
    every_step = energy_report([Operations(macs[0], 4, False, 0.5), *spiking])
    assert every_step["synops"] == pytest.approx(244_121.6, abs=1e-6)
    assert every_step["snn_pj"] == pytest.approx(728_432.64, abs=1e-6)
    assert every_step["ann_pj"] == pytest.approx(1_577_984, abs=1e-6)
    assert energy_report([Operations(macs[0], 1, False, 0.5), *spiking])["snn_pj"] == pytest.approx(
        346_890.24, abs=1e-6
    )


def test_padding_is_counted_or_not():
    conv, ones = nn.Conv2d(1, 1, 3, padding=1), torch.ones(1, 1, 1, 4, 4)
    assert operations(conv, ones, (1, 4, 4)).synops == 144
    assert exact_synops(conv, ones) == 100
    grouped = nn.Conv2d(4, 8, 3, groups=2)
    spikes = (torch.rand(3, 2, 4, 6, 6) < 0.3).float()
    wanted = sum(float(nn.functional.conv2d(s, torch.ones_like(grouped.weight), groups=2).sum()) for s in spikes)
    assert exact_synops(grouped, spikes) == pytest.approx(wanted)


def test_a_layer_that_was_not_run_has_no_energy():
    report = energy_report([Operations(100, 4, False, None)])
    assert (report["snn_pj"], report["ratio"], report["ann_pj"]) == (None, None, pytest.approx(460.0))


def test_profile_of_a_network():
    torch.manual_seed(0)
    blocks = [SpikingConv2d(2, 8, pool="avg"), SpikingConv2d(8, 8), Flatten(), Readout(8 * 4 * 4, 3)]
    model = SpikingNetwork(blocks, input_shape=(2, 8, 8))
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    x, y = random_sample((2, 8, 8), 5, 4)
    seen = profile(model, (x, y), repeats=1)
    rows = {row.name: row for row in seen.layers}
    assert list(rows)[:3] == ["blocks.0", "blocks.1", "blocks.3"]
    assert [rows[n].macs for n in ("blocks.0", "blocks.1", "blocks.3")] == [2 * 9 * 8 * 64, 8 * 9 * 8 * 16, 128 * 3]
    # the image is repeated: its layer runs once, with multiplications; so do averaged spikes, at every step
    assert rows["blocks.0"].energy_pj == pytest.approx(4.6 * rows["blocks.0"].macs)
    assert rows["blocks.1"].energy_pj == pytest.approx(4.6 * rows["blocks.1"].macs * 5)
    rate = rows["blocks.1"].spike_rate
    assert 0.02 < rate < 0.9
    assert rows["blocks.3"].synops == pytest.approx(rows["blocks.3"].macs * 5 * rate, rel=1e-6)
    assert rows["blocks.3"].energy_pj == pytest.approx(0.9 * rows["blocks.3"].synops)
    assert seen.saved_bytes == sum(sum(row.saved_bytes.values()) for row in seen.layers)
    assert seen.step_seconds > 0
    assert seen.measured_peak_bytes > 0
    assert seen.settings["repeated_input"] is True
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    json.dumps(seen.to_dict())


@pytest.mark.parametrize(
    ("name", "options"), [("har_conv", {"timesteps": 16, "widths": [8, 8]}), ("har_mlp", {"hidden": 16})]
)
def test_sequences_and_convolutions_over_time(name, options):
    model = create_model(name, **options)
    x, y = random_sample((9,), 16, 4)
    seen = profile(model, (x, y), predict_only=True)
    assert (seen.measured_peak_bytes, seen.step_seconds, seen.energy["snn_pj"]) == (None, None, None)
    macs = {row.name: row.macs for row in seen.layers if row.macs}
    wanted = {"blocks.0": 9 * 8 * 8 * 17, "blocks.3": 8 * 8 * 8 * 10} if name == "har_conv" else {"blocks.0": 9 * 16}
    assert macs.items() >= wanted.items()


def test_names_take_the_words_of_the_command_line():
    words = {"timesteps": 2, "batch": 3, "width": 0.0625, "predict_only": True}
    seen = [profile("vgg9", image=image, **words) for image in ("3x16x16", (3, 16, 16))]
    seen.append(
        profile("vgg9", input_shape=(3, 16, 16), options={"width": 0.0625}, timesteps=2, batch=3, predict_only=True)
    )
    assert seen[0].settings["sample_shape"] == [3, 16, 16]
    assert seen[0].to_dict() == seen[1].to_dict() == seen[2].to_dict()
    default = profile("mlp", hidden=[8], predict_only=True).settings
    assert (default["timesteps"], default["batch"]) == (8, 64)
    for words, told in (
        ({"image": "3by3"}, "expected a shape"),
        ({"image": "3x8x8", "shape": (3, 8, 8)}, "mean the same"),
        ({"widht": 0.5}, "Did you mean width"),
    ):
        with pytest.raises(OptionError, match=told):
            profile("vgg9", **words, predict_only=True)
    with pytest.raises(OptionError, match=r"demo\.toml is a recipe.*build_step"):
        profile("recipes/demo.toml")


def test_a_profile_leaves_random_numbers_alone():
    model = SpikingNetwork([Flatten(), Dropout(0.5), Readout(64, 3)], input_shape=(1, 8, 8))
    x, y = random_sample((1, 8, 8), 2, 2)
    before = torch.get_rng_state()
    seen = profile(model, (x, y), repeats=1, backend="reference")
    profile("mlp", hidden=[4], predict_only=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen.settings["backend"] == "reference"


@pytest.mark.parametrize("strategy", ["lean:spikes", "lean:input"])
def test_operations_and_rates_do_not_depend_on_the_strategy(strategy):
    words = {"timesteps": 3, "batch": 2, "image": "3x8x8", "width": 0.125, "repeats": 1}
    plain, lean = (profile("vgg6", strategy=s, **words) for s in ("bptt", strategy))
    assert lean.energy == plain.energy
    assert [(r.name, r.macs, r.spike_rate) for r in lean.layers if r.macs] == [
        (r.name, r.macs, r.spike_rate) for r in plain.layers if r.macs
    ]


def test_targets_are_made_where_the_input_is():
    x = torch.empty(3, 2, 5, device="meta")
    made, y = with_targets(x)
    assert made is x
    assert (y.device, y.shape) == (x.device, (2,))
    assert with_targets((x, y)) == (x, y)


def wasteful_loss(logits, targets):
    return logits.unsqueeze(0).repeat(500, 1, 1, 1).square().mean()


def test_the_measured_step_has_the_loss_that_was_asked_for():
    model = create_model("mlp", hidden=[4], input_shape=(1, 8, 8))
    seen = profile(model, random_sample((1, 8, 8), 16, 64), loss=wasteful_loss, repeats=1)
    wasted = 500 * 16 * 64 * 10 * 4
    assert wasted < seen.measured_peak_bytes < 8 * wasted
    named = profile("mlp", hidden=[4], image="1x8x8", timesteps=16, batch=64, loss=wasteful_loss, repeats=1)
    assert wasted < named.measured_peak_bytes < 8 * wasted


class OfAScript(nn.Linear):
    pass


def test_a_class_of_the_running_script_is_refused(monkeypatch):
    monkeypatch.setattr(OfAScript, "__module__", "__main__")
    x = torch.rand(2, 3, 4)
    with pytest.raises(SpikefitError, match=r"OfAScript is defined in the script that runs.*predict_only=True"):
        profile(OfAScript(4, 3), x, repeats=1)
    assert profile(OfAScript(4, 3), x, predict_only=True).predicted_peak_bytes > 0


def test_named_models_and_autocast():
    seen = profile("vgg6", timesteps=4, batch=4, input_shape=(3, 8, 8), options={"width": 0.25}, predict_only=True)
    half = profile(
        "vgg6",
        timesteps=4,
        batch=4,
        input_shape=(3, 8, 8),
        options={"width": 0.25},
        dtype="bfloat16",
        predict_only=True,
    )
    norm_input = "kept: norm input"  # nothing but z, and two vectors per channel
    assert 0.45 * seen.categories[norm_input] < half.categories[norm_input] < 0.55 * seen.categories[norm_input]
    assert half.settings["dtype"] == "bfloat16 autocast"
