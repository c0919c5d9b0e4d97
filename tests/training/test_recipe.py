"""Recipes: what they accept, what they say otherwise, and the key=value grammar."""

import re
import tomllib
from pathlib import Path

import pytest
from torch import nn

from spikefit.errors import OptionError, RecipeError
from spikefit.layers import TwoStreams
from spikefit.layers.window_block import NORMS as WINDOW_NORMS
from spikefit.neurons.table import NEURONS, neuron_options
from spikefit.training import build_model, load_recipe
from spikefit.training.options import fixed_parts
from spikefit.training.recipe import NeuronSection

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NEURON_OPTIONS = {"tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "surrogate"}


def base():
    return load_recipe({"model": "vgg6", "data": "digits"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_of_the_project_load_and_write_the_neuron_out(path):
    recipe = load_recipe(path)
    written = tomllib.loads(path.read_text())
    fixed = set(fixed_parts(recipe.model.name))
    assert {"status", "data", "encoding", "model", "neuron", "norm", "strategy", "loss", "train"} - fixed <= set(
        written
    )
    if "neuron" not in fixed:
        known = neuron_options(NEURONS[written["neuron"]["name"]]) | {"name"}
        assert set(written["neuron"]) >= NEURON_OPTIONS & known
    assert load_recipe(recipe.to_dict()) == recipe


def test_there_are_recipes():
    assert {"demo", "cifar10_vgg9", "fashion_mnist_vgg6", "uci_har_mlp", "nmnist_vgg6"} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize(
    ("change", "where", "value"),
    [
        ({"train.lr": "0.1"}, ("train", "lr"), 0.1),
        ({"lr": "1e-3"}, ("train", "lr"), 1e-3),
        ({"timesteps": "4"}, ("encoding", "timesteps"), 4),
        ({"batch": "7"}, ("data", "batch_size"), 7),
        ({"image": "3x32x32"}, ("model", "input_shape"), [3, 32, 32]),
        ({"strategy": "checkpoint:2"}, ("strategy", "name"), "checkpoint:2"),
        ({"norm": "step_bn"}, ("norm", "name"), "step_bn"),
        ({"neuron": "plif"}, ("neuron", "name"), "plif"),
        ({"v_reset": "0"}, ("neuron", "v_reset"), 0.0),
        ({"v_threshold": "1."}, ("neuron", "v_threshold"), 1.0),
        ({"surrogate": "rect(1, closed=True)"}, ("neuron", "surrogate"), "rect(1, closed=True)"),
        ({"decay_input": "true"}, ("neuron", "decay_input"), True),
        ({"loss": "tet", "mse_weight": "0.1"}, ("loss", "mse_weight"), 0.1),
        ({"encoding": "rate"}, ("encoding", "timesteps"), 8),
        ({"model": "mlp", "hidden": "32,64"}, ("model", "hidden"), [32, 64]),
        ({"hidden": "32", "model": "mlp"}, ("model", "hidden"), [32]),
        ({"model": "resnet19", "widths": "narrow"}, ("model", "widths"), "narrow"),
        ({"augment": "crop,flip"}, ("data", "augment"), ["crop", "flip"]),
        ({"limit": "100"}, ("data", "limit"), 100),
        ({"precision": "bf16-mixed"}, ("train", "precision"), "bf16-mixed"),
        ({"epochs": 3}, ("train", "epochs"), 3),
    ],
)
def test_override(change, where, value):
    changed = base().override(change)
    assert changed.to_dict()[where[0]][where[1]] == value
    assert base().to_dict() != changed.to_dict() or base().to_dict()[where[0]][where[1]] == value


def test_override_of_top_level_keys():
    recipe = base().override({"seed": "4", "backend": "reference"})
    assert (recipe.seed, recipe.backend) == (4, "reference")


def test_none_as_a_word_and_in_a_file():
    words = {"model": "revsresnet21", "stream_grid": "none", "blocks": "none", "image": "3x16x16"}
    recipe = base().override(words)
    assert recipe.model.options()["stream_grid"] is None
    assert recipe.model.options()["blocks"] is None
    assert load_recipe(recipe.to_dict()) == recipe
    model = build_model(load_recipe({"model": recipe.model}))
    assert {m.stream_grid for m in model.modules() if isinstance(m, TwoStreams)} == {None}
    with pytest.raises(RecipeError, match=r"model vgg6: width: expected a valid number, got 'none'"):
        base().override({"width": "none"})


def test_another_neuron_has_its_own_defaults_and_what_was_set_before():
    changed = load_recipe({"model": {"name": "vgg6"}}).override({"neuron": "two_group"})
    assert changed.neuron == NeuronSection(name="two_group")
    assert (changed.neuron.v_reset, changed.neuron.detach_reset) == (0.0, False)
    back = changed.override({"neuron": "lif"})
    assert back.neuron == NeuronSection(name="lif")
    written = {"name": "lif", "v_threshold": 0.5, "surrogate": "rect(1)", "tau": 3.0}
    kept = load_recipe({"model": {"name": "vgg6"}, "neuron": written})
    # the key of a word holds whatever its place among the words
    kept = kept.override({"v_reset": "soft", "neuron": "two_group"}).neuron
    assert kept == NeuronSection(name="two_group", v_threshold=0.5, surrogate="rect(1)", v_reset="soft")
    # the same name changes nothing
    again = load_recipe({"model": {"name": "vgg6"}, "neuron": kept.model_dump(exclude_none=True)})
    assert again.override({"neuron": "two_group"}).neuron == kept


def test_another_name_drops_what_only_the_thing_before_took():
    recipe = load_recipe(
        {"model": {"name": "vgg6", "width": 0.5, "pool": "avg"}, "neuron": {"name": "lif", "tau": 3.0}}
    )
    changed = recipe.override({"model": "mlp", "neuron": "if"}).to_dict()
    assert changed["model"] == {"name": "mlp"}
    assert not {"tau", "decay_input"} & set(changed["neuron"])
    same = recipe.override({"model": "vgg9", "neuron": "plif"}).to_dict()
    assert same["model"] == {"name": "vgg9", "width": 0.5, "pool": "avg"}
    assert same["neuron"]["tau"] == 3.0
    shaped = load_recipe(
        {"model": {"name": "mlp", "input_shape": [3, 4]}, "data": {"name": "cifar10", "mean": [0.5] * 3}}
    )
    assert shaped.override({"data": "digits"}).to_dict()["model"] == {"name": "mlp"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lrr": "3"}, r"unknown key 'lrr'\. Did you mean lr"),
        ({"train.lrr": "3"}, r"unknown key 'train\.lrr'\. Did you mean train\.lr"),
        ({"foo.bar": "1"}, r"unknown key 'foo\.bar'"),
        ({"lr": "abc"}, r"train\.lr: expected a valid number, got 'abc' \(str\)"),
        ({"epochs": "1.5"}, r"train\.epochs: expected a valid integer, got 1\.5 \(float\)"),
        ({"batch": "0"}, r"data\.batch_size: expected greater than or equal to 1, got 0"),
        ({"width": "a"}, r"model vgg6: width: expected a valid number, got 'a' \(str\)"),
        ({"image": "3"}, r"input_shape: expected tuple\[int, int, int\], got \[3\]"),
        ({"model": "vgg7"}, r"got 'vgg7'\. Did you mean .*vgg6"),
        ({"model": "mlp", "width": "1"}, r"unknown key 'width'"),
        ({"model.widht": "1"}, r"unknown option 'widht'.*Did you mean width"),
        ({"timesteps": "0"}, r"timesteps must be a whole number of at least 1, got 0"),
        ({"strategy": "chekpoint"}, r"Did you mean checkpoint"),
        ({"tau": "0.5"}, r"tau must be at least 1 step"),
        ({"v_reset": "sft"}, r"neuron\.v_reset: expected 'soft' or a valid number, got 'sft'"),
        ({"data": "digit"}, r"Did you mean digits"),
        ({"data.limt": "3"}, r"unknown option 'limt'.*Did you mean limit"),
        ({"limit": "many"}, r"limit: expected .*int.*, got 'many'"),
        ({"loss": "tets"}, r"Did you mean tet"),
        ({"warmup_epochs": "10"}, r"warmup_epochs: expected fewer than train\.epochs = 10, got 10"),
        ({"lr": "0.1", "train.lr": "0.2"}, r"'lr' and 'train\.lr' mean the same; keep one"),
        ({"batch": "2", "batch_size": "3"}, r"'batch' and 'batch_size' mean the same"),
        ({"model": "vgg6", "model.name": "vgg9"}, r"'model' and 'model\.name' mean the same"),
        ({"width": "nan"}, r"model vgg6: width: expected a number, got nan"),
        ({"momentum": "nan"}, r"train\.momentum: expected .*got nan"),
        ({"tau": "nan"}, r"tau must be at least 1 step"),
        ({"v_reset": "nan"}, r"v_reset must be a finite number or None, got nan"),
        ({"loss": "tet", "mse_target": "inf"}, r"mse_target must be a finite number"),
        ({"norm": "bm"}, r"norm\.name: expected 'bn', .* got 'bm'"),
    ],
)
def test_wrong_changes_are_told_in_one_sentence(change, told):
    with pytest.raises(RecipeError, match=told) as error:
        base().override(change)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.toml: expected a TOML file, found none"):
        load_recipe(tmp_path / "missing.toml")
    file = tmp_path / "broken.toml"
    file.write_text('status = "untested"\nmodel = { name = vgg6 }\n')
    with pytest.raises(RecipeError, match=r"broken\.toml: expected valid TOML.*line 2"):
        load_recipe(file)
    file.write_text('model = { name = "vgg6" }\ntrian = { lr = 0.1 }\n')
    with pytest.raises(RecipeError, match=rf"{re.escape(str(file))}: unknown key 'trian'\. Did you mean train"):
        load_recipe(file)
    with pytest.raises(RecipeError, match="key 'model' is missing"):
        load_recipe({})
    with pytest.raises(RecipeError, match=r"model\.num_classes: expected a valid integer, got '3'"):
        load_recipe({"model": {"name": "vgg6", "num_classes": "3"}})


def test_recipes_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        base().seed = 3


def test_encoding_none_is_the_time_axis_of_the_data():
    recipe = load_recipe({"model": {"name": "har_mlp"}, "encoding": {"name": "none"}})
    assert recipe.encoding.name == "sequence"


def test_a_model_of_one_step_sets_the_steps_and_refuses_others():
    assert load_recipe({"model": {"name": "dmsn_cnn12"}}).encoding.timesteps == 1
    assert load_recipe({"model": "dmsn_lstm12_ann"}).encoding.timesteps == 1
    with pytest.raises(RecipeError, match=r"model dmsn_cnn12: it works in 1 time step only.*write timesteps=1"):
        load_recipe({"model": "dmsn_cnn12"}).override({"timesteps": "4"})
    assert load_recipe({"model": "vgg6"}).encoding.timesteps == 8


def test_every_norm_of_a_block_of_windows_can_be_written_in_a_recipe():
    small = {"name": "dmsn_cnn12", "widths": [4, 8], "depths": [1, 1], "input_shape": [3, 16, 16], "num_classes": 4}
    for norm in WINDOW_NORMS:
        block = build_model(load_recipe({"model": small, "norm": norm})).blocks[1]
        kind = WINDOW_NORMS[norm] or nn.Identity
        assert isinstance(block.cell.norms[0], kind)
    with pytest.raises(OptionError, match=r"norm: expected one of .* got 'rms'"):
        build_model(load_recipe({"model": {"name": "mlp", "input_shape": [4], "num_classes": 2}, "norm": "rms"}))
