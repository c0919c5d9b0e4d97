"""The loop: what it learns, what it repeats, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from runs import weights

import spikefit
from spikefit.errors import CheckpointError, OptionError, ShapeError, TrainingError
from spikefit.neurons import Threshold
from spikefit.training import ProgressBar, build_loss, evaluate, load_recipe, predict, train
from spikefit.training.build import make_fabric
from spikefit.training.evaluation import measure
from support import known_steps


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_learns_and_records(small, tmp_path):
    events = []
    recipe = small(limit="200", epochs="4", hidden="32")
    record = train(recipe, out=tmp_path, on_progress=events.append)
    losses = [e["train_loss"] for e in record.history]
    assert losses[-1] < 0.8 * losses[0]
    assert record.accuracy > 0.5
    assert [e["epoch"] for e in record.history] == [1, 2, 3, 4]
    assert set(record.history[0]) == {
        "epoch",
        "train_loss",
        "test_loss",
        "test_accuracy",
        "seconds",
        "learning_rate",
        "spike_rate",
    }
    assert record.steps == 4 * 13 == len([e for e in events if e.kind == "step"])
    assert [e.kind for e in events[:2]] + [events[-1].kind] == ["start", "step", "end"]
    assert set(record.spike_rates) == {"blocks.1"}
    assert 0 < record.spike_rates["blocks.1"] < 1
    assert record.step_seconds > 0
    assert record.environment["torch"] == torch.__version__
    assert record.recipe["model"]["input_shape"] == [1, 8, 8]
    written = json.loads((tmp_path / "record.json").read_text())
    assert written == json.loads(json.dumps(record.to_dict()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000039", "checkpoint-00000052", "record.json"]


def test_evaluate_and_predict_repeat_the_record(small, tmp_path):
    record = train(small(ema="0.9"), out=tmp_path)
    result = evaluate(tmp_path)
    assert (result["accuracy"], result["loss"]) == (record.accuracy, record.loss)
    assert result["spike_rates"] == record.spike_rates
    assert result["samples"] == 40
    data = spikefit.load_dataset("digits", split="test", limit=40)
    images, targets = data.batch(range(40))
    answer = predict(tmp_path, images.numpy())
    assert float((answer.classes == targets).double().mean()) == pytest.approx(record.accuracy)
    torch.testing.assert_close(answer.probabilities.sum(-1), torch.ones(40))
    assert answer.names == [str(d) for d in range(10)]
    with pytest.raises(ShapeError, match="expected x as"):
        predict(tmp_path, images[:, 0])
    assert evaluate(tmp_path, small(limit="20"), split="train")["samples"] == 20
    with pytest.raises(CheckpointError, match=r"another model.*blocks\.1"):
        evaluate(tmp_path, small(hidden="17"))
    with pytest.raises(CheckpointError, match="a recipe has no weights"):
        evaluate("recipes/demo.toml")


def test_spike_rates_do_not_depend_on_the_strategy(small):
    rates = [train(small(epochs="1", lr="1e-9", strategy=s)).spike_rates for s in ("bptt", "lean")]
    assert min(rates[0].values()) > 0
    assert rates[0] == rates[1]


@pytest.mark.parametrize("batch_size", [7, 16])
def test_spike_rates_of_thresholds_are_known(small, batch_size):
    """A threshold that is called on maps and on means counts neurons, not calls; one that nobody calls has no rate."""
    model, recipe = known_steps(), small()
    model.blocks[0].head, model.blocks[0].spare = torch.nn.Linear(2, 10), Threshold()
    data, fabric = spikefit.load_dataset("digits", split="test", limit=40), make_fabric("evaluate", recipe)

    def encoding(images, generator):
        return images[..., :4, :4].expand(2, -1, -1, -1, -1)

    result = measure(model, data, fabric, encoding, build_loss(recipe), batch_size, 0)
    rate = (16 + 16 + 1 + 2) / (32 + 32 + 2 + 2)
    assert result["spike_rates"] == {"blocks.0.fire": pytest.approx(rate, rel=1e-12)}
    assert result["spike_rate"] == pytest.approx(rate, rel=1e-12)
    assert not model.blocks[0].fire._forward_hooks


def test_strategies_meet_the_same_batches_and_end_alike(small, tmp_path):
    changes = {"model": "vgg6", "width": "0.1", "augment": "crop:1", "encoding": "rate"}
    for name in ("bptt", "checkpoint:2"):
        train(small(strategy=name, **changes), out=tmp_path / name)
    for key, tensor in weights(tmp_path / "bptt").items():
        torch.testing.assert_close(weights(tmp_path / "checkpoint:2")[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_repeats_itself_and_leaves_the_random_numbers_alone(small, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(small(), out=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    train(small(), out=tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    train(small(seed="1"), out=tmp_path / "c")
    assert not torch.equal(
        weights(tmp_path / "a")["blocks.1.synapse.weight"], weights(tmp_path / "c")["blocks.1.synapse.weight"]
    )


def test_accumulation_equals_a_larger_batch(small, tmp_path):
    # 40 samples: the last group of two is uneven, 16 + 16 and 8
    base = {"norm": "none", "epochs": "1", "optimizer": "sgd", "schedule": "constant", "lr": "0.5"}
    one = train(small(batch="32", **base), out=tmp_path / "one")
    two = train(small(batch="16", accumulate="2", **base), out=tmp_path / "two")
    assert one.steps == two.steps == 2
    assert two.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-5)
    start = train(small(batch="32", **{**base, "lr": "1e-9"}), out=tmp_path / "start")
    moved = 0.0
    for key, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], tensor, rtol=1e-4, atol=1e-6)
        moved += float((tensor - weights(tmp_path / "start")[key]).abs().max())
    assert moved > 1e-2
    assert start.steps == 2


@pytest.mark.parametrize("strategy", ["bptt", "sltt", "ottt", "tbptt:3"])
def test_steps_without_a_label_count_nowhere(tmp_path, strategy):
    # batches of 4 with 8, 1 and 0 labels; together they weigh as one batch of 12
    random = np.random.default_rng(0)
    y = np.full((12, 5), -1)
    y[:4, :2], y[4, 0] = 1, 0
    arrays = {f"x_{s}": random.standard_normal((12, 5, 3)).astype(np.float32) for s in ("train", "test")}
    np.savez(tmp_path / "part.npz", **arrays, y_train=y, y_test=y, classes=["a", "b"])
    recipe = load_recipe(
        {
            "data": {"name": "npz", "root": str(tmp_path), "file": "part.npz"},
            "encoding": "sequence",
            "model": {"name": "har_mlp", "hidden": 4, "layers": 1},
            "norm": "none",
            "loss": "ce_steps",
            "strategy": strategy,
            "train": {"optimizer": "sgd", "lr": 0.5, "epochs": 1, "schedule": "constant"},
        }
    )
    whole = train(recipe.override({"batch": 12}), out=tmp_path / "whole")
    parts = train(recipe.override({"batch": 4, "accumulate": 3}), out=tmp_path / "parts")
    assert parts.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-5)
    for key, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[key], tensor, rtol=1e-4, atol=1e-6)
    # shuffled batches of one sample: most have no label at all
    alone = train(recipe.override({"batch": 1, "epochs": 2}))
    assert all(math.isfinite(epoch["train_loss"]) and epoch["train_loss"] > 0 for epoch in alone.history)


def test_classes_of_the_training_data_hold_the_test_labels(sensors, tmp_path):
    content = dict(np.load(tmp_path / "sensors.npz"))
    content["y_test"][3] = 2
    np.savez(tmp_path / "sensors.npz", **content)
    steps = []
    with pytest.raises(OptionError, match="npz test has labels up to 2 and needs at least 3 classes, got 2"):
        train({**sensors, "model": {"name": "har_mlp", "hidden": 8}}, on_progress=steps.append)
    assert not steps


def test_clipping_bounds_the_update(small, tmp_path):
    base = {"epochs": "1", "batch": "40", "momentum": "0", "lr": "1", "schedule": "constant"}
    train(small(**{**base, "lr": "1e-9"}), out=tmp_path / "start")
    train(small(**base, clip_norm="0.01"), out=tmp_path / "clipped")
    train(small(**base), out=tmp_path / "free")

    def distance(name):
        a, b = weights(tmp_path / "start"), weights(tmp_path / name)
        return math.sqrt(sum(float((a[k] - b[k]).square().sum()) for k in a if "running" not in k and "num_" not in k))

    assert distance("clipped") == pytest.approx(0.01, rel=1e-3)
    assert distance("free") > 0.05


def test_averaged_weights_are_evaluated_and_kept(small, tmp_path):
    train(small(ema="0.99"), out=tmp_path)
    average, last = weights(tmp_path, "ema"), weights(tmp_path)
    assert average.keys() == last.keys()
    assert not torch.equal(average["blocks.1.synapse.weight"], last["blocks.1.synapse.weight"])


def test_a_last_batch_of_one_sample(small):
    assert train(small(limit="33", epochs="1")).steps == 2
    assert train(small(limit="33", epochs="1", norm="ws")).steps == 3
    assert train(small(limit="33", epochs="1", drop_last="true")).steps == 2
    with pytest.raises(TrainingError, match="needs 2 samples"):
        train(small(batch="1"))
    with pytest.raises(OptionError, match="leaves no batch"):
        train(small(batch="64", drop_last="true"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions(small, precision):
    record = train(small(precision=precision, epochs="1", encoding="rate"))
    assert math.isfinite(record.loss)


def test_precision_the_machine_lacks(small):
    with pytest.raises(TrainingError, match="accelerator, devices or precision"):
        train(small(precision="7-bit"))
    with pytest.raises(TrainingError, match="accelerator, devices or precision"):
        train(small(accelerator="abacus"))


@pytest.mark.parametrize("model", ["har_mlp", "har_conv"])
def test_sequences(tmp_path, sensors, model):
    recipe = load_recipe({**sensors, "model": model})
    record = train(recipe, out=tmp_path / "run")
    assert record.recipe["model"]["input_shape"] == [3]
    assert record.recipe["model"]["num_classes"] == 2
    answer = predict(tmp_path / "run", torch.zeros(2, 16, 3))
    assert answer.probabilities.shape == (2, 2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, sensors):
    # so small that the scaled inputs are inf
    data = {**sensors["data"], "std": [1e-45] * 3}
    recipe = load_recipe({**sensors, "data": data, "model": {"name": "har_mlp", "hidden": 8}, "norm": "none"})
    out = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=r"finite .*, got (nan|inf) in epoch 1, batch \d of 5; try a smaller train\.lr"
    ) as error:
        train(recipe, out=out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_progress_bar_draws(small, capsys):
    train(small(epochs="1"), progress=True)
    drawn = capsys.readouterr()
    assert "epoch 1/1" in drawn.err
    assert drawn.out == ""
    assert isinstance(ProgressBar("x").label, str)


def test_out_that_is_taken(small, tmp_path):
    train(small(epochs="1"), out=tmp_path)
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        train(small(epochs="1"), out=tmp_path)
    with pytest.raises(CheckpointError, match="needs out"):
        train(small(), resume=True)
