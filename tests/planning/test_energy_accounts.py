"""The strict and the published accounting of energy, recurrent modules, and steps that are cut into parts."""

import json
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from spikefit.cli.show import show_profile
from spikefit.errors import OptionError, ShapeError
from spikefit.layers import Flatten, Readout, SpikingConv1d, SpikingConv2d, SpikingLinear
from spikefit.models import SpikingNetwork
from spikefit.neurons import Threshold, TwoGroupNode
from spikefit.planning import Operations, energy_report, profile, random_sample
from spikefit.planning.counting import counted_run, counted_shapes
from spikefit.planning.energy import ASSUMPTIONS, published_energy

# name: millions of additions and multiplications, uJ
PUBLISHED = {
    "ann resnet19": (2285, 2285, 12567.5),
    "ann cnn": (247, 247, 1358.5),
    "ann lstm": (251, 251, 1380.5),
    "snn resnet20": (142, 8.80, 168.3),
    "snn resnet19": (360, 6.80, 355.3),
    "windows cnn": (132, 2.14, 128.6),
    "windows lstm": (79, 5.31, 95.5),
}


@pytest.mark.parametrize(("adds", "mults", "microjoules"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_energies(adds, mults, microjoules):
    assert round(published_energy(adds * 1e6, mults * 1e6) * 1e-6, 1) == pytest.approx(microjoules)


def test_published_ratios():
    energy = {name: published_energy(adds, mults) for name, (adds, mults, _) in PUBLISHED.items()}
    found = {name: round(energy[name] / energy["windows cnn"], 1) for name in energy}
    assert found["ann cnn"] == 10.6
    assert found["snn resnet19"] == 2.8
    assert found["snn resnet20"] == 1.3
    assert found["ann resnet19"] == 97.7


@pytest.mark.parametrize(("adds", "mults"), [(-1, 0), (0, -1), (math.nan, 0), (0, math.inf)])
def test_published_energy_wants_numbers_of_operations(adds, mults):
    with pytest.raises(OptionError, match="must be a finite number of operations, at least 0, got"):
        published_energy(adds, mults)


# A network of 12 blocks in windows, 2, 2, 6, 2 per stage, widths 48 to 384 on maps of 16 to 2 pixels: width * side is
# 768 in all stages. 5 blocks have windows of 3/4 of the side, which cost 2.25 times as much, and 7 of 1/2.
AREA, WINDOWS = 768**2, 7 + 5 * 2.25
CONV, MLP, MERGE, STEM, HEAD = 2 * 9 * AREA * WINDOWS, 12 * 6 * AREA, 3 * 2 * AREA, 12 * 48 * 256, 3840
LSTM_HALF = 2 * 4 * AREA * WINDOWS


def account(rate, *, analog, spiking):
    """The report of layers that read spikes of one rate, and of a stem and layers that read analog values."""
    layers = [Operations(STEM, 1, False, 0.1, first=True)]
    layers += [Operations(macs, 1, False, 0.1) for macs in analog] + [
        Operations(macs, 1, True, rate) for macs in spiking
    ]
    return energy_report(layers)


@pytest.mark.parametrize(
    ("rate", "analog", "spiking", "macs", "wanted"),
    [
        (0.54, [MLP, MERGE, HEAD], [CONV, 12 * AREA], 246.99, (309.9, 1136.2, 3.7)),
        (0.54, [MERGE, HEAD], [CONV, 12 * AREA, MLP], 246.99, (135.2, 1136.2, 8.4)),
        (0.32, [LSTM_HALF, MLP, MERGE, 24 * AREA, HEAD], [LSTM_HALF, 24 * AREA], 246.70, (702.4, 1134.8, 1.6)),
    ],
    ids=["cnn", "cnn with a spiking mlp", "lstm"],
)
def test_strict_energies_of_window_networks(rate, analog, spiking, macs, wanted):
    report = account(rate, analog=analog, spiking=spiking)
    assert report["macs"] == pytest.approx(macs * 1e6, abs=5e3)
    found = (report["snn_pj"] * 1e-6, report["ann_pj"] * 1e-6, report["ratio"])
    assert tuple(round(n, 1) for n in found) == wanted
    # the published accounting of the same network does not see what reads analog values
    published = report["published"]
    assert published["adds"] == pytest.approx(rate * report["macs"])
    assert published["mults"] == STEM
    assert published["ratio"] > 5.5 / 4.6 * report["ratio"]


def test_published_accounting_by_hand():
    first = Operations(100, 1, False, 0.5, first=True)  # a repeated step
    layers = [first, Operations(200, 4, True, 0.1), Operations(50, 4, False, 3.0), Operations(400, 1, True, 0.3)]
    wanted = {"rate": 0.2, "adds": 0.2 * 4 * 750, "mults": 100, "snn_pj": 0.9 * 600 + 460, "ann_pj": 5.5 * 750}
    wanted["ratio"] = wanted["ann_pj"] / 1000
    assert energy_report(layers)["published"] == pytest.approx(wanted)
    # neurons that are known have the word; the plain mean, whatever the sizes of the layers
    report = energy_report(layers, firing=[0.3, 0.5, 0.1])["published"]
    assert (report["rate"], report["adds"], report["mults"]) == pytest.approx((0.3, 0.3 * 4 * 750, 100))
    # events are no firing of the network, and cost no multiplication
    events = Operations(100, 4, True, 0.25, first=True)
    report = energy_report([events, *layers[1:]])["published"]
    assert (report["rate"], report["mults"]) == (pytest.approx(0.2), 0)
    # steps that are layers of the twin, or lie inside one computation, do not count T times
    own, over_time = Operations(10, 2, True, 0.2, own_steps=True), Operations(70, 1, True, 0.2, over_time=True)
    assert energy_report([own, over_time, layers[1]], firing=[0.5])["published"]["adds"] == 0.5 * (20 + 70 + 800)


@pytest.mark.parametrize(
    ("layers", "firing"),
    [
        ([], ()),
        ([Operations(10, 1, False, None)], (0.5,)),
        ([Operations(10, 1, False, 0.5, first=True), Operations(10, 1, False, 0.5)], ()),
        ([Operations(10, 1, True, 0.0)], (0.0, 0.0)),
    ],
    ids=["nothing", "not run", "no spikes", "silent"],
)
def test_no_published_energy_of_what_was_not_run_or_does_not_fire(layers, firing):
    published = energy_report(layers, firing=firing)["published"]
    assert published.pop("ann_pj") == pytest.approx(5.5 * 10 * len(layers))
    assert set(published) == {"rate", "adds", "mults", "snn_pj", "ratio"}
    assert set(published.values()) == {None}


def test_rates_are_shares():
    with pytest.raises(OptionError, match=r"firing rates are shares of neurons, 0 to 1, got \[-0\.5, 0\.25\]"):
        energy_report([Operations(10, 1, True, 0.2)], firing=[0.25, -0.5])


def test_the_rates_of_a_profile_are_those_of_its_neurons():
    torch.manual_seed(0)
    blocks = [SpikingConv2d(2, 4, pool="avg"), SpikingConv2d(4, 4), Flatten(), Readout(64, 3)]
    seen = profile(SpikingNetwork(blocks, input_shape=(2, 8, 8)), random_sample((2, 8, 8), 5, 4), repeats=1)
    rates = [row.spike_rate for row in seen.layers if row.spike_rate is not None]
    published = seen.energy["published"]
    assert len(rates) == 2
    assert 0.02 < min(rates) < max(rates) < 0.9
    assert published["rate"] == pytest.approx(sum(rates) / 2)
    assert published["adds"] == pytest.approx(published["rate"] * 5 * seen.energy["macs"])
    assert published["mults"] == 2 * 9 * 4 * 64  # of the image, which is repeated


def test_real_values_are_no_rates():
    blocks = [SpikingLinear(4, 8, norm="none", neuron=TwoGroupNode(beta=-10.0)), Readout(8, 3)]
    x = 1 + torch.rand(3, 2, 4)
    with torch.no_grad():
        blocks[0].synapse.weight.fill_(1.0)
    seen = profile(SpikingNetwork(blocks, input_shape=(4,)), x, repeats=1)
    assert min(row.spike_rate for row in seen.layers if row.spike_rate is not None) < 0, "negative outputs are the case"
    assert seen.energy["published"]["snn_pj"] is None


def test_a_convolution_over_time_is_one_computation():
    model = SpikingNetwork(
        [SpikingConv1d(2, 3, 3, padding=1, over="time", norm="none"), Readout(3, 2)], input_shape=(2,), timesteps=6
    )
    counted, _ = counted_run(model, torch.rand(6, 2, 2), False)
    assert [(layer.macs, layer.steps, layer.over_time) for layer in counted.values()] == [
        (6 * 3 * 2 * 3, 1, True),
        (6, 6, False),
    ]


class Cell(nn.Module):
    """One recurrent module on 7 tokens per sample, on the steps of the sequence, or on those of one sample."""

    def __init__(self, module, **options):
        super().__init__()
        self.cell, self.calls = module(4, 5, **options), "tokens"

    def forward(self, x):
        # x: [T, B, 4]
        if self.calls == "sequence":
            out = self.cell(input=x)[0]
        elif self.calls == "alone":
            out = self.cell(x[:, 0])[0]
        else:
            place = int(self.cell.batch_first)
            out = self.cell(hx=None, input=x[0].unsqueeze(place).repeat_interleave(7, place))[0]
        return out.sum().expand(x.shape[0], x.shape[1], 2)


GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("module", GATES)
def test_recurrent_modules_by_hand(module, batch_first):
    x = torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(1, 3, 4).contiguous()
    one = GATES[module] * 5
    for options, of_input, of_hidden in (
        ({}, one * 4, one * 5),
        ({"bidirectional": True}, 2 * one * 4, 2 * one * 5),
        ({"num_layers": 3}, one * 4, 3 * one * 5 + 2 * one * 5),
        ({"num_layers": 2, "bidirectional": True}, 2 * one * 4, 4 * one * 5 + 2 * one * 10),
        ({"bias": False, "nonlinearity": "relu"} if module is nn.RNN else {"bias": False}, one * 4, one * 5),
    ):
        model = Cell(module, batch_first=batch_first, **options)
        for counted, _ in (counted_run(model, x, False), counted_shapes(model, x, False)):
            assert {name: (layer.macs, layer.steps) for name, layer in counted.items()} == {
                "cell.input": (7 * of_input, 1),
                "cell.recurrent": (7 * of_hidden, 1),
            }
        counted, _ = counted_run(model, x, False)
        half, hidden = counted.values()
        assert (half.binary, half.rate, hidden.binary) == (True, 0.75, False)
        assert half.synops == half.synops_exact == 0.75 * 7 * of_input
        assert hidden.energy_pj == pytest.approx(4.6 * 7 * of_hidden)
        analog, _ = counted_run(model, 0.5 * x, False)
        assert analog["cell.input"].energy_pj == pytest.approx(4.6 * 7 * of_input)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_are_products_with_hidden_values():
    counted, _ = counted_run(Cell(nn.LSTM, proj_size=2), torch.ones(1, 3, 4), False)
    assert [layer.macs for layer in counted.values()] == [7 * 20 * 4, 7 * (20 * 2 + 2 * 5)]


def test_what_the_tokens_of_a_recurrent_module_are():
    model, x = Cell(nn.GRU), torch.rand(6, 3, 4)
    found = {}
    for model.calls in ("sequence", "alone"):
        for counted, _ in (counted_run(model, x, False), counted_shapes(model, x, False)):
            found[model.calls] = [(layer.macs, layer.steps) for layer in counted.values()]
    assert found["sequence"] == [(60, 6), (75, 6)]
    assert found["alone"] == [(6 * 60 / 3, 1), (6 * 75 / 3, 1)]  # one sequence for three samples


class Packed(Cell):
    def forward(self, x):
        return self.cell(pack_sequence([x[:, 0], x[:2, 1]]))


def test_packed_sequences_are_refused():
    with pytest.raises(ShapeError, match=r"cell is counted on a tensor.*PackedSequence.*one length"):
        counted_run(Packed(nn.GRU), torch.rand(6, 2, 4), False)


class Windows(nn.Module):
    """One step in four windows: coded input -> convolution -> neuron -> BiLSTM -> two maps per pixel -> head.

    Shapes:
        [1, B, 2, H, W] -> [1, B, 3]
    """

    parts_of_a_step = True

    def __init__(self, order="batched", side=2):
        super().__init__()
        self.order, self.side = order, side
        self.stem, self.conv = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 3, padding=1)
        self.fire, self.lstm = Threshold(), nn.LSTM(4, 4, bidirectional=True, batch_first=True)
        self.pixel, self.merge, self.head = nn.Linear(8, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3)

    def window(self, coded):
        s = self.fire(self.conv(coded))
        return self.fire(4 * self.lstm(s.flatten(2).transpose(1, 2))[0])

    def forward(self, x):
        z = self.stem(x[0])
        coded, far = (z > 0).float(), z.shape[2] - self.side
        corners = [coded[:, :, i : i + self.side, j : j + self.side] for i in (0, far) for j in (0, far)]
        out = self.window(torch.cat(corners)) if self.order == "batched" else torch.cat([*map(self.window, corners)])
        # [4 B, side^2, 8] -> [B, 2 side, 2 side, 8], as if the windows did not overlap
        out = out.unflatten(0, (4, -1)).movedim(0, 1).reshape(len(z), 2 * self.side, 2 * self.side, 8)
        return self.head(self.merge(self.pixel(out)).mean((1, 2)))[None]


class Uncut(Windows):
    parts_of_a_step = False


class EveryStep(nn.Module):
    """Calls a block that cuts one step into parts, in each of its steps."""

    def __init__(self, **options):
        super().__init__()
        self.block = Windows(**options)

    def forward(self, x):
        return torch.cat([self.block(x_t[None]) for x_t in x])


def window_macs(side):
    pixels = 4 * side**2
    tokens = {"lstm.input": 2 * 16 * 4, "lstm.recurrent": 2 * 16 * 4, "pixel": 8 * 2, "merge": 2 * 2}
    return {"stem": 2 * 3 * 16, "conv": 9 * 3 * 4 * pixels, "head": 6, **{n: m * pixels for n, m in tokens.items()}}


def sized(counted):
    return {name: (layer.macs, layer.steps) for name, layer in counted.items()}


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("side", [2, 3])
def test_parts_of_a_step_are_one_step(batch, side):
    """Whether the layers see all parts at once or one after the other, and whatever the batch equals."""
    wanted = {name: (macs, 1) for name, macs in window_macs(side).items()}
    assert window_macs(3)["conv"] == 2.25 * window_macs(2)["conv"]
    x = torch.randn(1, batch, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for order in ("batched", "sequential"):
        torch.manual_seed(0)
        model = Windows(order, side)
        run, shapes = counted_run(model, x, False)[0], counted_shapes(model, x, False)[0]
        assert sized(run) == sized(shapes) == wanted
        assert {name for name, layer in run.items() if layer.binary} == {"conv", "lstm.input", "pixel"}
        assert {name for name, layer in run.items() if layer.first} == {"stem"}
        found.append(run)
    for name, one in found[0].items():
        assert (one.rate, one.synops_exact) == pytest.approx((found[1][name].rate, found[1][name].synops_exact)), name
        if name in ("lstm.input", "pixel"):  # no padding
            assert one.synops == pytest.approx(one.synops_exact)


def test_without_the_trait_rows_are_steps():
    counted, _ = counted_run(Uncut(), torch.randn(1, 2, 2, 4, 4), False)
    macs = window_macs(2)
    assert sized(counted) == {name: (macs[name], 1) for name in ("stem", "pixel", "merge", "head")} | {
        name: (macs[name] / 4, 4) for name in ("conv", "lstm.input", "lstm.recurrent")
    }


@pytest.mark.parametrize("order", ["batched", "sequential"])
def test_steps_of_a_block_that_cuts_them(order):
    # T, B and the side of the map that `pixel` gets are equal
    x = torch.randn(4, 4, 2, 4, 4)
    wanted = {f"block.{name}": (macs, 4) for name, macs in window_macs(2).items()}
    for counted, _ in (counted_run(EveryStep(order=order), x, False), counted_shapes(EveryStep(order=order), x, False)):
        assert sized(counted) == wanted


class Pixels(nn.Module):
    """A linear map per pixel, [B, H, W, C], and one per sample of the sequence, [T, B, C]."""

    def __init__(self, cut):
        super().__init__()
        self.parts_of_a_step = cut
        self.pixel, self.sample = nn.Linear(3, 5), nn.Linear(3, 2)

    def forward(self, x):
        return self.sample(x.mean((3, 4))) + self.pixel(x[0].movedim(1, -1)).sum()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 4), (4, 1, 2), (2, 4, 4), (1, 2, 1)], ids=str)
def test_a_linear_map_per_pixel(cut, shape):
    """Also where one step [1, B] or one sample looks like the axes of a map."""
    batch, height, width = shape
    x = torch.rand(1, batch, 3, height, width)
    for counted, _ in (counted_run(Pixels(cut), x, False), counted_shapes(Pixels(cut), x, False)):
        assert sized(counted) == {"sample": (3 * 2, 1), "pixel": (height * width * 3 * 5, 1)}


class UnitOfWindows(nn.Module):
    """A unit that gets the windows beside the batch, or in the place of time."""

    parts_of_a_step = True

    def __init__(self, beside):
        super().__init__()
        self.beside, self.unit = beside, SpikingConv2d(2, 3, norm="none")

    def forward(self, x):
        windows = x.repeat(4, 1, 1, 1, 1)
        s, _ = self.unit(windows.flatten(0, 1)[None] if self.beside else windows)
        return s.mean((2, 3, 4)).view(-1, x.shape[1]).mean(0)[None, :, None]


@pytest.mark.parametrize("beside", [False, True])
def test_units_get_parts_too(beside):
    counted, _ = counted_run(UnitOfWindows(beside), torch.ones(1, 3, 2, 4, 4), False)
    assert sized(counted) == {"unit": (4 * 9 * 2 * 3 * 16, 1)}
    # a 3x3 kernel finds 100 of 144 places inside a map of 4x4
    assert counted["unit"].synops_exact == 4 * 100 * 2 * 3


def test_the_profile_of_a_network_of_windows_shows_both_accountings(capsys):
    torch.manual_seed(0)
    model, x = Windows(), torch.randn(1, 3, 2, 4, 4)
    seen = profile(model, x, repeats=1)
    names = [row.name for row in seen.layers]
    at = names.index("lstm")
    assert names[at : at + 3] == ["lstm", "lstm.input", "lstm.recurrent"]
    whole, *halves = seen.layers[at : at + 3]
    assert (whole.kind, whole.macs, whole.parameters) == ("LSTM", None, 2 * 4 * 4 * (4 + 4 + 2))
    assert {(half.kind, half.parameters) for half in halves} == {("LSTM half", 0)}
    assert sum(row.parameters for row in seen.layers) == sum(p.numel() for p in model.parameters())
    energy, macs = seen.energy, sum(window_macs(2).values())
    assert sum(row.energy_pj or 0 for row in seen.layers) == pytest.approx(energy["snn_pj"])
    rate = next(row.spike_rate for row in seen.layers if row.name == "fire")
    published = {"rate": rate, "adds": rate * macs, "mults": 96, "ann_pj": 5.5 * macs}
    published["snn_pj"] = 0.9 * rate * macs + 4.6 * 96
    published["ratio"] = 5.5 * macs / published["snn_pj"]
    assert energy["published"] == pytest.approx(published)
    assert json.loads(json.dumps(seen.to_dict()))["energy"]["published"] == pytest.approx(published)
    # a toy costs nothing: print it a million times
    shown = seen.to_dict()
    for account in (shown["energy"], shown["energy"]["published"]):
        account |= {key: 1e6 * account[key] for key in ("snn_pj", "ann_pj")}
    show_profile("windows", shown)
    text = capsys.readouterr().out
    for told in (
        rf"energy of one inference, strict +{energy['snn_pj']:.2f} uJ\n",
        rf"its ANN twin, strict +{energy['ann_pj']:.2f} uJ, {energy['ratio']:.1f} times as much\n",
        rf"energy as published \(flatters\) +{published['snn_pj']:.2f} uJ at a rate of {100 * rate:.1f} %\n",
        rf"its ANN twin as published +{published['ann_pj']:.2f} uJ, {published['ratio']:.1f} times as much\n",
    ):
        assert re.search(told, text), told
    assert 0.02 < rate < 0.9
    assert energy["ratio"] < published["ratio"]


def test_what_is_counted_nowhere_is_said():
    told = " ".join(ASSUMPTIONS)
    for text in ("Random draws of encodings", "maps of membranes", "arithmetic of the gates", "5.5 pJ", "flatters"):
        assert text in told
