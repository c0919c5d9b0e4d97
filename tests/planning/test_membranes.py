"""Bytes of membranes: the analytic tables digit for digit, and what is kept equal to what is predicted."""

import json

import pytest
import torch

from spikefit.cli import main
from spikefit.errors import StrategyError
from spikefit.models import create_model, use_strategy
from spikefit.models.network import plain_bptt
from spikefit.neurons import LIF
from spikefit.planning import profile
from spikefit.planning.held import watch_saved
from spikefit.planning.membranes import membrane_bytes, watched_currents
from spikefit.planning.target import no_memory

NETS = {
    "wide": ("resnet19", {"widths": "wide"}),
    "narrow": ("resnet19", {"widths": "narrow"}),
    "vgg": ("vgg16", {}),
    "vgg, merged": ("vgg16", {"merge_first": True}),
}
# per stage: layers m, channels, and the part of the side of the input
STAGES = {
    "wide": [(1, 128, 1), (6, 256, 2), (6, 512, 4), (4, 512, 8)],
    "narrow": [(1, 128, 1), (6, 128, 2), (6, 256, 4), (4, 512, 8)],
    "vgg": [(1, 128, 1), (1, 128, 1), (2, 128, 2), (3, 256, 4), (3, 512, 8), (3, 512, 16)],
    "vgg, merged": [(2, 128, 1), (2, 128, 2), (3, 256, 4), (3, 512, 8), (3, 512, 16)],
}
SHARES = {
    "none": ("none", 1),
    "layer": ("layer", 1),
    "channel 2": ("channel", 2),
    "channel 4": ("channel", 4),
    "layer_channel 2": ("layer_channel", 2),
}
# net, side, neurons, MB of all membranes in the order of `SHARES`
FORWARD = [
    ("wide", 32, 753_664, "3.015 0.950 1.507 0.754 0.475"),
    ("wide", 64, 3_014_656, "12.059 3.801 6.029 3.015 1.901"),
    ("wide", 224, 36_929_536, "147.718 46.563 73.859 36.930 23.282"),
    ("narrow", 32, 458_752, "1.835 0.754 0.918 0.459 0.377"),
    ("narrow", 224, 22_478_848, "89.915 36.930 44.958 22.479 18.465"),
    ("vgg", 32, 407_552, "1.630 1.286 0.815 0.408 0.643"),
    ("vgg", 224, 19_970_048, "79.880 63.021 39.940 19.970 31.511"),
]
# unshared / shared, any side
RATIOS = {
    "wide": "3.172 2.000 4.000 6.345",
    "narrow": "2.435 2.000 4.000 4.870",
    "vgg": "1.268 2.000 4.000 2.535",
    "vgg, merged": "2.140 2.000 4.000 4.280",
}
# T = 5, batch 1, side 32: strategy, tau, MB of what is kept beside the bits of spikes
KEPT = [
    ("wide", "bptt", 4 / 3, "15.073 15.073 15.073 15.073 15.073"),
    ("wide", "inverse", 4 / 3, "3.015 2.621 3.015 3.015 2.605"),
    ("wide", "inverse", 2.0, "3.015 1.769 1.507 1.507 1.507"),
    ("wide", "integer", 4 / 3, "3.957 1.892 2.449 1.696 1.417"),
    ("vgg", "inverse", 4 / 3, "1.630 1.630 1.630 1.630 1.577"),
]


def megabytes(count):
    return f"{count / 1e6:.3f}"


def buffers(net, share, side):
    """(elements, layers, groups) of every membrane of one sample, by hand."""
    by_layer = share.startswith("layer")
    groups = int(share.rpartition(" ")[2]) if "channel" in share else 1
    found = []
    for layers, channels, part in STAGES[net]:
        size = channels * (side // part) ** 2 // groups
        found += [(size, layers, groups)] if by_layer else [(size, 1, groups)] * layers
    return found


def kept_by_hand(net, share, strategy, every, digits, T=5, side=32):
    """Bytes of membranes that are kept, without the bits of spikes."""
    total = 0
    for size, layers, groups in buffers(net, share, side):
        calls = layers * groups * T
        total += {
            "bptt": 4 * calls * size,
            "replay": 0,
            "inverse": 4 * size * -(-calls // every),
            "integer": 4 * size + calls * size * digits // 8,
        }[strategy]
    return total


def make(net, share, tau=4 / 3):
    name, options = NETS[net]
    share, groups = SHARES[share]
    options = {k: v for k, v in options.items() if k != "merge_first" or share.startswith("layer")}
    return create_model(name, share=share, groups=groups, norm="step_bn", neuron={"name": "lif", "tau": tau}, **options)


def shapes(model, x):
    """What the neurons of `model` get."""
    currents = {}
    with torch.no_grad(), plain_bptt(model), watched_currents(model, currents):
        model(x)
    return currents


def counted(model, x):
    return membrane_bytes(model, shapes(model, x), torch.float32)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("net", "side", "neurons", "wanted"), FORWARD)
def test_membranes_of_forward(net, side, neurons, wanted, share):
    wanted = wanted.split()[list(SHARES).index(share)]
    by_hand = 4 * sum(size for size, _, _ in buffers(net, share, side))
    assert sum(size * layers for size, layers, _ in buffers(net, "layer", side)) == neurons
    assert megabytes(by_hand) == wanted
    with torch.device("meta"):
        state = make(net, share).init_state(1, (3, side, side))
    assert sum(4 * v.numel() for v in leaves(state)) == by_hand


def leaves(state):
    if isinstance(state, tuple):
        return [leaf for entry in state for leaf in leaves(entry)]
    return [] if state is None else [state]


@pytest.mark.parametrize("share", list(SHARES)[1:])
@pytest.mark.parametrize("net", NETS)
def test_ratios_of_forward(net, share):
    for side in (32, 224):
        with torch.device("meta"):
            model = make(net, share)
        held = sum(v.numel() for v in leaves(model.init_state(1, (3, side, side), device="meta")))
        unshared = sum(size for size, _, _ in buffers(net, "none", side))
        assert f"{unshared / held:.3f}" == RATIOS[net].split()[list(SHARES).index(share) - 1]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("net", ["wide", "vgg"])
def test_membranes_kept_for_backward(net, share):
    """Side 32, T = 5 and batch 1, for all strategies."""
    T, side = 5, 32
    bits = sum(size * layers for size, layers, _ in buffers(net, "layer", side)) * T // 8
    assert bits == {"wide": 471_040, "vgg": 254_720}[net]
    with no_memory():
        model = make(net, share)
        currents = shapes(model, torch.empty(1, 1, 3, side, side).expand(T, -1, -1, -1, -1))
    for tau, every, digits in ((4 / 3, 6, 2), (2.0, 11, 1), (4.0, 22, 1)):
        for module in model.modules():
            if isinstance(module, LIF):
                module.tau = tau
        found = membrane_bytes(model, currents, torch.float32)
        assert found.forward == 4 * sum(size for size, _, _ in buffers(net, share, side))
        wanted = {strategy: kept_by_hand(net, share, strategy, every, digits) for strategy in found.kept}
        assert list(wanted) == ["bptt", "replay", "inverse", "integer"]
        assert found.kept == {key: count + (0 if key == "bptt" else bits) for key, count in wanted.items()}
        for table, strategy, leak_of, cells in KEPT:
            if (table, leak_of) == (net, tau):
                assert megabytes(wanted[strategy]) == cells.split()[list(SHARES).index(share)], (strategy, tau)


def test_bytes_of_another_side():
    """At side 224 everything is 49 times as much."""
    for net, share in (("wide", "channel 2"), ("vgg", "channel 4")):
        rows = []
        for side in (32, 224):
            with no_memory():
                rows.append(counted(make(net, share), torch.empty(1, 1, 3, side, side).expand(5, -1, -1, -1, -1)))
        small, large = rows
        assert large.forward == 49 * small.forward
        assert large.kept == {key: 49 * count for key, count in small.kept.items()}
        for strategy in ("bptt", "inverse"):
            assert large.peak[strategy] == 49 * small.peak[strategy]
        # more pixels, fewer steps together
        assert large.kept["integer"] < large.peak["integer"] < 49 * small.peak["integer"]
        assert large.kept["replay"] < large.peak["replay"] < 49 * small.peak["replay"]
        cell = next(row[3] for row in FORWARD if row[:2] == (net, 224)).split()[list(SHARES).index(share)]
        assert megabytes(large.forward) == cell


def test_what_no_strategy_can_rebuild_has_no_bytes():
    x = torch.zeros(3, 2, 9)
    hard = counted(create_model("har_mlp", hidden=16, neuron={"name": "lif", "v_reset": 0.0}), x)
    assert (hard.kept["inverse"], hard.kept["integer"], hard.peak["inverse"]) == (None, None, None)
    # four layers of 16 neurons, three steps, two samples
    assert (hard.kept["bptt"], hard.kept["replay"]) == (4 * 16 * 3 * 2 * 4, 4 * 2 * 3 * 2)
    learned = counted(create_model("har_mlp", hidden=16, neuron="plif"), x)
    assert (learned.kept["inverse"], learned.kept["integer"]) == (None, None)
    slow = counted(create_model("har_mlp", hidden=16, norm="step_bn", neuron={"name": "lif", "tau": 10.0}), x)
    assert slow.kept["inverse"] == slow.kept["replay"] + 4 * 16 * 2 * 4
    assert slow.kept["integer"] is None


ON_GRID = {"name": "lif", "frac_bits": 16}


@pytest.mark.parametrize(
    ("options", "inverse", "integer"),
    [
        ({"norm": "step_bn"}, True, True),
        ({"norm": "bn"}, False, False),
        ({"norm": "tdbn", "share": "channel", "groups": 2}, False, False),
        ({"norm": "ws", "neuron": ON_GRID}, False, True),
        ({"norm": "ws", "neuron": {"name": "lif", "tau": 1.0}}, False, False),
        ({"norm": "ws", "neuron": {"name": "lif", "reset": False}}, False, False),
        ({"norm": "ws", "neuron": "plif"}, False, False),
    ],
)
def test_bytes_are_those_of_strategies_that_are_not_refused(options, inverse, integer):
    model, x = create_model("har_mlp", hidden=16, **options), torch.zeros(3, 2, 9)
    found = counted(model, x)
    for strategy, applies in (("replay", True), ("inverse", inverse), ("integer", integer)):
        assert (found.kept[strategy] is not None) is applies, strategy
        assert (found.peak[strategy] is not None) is applies, strategy
        if strategy == "integer" and applies:
            options = options | {"neuron": ON_GRID}
        try:
            create_model("har_mlp", hidden=16, **options, strategy=strategy)
            assert applies, strategy
        except StrategyError:
            assert not applies, strategy


def test_layers_of_one_membrane_that_differ_have_no_bytes_of_running_backwards():
    model = create_model("har_mlp", hidden=16, share="layer", neuron=ON_GRID)
    x = torch.zeros(3, 2, 9)
    assert counted(model, x).kept["integer"] is not None
    model.blocks[2].neuron.frac_bits = 8
    found = counted(model, x)
    assert (found.kept["integer"], found.peak["integer"]) == (None, None)
    assert found.kept["replay"] is not None


@pytest.mark.parametrize("name", ["revsresnet21", "revsformer_2_384"])
def test_neurons_that_stand_alone_count_too(name):
    options = {"width": 1 / 16} if name == "revsresnet21" else {"channels": 16, "heads": 2}
    model = create_model(name, input_shape=(3, 16, 16), **options)
    found = counted(model, torch.zeros(3, 2, 3, 16, 16))
    membranes = sum(4 * v.numel() for v in leaves(model.init_state(2)))
    assert found.forward == membranes
    # a neuron of two streams is visited once a step
    assert found.kept["bptt"] == 3 * membranes
    rebuilt = [found.kept[strategy] for strategy in ("replay", "inverse", "integer")]
    # the tokenizer of the transformer is made of units
    assert all(count is None for count in rebuilt) if name == "revsresnet21" else rebuilt[0] < found.kept["bptt"]


SMALL = {
    "vgg16": {"width": 1 / 16, "input_shape": (3, 16, 16)},
    "resnet19": {"width": 1 / 16, "input_shape": (3, 8, 8)},
    "har_mlp": {"hidden": 12},
}


@pytest.mark.parametrize("strategy", ["replay", "inverse", "inverse:2", "integer"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SMALL)
def test_bytes_kept_equal_those_that_autograd_holds(name, share, strategy):
    """Of a real step; widths of which groups fill no byte included."""
    kind, groups = SHARES[share]
    for tau in (2.0, 4 / 3, 8 / 7, *([16.0] if strategy in ("replay", "integer") else [])):
        neuron = {"name": "lif", "tau": tau, **({"frac_bits": 16} if strategy == "integer" else {})}
        # other numbers may leave the range in which the inverse is safe
        torch.manual_seed(0)
        model = create_model(name, share=kind, groups=groups, norm="step_bn", neuron=neuron, **SMALL[name])
        use_strategy(model, strategy)
        x = torch.randn(5, 2, *model.input_shape)
        with watch_saved(model) as saved:
            logits = model(x)
        held = saved.categories()
        del logits
        kept = held["packed spikes"] + held.get("membranes", 0)
        assert (held.get("membranes", 0) == 0) is (strategy == "replay")
        assert counted(model, x).kept[strategy.partition(":")[0]] == kept, tau


def test_a_profile_predicts_them():
    for strategy in ("replay", "inverse", "integer"):
        neuron = {"name": "lif", "tau": 4 / 3, **({"frac_bits": 16} if strategy == "integer" else {})}
        options = {"share": "layer_channel", "groups": 2, "neuron": neuron, "hidden": 12, "layers": 3}
        seen = profile("har_mlp", **options, timesteps=3, batch=2, strategy=strategy, predict_only=True)
        kept = seen.categories["kept: packed spikes"] + seen.categories.get("kept: membranes", 0)
        assert seen.lif_backward_kept_bytes[strategy] == kept
        # what is rebuilt comes on top
        assert seen.lif_backward_peak_bytes[strategy] > kept


def test_the_command_line_shows_them(capsys):
    words = [
        "share=layer",
        "groups=1",
        "timesteps=5",
        "batch=1",
        "image=3x32x32",
        "preset=efficientlif",
        "strategy=bptt",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "resnet19", *words, "--predict-only", "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert megabytes(seen["lif_forward_bytes"]) == "0.950"
    bits = 753_664 * 5 // 8
    kept = seen["lif_backward_kept_bytes"]
    assert {name: megabytes(count - (0 if name == "bptt" else bits)) for name, count in kept.items()} == {
        "bptt": "15.073",
        "replay": "0.000",
        "inverse": "2.621",
        "integer": "1.892",
    }
    assert set(seen["lif_backward_peak_bytes"]) == set(kept)
    settings = {"strategy": "bptt", "share": "layer", "groups": [1], "leak": [0.25], "inverse_anchor_every": [6]}
    assert settings | {"integer_assumes_grid": True} == {
        k: seen["settings"][k] for k in (*settings, "integer_assumes_grid")
    }


def settings_of(**options):
    options = {"hidden": 12, "norm": "step_bn", "timesteps": 3, "batch": 2} | options
    return profile("har_mlp", **options, predict_only=True).settings


def test_settings_say_what_the_bytes_hold_for(capsys):
    chosen = settings_of(share="channel", groups=2, strategy="inverse:2")
    assert (chosen["share"], chosen["groups"], chosen["leak"]) == ("channel", [2], [0.5])
    assert (chosen["inverse_anchor_every"], chosen["integer_assumes_grid"]) == ([2], True)
    on_grid = settings_of(neuron=ON_GRID)
    assert (on_grid["inverse_anchor_every"], on_grid["integer_assumes_grid"]) == ([], False)
    learned = settings_of(neuron="plif")
    assert (learned["leak"], learned["inverse_anchor_every"], learned["integer_assumes_grid"]) == (
        ["learned"],
        [],
        False,
    )
    with pytest.raises(SystemExit):
        main(["profile", "har_mlp", "share=layer", "timesteps=3", "batch=2", "neuron.tau=2", "--predict-only"])
    told = capsys.readouterr().out
    assert "with what is rebuilt (inverse:11)" in told
    assert "with what is rebuilt (if the neurons had frac_bits)" in told
