"""`compare` from recipe to files, on a network small enough to train in seconds."""

import json
import math

import pytest
import torch

from spikefit.errors import CheckpointError, OptionError, StrategyError
from spikefit.reporting import compare, comparison, table_text
from spikefit.reporting.measure import FirstBatch
from spikefit.training import load_recipe

TINY = {
    "data": {"name": "digits", "batch_size": 128},
    "encoding": {"name": "repeat", "timesteps": 4},
    "model": {"name": "mlp", "hidden": [24, 24, 24, 24]},
    "train": {"epochs": 2, "lr": 0.01},
}
# what others may rely on in compare.json
KEYS = {
    "strategy",
    "exact",
    "accuracy",
    "loss",
    "peak_bytes",
    "saved_bytes",
    "step_seconds",
    "max_gradient_error",
    "predicted_peak_bytes",
    "parameters",
    "history",
    "layers",
    "energy",
    "rates",
    "memory_against_T",
    "settings",
    "recipe",
    "environment",
    "refused",
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    seen = []
    rows = compare(TINY, ["bptt", "checkpoint:2"], out=out, on_progress=lambda what, event: seen.append((what, event)))
    return rows, out, seen


def test_rows_are_those_of_the_file(compared):
    rows, out, _ = compared
    assert json.loads((out / "compare.json").read_text()) == rows
    assert [row["strategy"] for row in rows] == ["bptt", "checkpoint:2"]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["exact"] is True
        assert 0 < row["step_seconds"] < 60
        assert row["settings"] == {
            "timesteps": 4,
            "batch": 128,
            "reset": "soft reset (detached)",
            "dtype": "float32",
            "device": row["environment"]["device"],
        }
    assert rows[1]["recipe"]["strategy"]["name"] == "checkpoint:2"


def test_same_weights_same_batches_same_learning(compared):
    (bptt, checkpoint), _, _ = compared
    assert bptt["max_gradient_error"] <= 1e-6
    assert checkpoint["max_gradient_error"] <= 1e-5
    assert bptt["accuracy"] > 0.5, "two epochs on digits do better than chance by far"
    # equal up to rounding of gradients, which training amplifies
    assert checkpoint["history"][0]["train_loss"] == pytest.approx(bptt["history"][0]["train_loss"], rel=1e-2)


def test_memory_falls_and_grows_with_T(compared):
    (bptt, checkpoint), _, _ = compared
    assert checkpoint["saved_bytes"] < bptt["saved_bytes"]
    for row in (bptt, checkpoint):
        assert row["saved_bytes"] == sum(sum(layer["saved_bytes"].values()) for layer in row["layers"])
        assert 0 < row["peak_bytes"] <= 1.2 * row["predicted_peak_bytes"]
        line = row["memory_against_T"]
        assert len(line) >= 3
        assert [p["timesteps"] for p in line] == sorted({p["timesteps"] for p in line})
        assert next(p for p in line if p["timesteps"] == 4)["saved_bytes"] == row["saved_bytes"]
        assert line[-1]["saved_bytes"] > line[0]["saved_bytes"]


def test_rates_are_those_of_the_trained_network(compared):
    rows, _, _ = compared
    for row in rows:
        assert len(row["rates"]) == 4
        shown = {layer["name"]: layer["spike_rate"] for layer in row["layers"] if layer["spike_rate"] is not None}
        assert shown == row["rates"]
        assert all(0 < rate < 1 for rate in shown.values())
        assert math.isclose(
            sum(layer["energy_pj"] or 0 for layer in row["layers"]), row["energy"]["snn_pj"], rel_tol=1e-6
        )


def test_the_report_holds_all_figures(compared):
    _, out, _ = compared
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Not in this report" not in html
    assert "checkpoint:2 (exact, max gradient error" in html


def test_progress_names_what_goes_on(compared):
    _, _, seen = compared
    assert seen[0][1] is None
    kinds = [event.kind for what, event in seen if what == "checkpoint:2" and event is not None]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"


def test_resume_trains_nothing_again_and_other_recipes_are_refused(compared, monkeypatch):
    rows, out, _ = compared
    # memory is measured in the rows above
    monkeypatch.setattr(comparison, "profile_of", lambda *_: {"layers": []})
    steps = []
    again = compare(
        TINY, ["bptt"], out=out, resume=True, on_progress=lambda what, event: steps.append(event and event.kind)
    )
    assert "step" not in steps
    assert again[0]["history"] == rows[0]["history"]
    with pytest.raises(CheckpointError, match="another run"):
        compare({**TINY, "seed": 7}, ["bptt"], out=out, resume=True)


def test_half_precision_is_measured_as_it_is_trained(tmp_path):
    recipe = load_recipe({**TINY, "train": {"epochs": 1}}).override({"batch": "32", "precision": "bf16-mixed"})
    (row,) = compare(recipe, ["bptt"], out=tmp_path)
    assert row["settings"]["dtype"] == "bfloat16 autocast"
    own = next(p for p in row["memory_against_T"] if p["timesteps"] == 4)
    assert own["saved_bytes"] == row["saved_bytes"]


def test_a_wrong_gradient_shows(monkeypatch):
    real = FirstBatch.gradients

    def damaged(self, model, *options):
        found = real(self, model, *options)
        if model.module.strategy.name == "checkpoint":
            name = next(iter(found))
            found[name] = found[name] * 1.5
        return found

    monkeypatch.setattr(FirstBatch, "gradients", damaged)
    base = load_recipe(TINY)
    recipes = {name: base.override({"strategy": name}) for name in ("bptt", "checkpoint")}
    rows = comparison._measured_steps(FirstBatch(base), recipes)
    assert rows["bptt"]["max_gradient_error"] <= 1e-6
    assert rows["checkpoint"]["max_gradient_error"] == pytest.approx(0.5, rel=1e-3)


def test_the_first_batch_is_that_of_training():
    base = load_recipe(TINY)
    batch = FirstBatch(base)
    from spikefit.training import build_loss, train

    first = build_loss(base)(batch.model(base)(batch.x), batch.y).item()
    losses = []
    train(base.override({"epochs": 1}), on_progress=lambda e: losses.append(e.loss) if e.kind == "step" else None)
    assert losses[0] == first
    again = FirstBatch(base)
    assert torch.equal(again.x, batch.x)


def test_a_strategy_that_is_refused_leaves_the_others_their_rows(tmp_path):
    """Nothing runs a hard reset backwards."""
    recipe = {**TINY, "model": {"name": "mlp", "hidden": [16]}, "train": {"epochs": 1}}
    recipe |= {"neuron": {"v_reset": 0.0}, "norm": {"name": "step_bn"}}
    rows = compare(recipe, ["inverse", "bptt", "integer"], out=tmp_path)
    assert [row["strategy"] for row in rows] == ["inverse", "bptt", "integer"]
    assert [row["refused"] is None for row in rows] == [False, True, False]
    for row in (rows[0], rows[2]):
        assert row["refused"].startswith("blocks.1: ")
        assert "a hard reset erases u" in row["refused"]
        assert row["accuracy"] is row["peak_bytes"] is row["step_seconds"] is None
    assert rows[1].keys() >= KEYS
    assert rows[1]["accuracy"] is not None
    assert json.loads((tmp_path / "compare.json").read_text()) == rows
    told = table_text(rows)
    assert f"inverse was refused: {rows[0]['refused'][:40]}" in " ".join(told.split())
    assert "was refused: blocks.1: " in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(StrategyError, match=r"no strategy could run\. blocks\.1: inverse"):
        compare(recipe, ["inverse", "integer"])


def test_a_strategy_that_is_refused_in_training_leaves_the_others_their_rows(monkeypatch):
    """Membranes that grow beyond what the inverse was checked for stop its training alone."""
    real, seen = comparison.train, []

    def training(recipe, **options):
        seen.append(recipe.strategy.name)
        if recipe.strategy.name == "inverse":
            raise StrategyError("blocks.0: inverse would undo up to 10 calls")
        return real(recipe, **options)

    monkeypatch.setattr(comparison, "train", training)
    recipe = {**TINY, "model": {"name": "mlp", "hidden": [16]}, "train": {"epochs": 1}, "norm": {"name": "step_bn"}}
    first, second = compare(recipe, ["inverse", "bptt"])
    assert seen == ["inverse", "bptt"]
    assert first["refused"] == "blocks.0: inverse would undo up to 10 calls"
    assert first["step_seconds"] > 0
    assert first["accuracy"] is None
    assert (second["refused"], second["accuracy"] is None) == (None, False)


@pytest.mark.parametrize(
    ("strategies", "error", "message"),
    [
        ([], OptionError, "at least one strategy"),
        (["bptt", "bptt"], OptionError, "each once"),
        (["bptt", "chekpoint"], StrategyError, "Did you mean checkpoint"),
    ],
)
def test_strategies_are_checked_before_anything_runs(strategies, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare(TINY, strategies, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
