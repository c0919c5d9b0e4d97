"""Profile: operations, energy and rates by layer, against known answers."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spikefit.errors import OptionError, SpikefitError
from spikefit.layers import Dropout, Flatten, Readout, SpikingConv2d, SpikingLinear
from spikefit.models import SpikingNetwork, create_model
from spikefit.neurons import Threshold
from spikefit.planning import (
    Operations,
    energy_report,
    profile,
    random_sample,
)
from spikefit.planning.counting import counted_run, counted_shapes
from spikefit.planning.energy import counts_analog_as_spikes
from spikefit.planning.operations import exact_synops, macs_of, operations
from spikefit.planning.target import with_targets
from support import PlainSteps, known_steps


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


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_what_is_repeated_beyond_the_border_spikes(mode):
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode)
    assert exact_synops(conv, torch.ones(1, 1, 1, 4, 4)) == 2 * 9 * 16
    line = nn.Conv1d(1, 1, 5, padding=2, padding_mode=mode)
    assert exact_synops(line, torch.ones(1, 1, 1, 6)) == 5 * 6


def test_accumulates_are_counted_exactly_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact_synops(nn.Conv1d(1, 1, 261), torch.ones(1, 1, 1, 261)) == 261


def test_both_accountings_of_a_known_network():
    first, spiking = Operations(100, 1, False, 0.5, first=True), Operations(200, 4, True, 0.1)
    analog, other = Operations(50, 4, False, 3.0), Operations(400, 1, True, 0.3)
    report = energy_report([first, spiking, analog, other])
    # SynOps 80 + 120 of 800 + 400 operations that spikes reach, and 200 more that analog values do
    assert report["snn_pj"] == pytest.approx(4.6 * (100 + 200) + 0.9 * 200)
    assert report["all_spiking_rate"] == pytest.approx(200 / 1200)
    assert report["all_spiking_pj"] == pytest.approx(4.6 * 100 + 0.9 * 200 / 1200 * 1400)
    assert report["macs"] == 750
    assert counts_analog_as_spikes(report)
    # without analog values behind the first layer the two are one; events are charged as they come
    events = Operations(100, 4, True, 0.25, first=True)
    report = energy_report([events, spiking, other])
    assert report["all_spiking_pj"] == pytest.approx(report["snn_pj"]) == pytest.approx(0.9 * 300)
    assert not counts_analog_as_spikes(report)
    for layers in ([first], [first, analog], [first, Operations(200, 4, False, None)], []):
        report = energy_report(layers)
        assert (report["all_spiking_pj"], report["all_spiking_rate"]) == (None, None)
        assert not counts_analog_as_spikes(report)
    assert not counts_analog_as_spikes({"snn_pj": 1.0})  # as older files have it


def test_calls_of_different_size_add_up():
    small, large = Operations(100, 1, True, 0.5, 40.0), Operations(300, 2, True, 0.25, 140.0)
    both = small + large
    assert (both.total_macs, both.steps, both.binary) == (700, 3, True)
    assert both.synops == pytest.approx(50 + 150)
    assert both.synops_exact == 180
    assert (both.first, (small + Operations(100, 1, False, 0.5)).binary) == (False, False)
    same = Operations(100, 1, True, 0.5) + Operations(100, 3, True, 0.25)
    assert (same.macs, type(same.macs), same.rate) == (100, int, pytest.approx(1.25 / 4))


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


# stem, two private depthwise layers, the shared layer, the head, and what each does in one step
PLAIN_MACS = {
    "blocks.0.stem": 2 * 16 * 9,
    "blocks.0.private.0": 2 * 16 * 9,
    "blocks.0.private.1": 2 * 16 * 9,
    "blocks.0.shared": 2 * 16 * 2,
    "blocks.0.head": 2 * 3,
}


@pytest.mark.parametrize("repeated", [False, True])
def test_layers_that_a_block_calls_itself(repeated):
    model, x = known_steps(), torch.full((1 if repeated else 2, 3, 1, 4, 4), 0.25).expand(2, 3, 1, 4, 4)
    seen = profile(model, x, repeats=1)
    rows = {row.name: row for row in seen.layers}
    assert {name: row.macs for name, row in rows.items() if row.macs} == PLAIN_MACS
    assert [rows[name].steps for name in PLAIN_MACS] == [1, 1, 1, 2, 2]
    # half of the neurons fire in front of both private layers; all of them do behind step 2
    assert [rows[name].synops for name in PLAIN_MACS] == [None, 144, 144, None, pytest.approx(2 * 6 * 0.75)]
    # a 3x3 kernel finds 100 of 144 places inside a map of 4x4
    assert [rows[name].synops_exact for name in PLAIN_MACS] == [None, 100, 100, None, 3 * 1 + 3 * 2]
    energies = [4.6 * 288, 0.9 * 144, 0.9 * 144, 4.6 * 64 * 2, 0.9 * 9]
    assert [rows[name].energy_pj for name in PLAIN_MACS] == pytest.approx(energies)
    assert seen.energy["snn_pj"] == pytest.approx(sum(energies))
    rate = (144 + 144 + 9) / (288 + 288 + 12)
    assert seen.energy["all_spiking_rate"] == pytest.approx(rate)
    assert seen.energy["all_spiking_pj"] == pytest.approx(4.6 * 288 + 0.9 * rate * (288 + 288 + 128 + 12))
    # one threshold on maps of 32 neurons, twice, and on two means, twice
    fire = rows["blocks.0.fire"]
    assert fire.spike_rate == pytest.approx((16 + 16 + 1 + 2) / (32 + 32 + 2 + 2))
    assert fire.saved_bytes == {"neuron input": 2 * 3 * (32 + 2) * 4}
    assert seen.settings["reset"] == "none"
    json.dumps(seen.to_dict())


class SharedSteps(PlainSteps):
    weights_per_step = False


def test_the_twin_of_steps_with_weights_of_their_own():
    x = torch.full((2, 3, 1, 4, 4), 0.25)
    for block, shared in ((PlainSteps, 2), (SharedSteps, 1)):
        for seen in (profile(known_steps(block), x, repeats=1), profile(known_steps(block), x, predict_only=True)):
            assert seen.energy["macs"] == 3 * 288 + shared * (64 + 6)
            assert seen.energy["ann_pj"] == pytest.approx(4.6 * seen.energy["macs"])
            rows = {row.name: row for row in seen.layers if row.macs}
            assert {name: row.macs for name, row in rows.items()} == PLAIN_MACS
            assert [rows[name].steps for name in PLAIN_MACS] == [1, 1, 1, 2, 2]
    assert (seen.energy["snn_pj"], seen.energy["all_spiking_pj"], rows["blocks.0.head"].synops) == (None, None, None)


def test_modules_of_units_and_readouts_are_not_counted_a_second_time():
    blocks = [SpikingConv2d(2, 4, norm="ws"), SpikingConv2d(4, 4), Flatten(), Readout(4 * 64, 3)]
    model, called = SpikingNetwork(blocks, input_shape=(2, 8, 8)), []
    for module in (blocks[0].synapse, blocks[1].synapse, blocks[3].linear):
        module.register_forward_hook(lambda *_: called.append(1))
    x = torch.rand(3, 2, 2, 8, 8)
    for counted, _ in (counted_run(model, x, False), counted_shapes(model, x, False)):
        assert list(counted) == ["blocks.0", "blocks.1", "blocks.3"]
        assert {layer.steps for layer in counted.values()} == {3}
    assert not called


class Rows(nn.Module):
    """A convolution and linear maps, each called with rows of another kind."""

    def __init__(self):
        super().__init__()
        self.folded = nn.Conv1d(2, 3, 3)
        self.tokens, self.sequence, self.alone, self.mixed = (nn.Linear(2, 5) for _ in range(4))
        self.named = nn.Linear(2, 1)

    def forward(self, x):
        # x: [T, B, 2]
        total = self.named(input=x[1]).sum()
        line = x.unsqueeze(3).repeat(1, 1, 1, 4)
        total = total + self.folded(line.flatten(0, 1)).sum()
        total = total + self.tokens(x[0].unsqueeze(1).repeat(1, 7, 1)).sum()
        total = total + self.sequence(x).sum() + self.sequence(x[0]).sum()
        total = total + self.alone(x[0, 0]).sum() + self.mixed(x[0].repeat(5, 1, 1)[:, :2]).sum()
        return total.expand(x.shape[0], x.shape[1], 2)


def test_rows_of_all_kinds_are_counted_per_sample():
    x = torch.rand(4, 3, 2)
    for counted, _ in (counted_run(Rows(), x, False), counted_shapes(Rows(), x, False)):
        found = {name: (layer.macs, layer.steps) for name, layer in counted.items()}
        assert found == {
            "named": (2, 1),
            "folded": (3 * 2 * 2 * 3, 4),
            "tokens": (7 * 10, 1),
            "sequence": (10, 5),
            # one row for three samples; five rows of two places for three samples
            "alone": (pytest.approx(10 / 3), 1),
            "mixed": (pytest.approx(5 * 2 * 10 / 3), 1),
        }
    exact = counted_run(Rows(), torch.ones(4, 3, 2), False)[0]
    assert {name: layer.synops_exact / layer.total_macs for name, layer in exact.items()} == pytest.approx(
        dict.fromkeys(exact, 1.0)
    )


class Frames(nn.Module):
    """Two frames with a stem of two layers each, and layers behind spikes of several kinds."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))
        self.events = nn.Linear(2, 2)
        self.fire, self.unit = Threshold(), SpikingLinear(2, 2, norm="none")
        self.pooled, self.membrane, self.own, self.late = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x):
        total = torch.zeros(2)
        for frame, (first, second) in zip(x, self.stems, strict=True):
            z = second(first(frame.clone()))  # a layout of its own
            spikes = self.fire(z) + 0.0
            buffer = torch.zeros(2, *spikes.shape)
            buffer[1] = spikes
            total = total + self.pooled(buffer.mean(0))
        total = total + self.events((x[0] > 0.5).float().contiguous()).sum()
        s, v = self.unit(x)
        total = total + self.membrane(v)
        own = (second(frame) > 0).float()  # a neuron written out
        return total + self.own(own) + self.late(0.3 * own) + s


def test_first_layers_have_no_spike_behind_their_input():
    """Whatever ran before them: copies of data, binary data, and layers with only layers in front."""
    x = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Frames()
    with torch.no_grad():
        model.stems[1][1].bias.fill_(2.0)  # some spikes
    counted, _ = counted_run(model, x, False)
    first = [f"stems.{t}.{i}" for t in range(2) for i in range(2)]
    assert {name for name, layer in counted.items() if layer.first} == {*first, "events", "unit"}
    assert {name for name, layer in counted.items() if not layer.first} == {"pooled", "membrane", "own", "late"}


class RunAgain(PlainSteps):
    def forward(self, x, state=None):
        return checkpoint(super().forward, x, state, use_reentrant=False)


def test_what_backward_runs_again_is_not_counted():
    counted, _ = counted_shapes(known_steps(RunAgain), torch.rand(2, 3, 1, 4, 4), False)
    assert {name: layer.steps for name, layer in counted.items()} == dict(zip(PLAIN_MACS, [1, 1, 1, 2, 2], strict=True))


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
