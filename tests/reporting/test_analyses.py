"""Studies of trained weights: transfer between variants, pruning, firing neurons and spike rates."""

import copy
import json

import pytest
import torch
from torch import nn

from spikefit.data import batches
from spikefit.errors import CheckpointError, OptionError, RecipeError
from spikefit.layers import BatchNorm
from spikefit.models import create_model
from spikefit.reporting import study
from spikefit.reporting.analyses import firing, prune_weights, reestimate_statistics
from spikefit.training import build_data, build_loss, build_model, evaluate, load_recipe
from spikefit.training.build import make_fabric
from spikefit.training.evaluation import measure

RECIPE = """
[recipe]
data = { name = "digits", batch_size = 256 }
encoding = { name = "repeat", timesteps = 2 }
model = { name = "vgg6", width = 0.0625 }
norm = { name = "step_bn" }
train = { epochs = 1, lr = 0.02 }
"""
STUDY = f"""
seeds = [0, 1]
transfer = true
pruning = [0.0, 0.9]
{RECIPE}
[[variants]]
name = "none"
[[variants]]
name = "channel"
set = {{ "model.share" = "channel", "model.groups" = 2 }}
"""


def written(folder, text):
    path = folder / "shares.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyses")
    path, out = written(folder, STUDY), folder / "out"
    rows = study(path, out=out)
    return path, out, rows, *(json.loads((out / f"{name}.json").read_text()) for name in ("transfer", "pruning"))


@pytest.fixture
def setting():
    """(recipe, data, fabric) of a small network with norms of the whole sequence."""
    recipe = load_recipe(
        {
            "data": {"name": "digits", "batch_size": 500},
            "encoding": {"name": "repeat", "timesteps": 2},
            "model": {"name": "mlp", "hidden": [16]},
        }
    )
    return recipe, build_data(recipe), make_fabric("study", recipe)


def test_transfer_has_every_pair_and_the_trained_accuracy_on_its_diagonal(finished):
    _, out, rows, moved, _ = finished
    names = ["none", "channel"]
    assert [(row["trained"], row["evaluated"]) for row in moved] == [(a, b) for a in names for b in names]
    by_variant = {row["variant"]: row for row in rows}
    for row in moved:
        same = row["accuracy_values"] == by_variant[row["trained"]]["accuracy_values"]
        assert same == (row["trained"] == row["evaluated"]), row
        assert row["reestimated_values"] != row["accuracy_values"]
    text, html = (out / "table.txt").read_text(), (out / "report.html").read_text(encoding="utf-8")
    assert f"{100 * moved[1]['accuracy']:.2f} ± {100 * moved[1]['accuracy_spread']:.2f}" in text
    assert "running statistics re-estimated" in text
    assert '"heatmap"' in html


def test_pruning_starts_at_the_trained_accuracy_and_counts_firing_neurons(finished):
    _, out, rows, _, pruned = finished
    assert [(row["variant"], row["share"]) for row in pruned] == [
        (v, share) for v in ("none", "channel") for share in (0.0, 0.9)
    ]
    for row, trained in zip(pruned[::2], rows, strict=True):
        assert row["accuracy_values"] == trained["accuracy_values"]
        assert row["weights_left"] == row["weights"]
        assert 0 < row["firing"] < 1
    none, channel = pruned[::2]
    assert none["membranes_used"] == none["firing"], "every neuron has its own"
    assert channel["membranes_used"] > channel["firing"], "two neurons use one"
    assert none["lif_forward_bytes"] == 2 * channel["lif_forward_bytes"]
    assert pruned[1]["weights_left"] == pytest.approx(0.1 * pruned[1]["weights"], abs=1)
    assert pruned[1]["accuracy"] < none["accuracy"]
    assert set(none["firing_per_layer"]) == set(rows[0]["spike_rates"])
    assert none["firing_samples"] == 256
    assert "first 256 test samples" in (out / "table.txt").read_text()


def test_spike_rates_stand_in_the_rows_and_on_the_page(finished):
    _, out, rows, _, _ = finished
    layer, rate = next(iter(rows[0]["spike_rates"].items()))
    runs = [json.loads((out / "cells" / f"{key}.json").read_text())["result"] for key in rows[0]["cells"]]
    assert rate == pytest.approx(sum(run["spike_rates"][layer] for run in runs) / 2)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f">{layer}</td>" in html
    assert f">{100 * rate:.2f}</td>" in html


def test_weights_are_kept_as_a_checkpoint_that_evaluates(finished):
    _, out, rows, _, _ = finished
    key = rows[1]["cells"][0]
    assert evaluate(out / "weights" / key)["accuracy"] == rows[1]["accuracy_values"][0]
    assert sorted(p.name for p in (out / "weights").iterdir()) == sorted(k for row in rows for k in row["cells"])


def test_nothing_is_done_twice_and_what_is_missing_is_done(finished):
    path, out, rows, moved, _ = finished

    def times():
        return {p: p.stat().st_mtime_ns for name in ("cells", "transfer", "pruning") for p in (out / name).iterdir()}

    before = times()
    assert len(before) == 4 + 8 + 8
    assert study(path, out=out) == rows
    assert times() == before
    lost = out / "transfer" / f"{rows[0]['cells'][0]}-{rows[1]['cells'][0]}.json"
    lost.unlink()
    study(path, out=out)
    assert {p for p, t in times().items() if before[p] != t} == {lost}
    assert json.loads((out / "transfer.json").read_text()) == moved


def test_runs_without_weights_train_again_where_weights_are_needed(tmp_path):
    plain = STUDY.replace("transfer = true\npruning = [0.0, 0.9]", "").replace("[0, 1]", "[0]")
    path, out = written(tmp_path, plain), tmp_path / "out"
    rows = study(path, out=out)
    assert not (out / "weights").exists()
    path.write_text("transfer = true\n" + plain)
    ran = []
    again = study(path, out=out, on_progress=lambda where, event: event is None and ran.append(where["reused"]))
    assert ran == [False, False]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


def test_damaged_weights_are_named(finished, tmp_path):
    path, out, rows, _, _ = finished
    key = rows[0]["cells"][0]
    (file,) = (out / "weights" / key).glob("*/model.safetensors")
    sound, lost = file.read_bytes(), out / "transfer" / f"{key}-{key}.json"
    file.write_bytes(sound[:-1] + b"?")
    lost.unlink()
    try:
        with pytest.raises(CheckpointError, match=f"{key}.*damaged"):
            study(path, out=out)
    finally:
        file.write_bytes(sound)


def test_reestimated_statistics_are_the_mean_over_one_pass(setting):
    recipe, data, fabric = setting
    model = build_model(recipe, data.train)
    weights = copy.deepcopy({k: v for k, v in model.named_parameters()})
    (norm,) = (m for m in model.modules() if isinstance(m, BatchNorm))
    (linear,) = (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 16)
    assert reestimate_statistics(model, data.train, fabric, recipe)
    means, variances = [], []
    for _, x, _ in batches(data.train, 500, seed=recipe.seed, shuffle=True):
        z = linear(x.flatten(1)).detach()
        means.append(z.mean(0))
        variances.append(z.var(0, correction=0) * 2 * len(z) / (2 * len(z) - 1))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert (norm.momentum, norm.training) == (0.1, False)
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())


def test_a_model_without_norms_has_no_statistics(setting):
    recipe, data, fabric = setting
    recipe = recipe.override({"norm.name": "none"})
    assert not reestimate_statistics(build_model(recipe, data.train), data.train, fabric, recipe)


def test_pruning_takes_the_smallest_of_all_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, -4.0], [3.0, -0.2]]))
        model[1].weight.copy_(torch.tensor([[5.0, 0.3]]))
        model[1].bias.fill_(0.01)
    assert prune_weights(model, 0.0) == (6, 6)
    assert prune_weights(model, 0.5) == (6, 3)
    assert model[0].weight.tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert model[1].weight.tolist() == [[5.0, 0.0]]
    assert model[1].bias.item() == pytest.approx(0.01), "biases stay"


@pytest.mark.parametrize("share", ["none", "layer"])
def test_firing_counts_neurons_of_known_currents(share):
    """Weight 0, so the bias of the norm is the current: half of the first layer fires, in step 2 only."""
    recipe = load_recipe({"data": {"name": "digits"}, "model": "har_mlp"})
    options = {"input_shape": (64,), "num_classes": 10, "hidden": 4, "layers": 3, "norm": "step_bn"}
    model = create_model("har_mlp", **options, share=share).eval()
    with torch.no_grad():
        for unit in (model.blocks[0], model.blocks[1], model.blocks[2]):
            unit.synapse.weight.zero_()
            unit.norm.bias.zero_()
        # u = 0.7, then 0.35 + 0.7 >= 1
        model.blocks[0].norm.bias[:2] = 0.7
        model.blocks[1].norm.bias[0] = 2.0

    def encoding(images, generator):
        return images.flatten(1).expand(2, -1, -1)

    fabric, data = make_fabric("study", recipe), build_data(recipe)
    found = firing(model, data.test, fabric, encoding, 100, 0, samples=130)
    assert found["firing_per_layer"] == {"blocks.0": 0.5, "blocks.1": 0.25, "blocks.2": 0.0}
    assert found["firing"] == 0.25
    assert found["firing_samples"] == 130
    # layers 1 and 2 use one membrane, whose first number is used
    assert found["membranes_used"] == (0.25 if share == "none" else 3 / 8)
    assert found["lif_forward_bytes"] == 4 * (12 if share == "none" else 8)
    # half of the first layer in one step of two; a stage that runs step by step counts steps, not calls
    rates = measure(model, data.test, fabric, encoding, build_loss(recipe), 100, 0)["spike_rates"]
    assert rates == {"blocks.0": 0.25, "blocks.1": 0.25, "blocks.2": 0.0}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (
            ('"model.share" = "channel", "model.groups" = 2', '"model.width" = 0.125'),
            RecipeError,
            "same weights.*digits",
        ),
        (('"model.share" = "channel", "model.groups" = 2', '"neuron.name" = "plif"'), RecipeError, "missing in 'none'"),
        (("[0.0, 0.9]", "[0.9, 0.9]"), RecipeError, "list of different shares"),
        (("[0.0, 0.9]", "[1.0]"), RecipeError, "list of different shares"),
        (("[0.0, 0.9]", "0.9"), RecipeError, "list of different shares"),
        (("pruning", "prunning"), RecipeError, r"Did you mean pruning\?"),
        (("transfer = true", "transfer = 1"), RecipeError, "transfer = true or false"),
        (("transfer = true", "train = false"), RecipeError, "pruning has no effect"),
        (('"step_bn"', '"ws"'), OptionError, "none / digits: pruning.*norm 'ws'"),
        ((STUDY[STUDY.index("[[variants]]") :], ""), RecipeError, "there are 0 .*give two or more"),
    ],
)
def test_mistakes_are_told_before_anything_trains(tmp_path, change, error, told):
    assert change[0] in STUDY
    with pytest.raises(error, match=told):
        study(written(tmp_path, STUDY.replace(*change)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
