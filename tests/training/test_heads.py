"""Training of networks with auxiliary heads, recipes that do not fit them, and models without a choice of neuron."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import headed
import spikefit
from spikefit.cli.lists import listing
from spikefit.cli.targets import profile_target, verify_target
from spikefit.data import batches
from spikefit.errors import OptionError, RecipeError, TrainingError
from spikefit.models import MODELS
from spikefit.models.table import ModelKind
from spikefit.reporting.measure import FirstBatch, gradient_error, measure_memory, settings_of
from spikefit.training import build_loss, build_model, build_step, evaluate, load_checkpoint, load_recipe, train
from spikefit.training.options import fixed_parts
from spikefit.training.recipe import NeuronSection

WEIGHTS = (0.25, 0.5, 0.75, 2.0)
TESTS = Path(__file__).parents[1]

SCRIPT = """
import json, sys
from spikefit.training import train
if __name__ == "__main__":
    train(json.loads(sys.argv[1]), out=sys.argv[2])
"""


@pytest.fixture
def heads(small):
    """Makes the recipe of a tiny run of a network with three auxiliary heads."""
    base = {**small().to_dict(), "model": {"name": "headed:make"}, "loss": {"name": "ce_heads"}}
    base["encoding"] = {"name": "repeat", "timesteps": 4}
    return lambda **changes: load_recipe(base).override({k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def fixed(monkeypatch):
    """A model of the zoo whose neurons and norms have one form."""
    monkeypatch.setitem(MODELS, "fixed", ModelKind(headed.fixed_form, "for these tests"))
    return "fixed"


def by_hand(model, x, y):
    logits, auxiliary = model(x, auxiliary=True)
    return sum(w * F.cross_entropy(o, y) for w, o in zip(WEIGHTS, (*auxiliary, logits[0]), strict=True))


def test_an_update_moves_every_head_along_its_gradient(heads, tmp_path):
    recipe = heads(epochs="1", batch="40", lr="0.5", schedule="constant", momentum="0")
    record = train(recipe, out=tmp_path)
    assert record.steps == 1
    model = build_model(recipe).train()
    data = spikefit.load_dataset("digits", split="train", limit=40)
    _, images, y = next(batches(data, 40, seed=0, shuffle=True))
    value = by_hand(model, images.expand(4, *images.shape), y)
    value.backward()
    assert record.history[0]["train_loss"] == pytest.approx(value.item(), rel=1e-5)
    trained = load_checkpoint(tmp_path).tensors["model"]
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(trained[name], p.detach() - 0.5 * p.grad, rtol=1e-4, atol=1e-6)


def test_it_learns_and_evaluates_with_the_same_loss_and_the_final_head(heads, tmp_path):
    recipe = heads(epochs="4", limit="200", lr="0.2")
    record = train(recipe, out=tmp_path)
    assert record.history[-1]["train_loss"] < 0.8 * record.history[0]["train_loss"]
    result = evaluate(tmp_path)
    assert (result["loss"], result["accuracy"]) == (record.loss, record.accuracy)
    model = build_model(recipe)
    model.load_state_dict(load_checkpoint(tmp_path).tensors["model"])
    images, y = spikefit.load_dataset("digits", split="test", limit=200).batch(range(200))
    x = images.expand(4, *images.shape)
    with torch.no_grad():
        model.eval()
        assert record.loss == pytest.approx(float(by_hand(model, x, y)), rel=1e-5)
        answers = model(x)[0].argmax(-1)
        early = [a.argmax(-1) for a in model(x, auxiliary=True)[1]]
    assert record.accuracy == pytest.approx(float((answers == y).double().mean()))
    assert all((answers != a).any() for a in early), "heads that agree do not tell which one answers"
    assert torch.equal(spikefit.predict(tmp_path, images).classes, answers)
    # the loss of the final head alone is a fair question to trained weights
    alone = evaluate(tmp_path, recipe.override({"loss": "ce_mean"}))
    assert alone["accuracy"] == record.accuracy
    assert alone["loss"] < record.loss / 2


@pytest.mark.parametrize("changes", [{"precision": "bf16-mixed"}, {"accumulate": "2", "ema": "0.5", "clip_norm": "1"}])
def test_other_ways_to_train(heads, changes):
    record = train(heads(epochs="3", limit="200", lr="0.2", **changes))
    assert record.history[-1]["train_loss"] < record.history[0]["train_loss"]


def test_two_processes_end_with_the_weights_of_one(heads, tmp_path):
    recipe = heads(norm="ws", limit="33", accelerator="cpu", lr="0.5", accumulate="2", model__norm="ws")
    train(recipe, out=tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    both = recipe.override({"devices": "2"}).to_dict()
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(both), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(TESTS), *sys.path) if p)},
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(tmp_path / folder).tensors["model"] for folder in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_comparison_sees_the_gradients_of_every_head(heads):
    batch = FirstBatch(heads())
    plain = batch.gradients(batch.model(heads(strategy="bptt")))
    assert all(plain[f"early.{i}.weight"].abs().max() > 0 for i in range(3))
    assert gradient_error(batch.gradients(batch.model(heads(strategy="lean:spikes"))), plain) < 1e-4
    assert min(measure_memory(heads(strategy="lean:spikes")).values()) > 0


def test_the_step_of_a_recipe_has_its_loss(heads):
    step = build_step(heads())
    logits, auxiliary = step.model(step.x, auxiliary=True)
    torch.testing.assert_close(step.loss(logits, step.y, auxiliary), by_hand(step.model, step.x, step.y))
    words = {"loss": "ce_heads", "timesteps": "4", "batch": "4", "image": "1x8x8"}
    assert profile_target("headed:make", words, predict_only=True).predicted_peak_bytes > 0
    assert verify_target("headed:make", {**words, "strategy": "lean:spikes"}).passed


def test_weights_of_the_recipe(heads):
    recipe = heads(weights="0.5,1,1.5,4", label_smoothing="0.1")
    assert recipe.to_dict()["loss"] == {"name": "ce_heads", "weights": [0.5, 1, 1.5, 4], "label_smoothing": 0.1}
    assert load_recipe(recipe.to_dict()) == recipe
    step = build_step(recipe)
    assert step.loss.weights_for(3) == (0.5, 1, 1.5, 4)
    with pytest.raises(OptionError, match="expected 4 weights, for 3 auxiliary heads and the final one, got 2"):
        build_model(heads(weights="1,2"))
    for wrong, told in (("1,-2", "positive numbers"), ("a,b", "weights: expected .*float.*got"), ("3", "positive")):
        with pytest.raises(RecipeError, match=told):
            heads(weights=wrong)


def test_loss_and_heads_fit_before_anything_is_trained(heads, small, fixed):
    told = r"loss ce_heads: expected a model with auxiliary heads, got {}, which has none; use loss=ce_mean"
    for make in (build_model, build_step, train):
        with pytest.raises(OptionError, match=told.format("mlp") + r"\."):
            make(small(loss="ce_heads"))
        with pytest.raises(OptionError, match=told.format("headed:make") + r", or model\.auxiliary=true\."):
            make(heads(auxiliary="false"))
    unread = (
        r"model {}: expected a loss that reads its 3 auxiliary heads, got loss={}, with which they would never learn"
    )
    for loss in ("ce_mean", "tet"):
        for make in (build_model, build_step, train):
            with pytest.raises(OptionError, match=unread.format("headed:make", loss) + "; use loss=ce_heads, or make"):
                make(heads(loss=loss))
    recipe = load_recipe({"model": fixed, "loss": "ce_mean"})
    with pytest.raises(OptionError, match=unread.format("fixed", "ce_mean") + r".* or model\.auxiliary=false\."):
        build_model(recipe)
    # each way out that the messages name
    assert build_model(recipe.override({"loss": "ce_heads"})).auxiliary_heads == 3
    assert build_model(recipe.override({"auxiliary": "false"})).auxiliary_heads == 0
    build_model(small(loss="ce_mean"))
    # a recipe without a loss has that of its model
    assert build_loss(load_recipe({"model": fixed}), build_model(load_recipe({"model": fixed}))).reads_auxiliary
    assert not build_loss(small(), build_model(small())).reads_auxiliary
    # to ask which strategies apply, no loss is needed
    assert {"name": "bptt", "applies": "yes"}.items() <= listing("strategies", fixed)[0].items()


def test_a_model_of_fixed_form_gets_no_neuron_and_no_norm(fixed, small):
    recipe = load_recipe({**small().to_dict(), "model": fixed, "loss": "ce_heads"})
    assert build_model(recipe).timesteps == 3
    assert load_recipe(recipe.to_dict()) == recipe
    assert settings_of(recipe, timesteps=3, device="cpu")["reset"] == "reset of the model"
    assert train(recipe.override({"epochs": "1", "timesteps": "4"})).recipe["neuron"]["name"] == "lif"
    with pytest.raises(TrainingError, match=r"use a larger batch\.$"):
        train(recipe.override({"batch": "1"}))
    assert fixed_parts("fixed") == ["neuron", "norm"]
    assert fixed_parts("vgg6") == fixed_parts("headed:make") == []


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"neuron": {"name": "lif", "tau": 3.0}}, r"got neuron={'name': 'lif', 'tau': 3\.0}; leave the neuron section"),
        ({"neuron": "if"}, r"its neurons have one fixed form and take no options, got neuron={'name': 'if'}"),
        ({"norm": "bn"}, r"its norms are part of it and cannot be chosen, got norm=\{'name': 'bn'\}; leave"),
        ({"preset": "efficientlif"}, r"preset 'efficientlif' sets neuron and norm, and this model takes no neuron and"),
    ],
)
def test_neuron_norm_and_preset_of_a_model_of_fixed_form(fixed, section, told):
    if "preset" in section:
        with pytest.raises(RecipeError, match=rf"model fixed: .*{told}"):
            load_recipe({"model": {"name": fixed, **section}})
    else:
        with pytest.raises(RecipeError, match=rf"model fixed: .*{told}"):
            load_recipe({"model": fixed, **section})
    words = {k: v for k, v in section.items() if not isinstance(v, dict)} or {"tau": "3"}
    for changes in ({"model": fixed, **words}, {**words, "model": fixed}):
        with pytest.raises((RecipeError, OptionError), match=rf"model fixed: .*{told}"):
            load_recipe({"model": "vgg6"}).override(changes)


def test_another_model_drops_a_neuron_and_norm_that_it_has_no_place_for(fixed):
    before = load_recipe({"model": "vgg6", "neuron": {"name": "if", "v_threshold": 0.5}, "norm": "step_bn"})
    after = before.override({"model": fixed, "loss": "ce_heads"})
    assert after.neuron == NeuronSection()
    assert after.norm.name is None
    assert build_model(after).auxiliary_heads == 3
    assert before.override({"model": "vgg9"}).norm.name == "step_bn"


def test_a_norm_alone_may_be_fixed(monkeypatch):
    def make(*, num_classes=10, input_shape=(1, 8, 8), neuron="lif"):
        return headed.make(num_classes, input_shape, auxiliary=False)

    monkeypatch.setitem(MODELS, "own_norm", ModelKind(make, "for this test"))
    assert build_model(load_recipe({"model": "own_norm", "neuron": "if"})).auxiliary_heads == 0
    with pytest.raises(RecipeError, match="model own_norm: its norms are part of it"):
        load_recipe({"model": "own_norm", "norm": "ws"})
    with pytest.raises(RecipeError, match=r"model own_norm: preset .* takes no norm; leave the preset out"):
        load_recipe({"model": {"name": "own_norm", "preset": "efficientlif"}})
