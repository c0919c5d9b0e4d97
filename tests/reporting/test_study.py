"""`study` from file to table: what runs, what is kept, what runs again."""

import json
import statistics

import pytest

from spikefit.errors import DataError, RecipeError, SpikefitError
from spikefit.reporting import study
from spikefit.reporting.studies import summarise
from spikefit.reporting.study_file import Cell
from spikefit.training import load_recipe

STUDY = """
seeds = [0, 1]
[recipe]
data = { name = "digits", batch_size = 256 }
encoding = { name = "repeat", timesteps = 2 }
model = { name = "mlp", hidden = [16] }
train = { epochs = 1, lr = 0.02 }
[[variants]]
name = "tau 2"
[[variants]]
name = "tau 4"
set = { "neuron.tau" = 4.0 }
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = folder / "taus.toml"
    path.write_text(STUDY)
    events = []
    rows = study(path, out=folder / "out", on_progress=lambda cell, event: events.append((cell, event)))
    return path, folder / "out", rows, events


def run_again(path, out):
    """(rows, cells that ran)."""
    ran = []
    rows = study(path, out=out, on_progress=lambda cell, event: event is None and ran.append(cell))
    return rows, [(cell["variant"], cell["seed"]) for cell in ran if not cell["reused"]]


def test_one_row_per_variant_with_mean_and_spread(finished):
    _, out, rows, events = finished
    assert [(row["data"], row["variant"], row["n"]) for row in rows] == [("digits", "tau 2", 2), ("digits", "tau 4", 2)]
    for row in rows:
        assert row["accuracy"] == statistics.fmean(row["accuracy_values"])
        assert row["accuracy_spread"] == statistics.stdev(row["accuracy_values"])
        assert row["accuracy_values"][0] != row["accuracy_values"][1], "seeds do not change the run"
        assert row["history"][0]["test_accuracy"] == pytest.approx(row["accuracy"])
    assert rows[0]["accuracy_values"] != rows[1]["accuracy_values"]
    assert json.loads((out / "study.json").read_text()) == rows
    text = (out / "table.txt").read_text()
    assert "tau 4" in text
    assert "Mean ± sample standard deviation over seeds 0, 1. At T = 2, batch 256, soft reset" in text
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f"{100 * rows[0]['accuracy']:.2f} ± " in html
    assert "&quot;neuron.tau&quot; = 4.0" in html
    starts = [cell for cell, event in events if event is None]
    assert [cell["run"] for cell in starts] == [1, 2, 3, 4]
    assert any(event is not None and event.kind == "epoch" for _, event in events)


def test_finished_runs_are_not_repeated(finished):
    path, out, rows, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert len(before) == 4
    assert run_again(path, out) == (rows, [])
    assert {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == before


def test_a_stopped_study_runs_what_is_missing(finished):
    path, out, rows, _ = finished
    (out / "cells" / f"{rows[1]['cells'][1]}.json").unlink()
    again, ran = run_again(path, out)
    assert ran == [("tau 4", 1)]
    assert again[1]["accuracy_values"] == rows[1]["accuracy_values"]


def test_a_changed_recipe_runs_again(finished, tmp_path):
    _, out, rows, _ = finished
    path = tmp_path / "taus.toml"
    path.write_text(STUDY.replace("4.0", "3.0").replace("[0, 1]", "[0]"))
    again, ran = run_again(path, out)
    assert ran == [("tau 4", 0)]
    assert again[0]["accuracy"] == rows[0]["accuracy_values"][0]
    assert again[0]["accuracy_spread"] is None


def test_memory_is_measured_once_per_variant(finished, tmp_path):
    _, out, _, _ = finished
    path = tmp_path / "taus.toml"
    path.write_text("memory = true\n" + STUDY.rpartition("[[variants]]")[0])
    (row,), ran = run_again(path, out)
    assert ran == []
    assert len(list((out / "memory").iterdir())) == 1
    assert 0 < row["saved_bytes"] < row["predicted_peak_bytes"]
    assert 0 < row["peak_bytes"] < 1.2 * row["predicted_peak_bytes"]
    assert "saved MiB" in (out / "table.txt").read_text()


@pytest.mark.parametrize("damage", ["{", '{"recipe": {"seed": 5}, "result": {}}', "[]"])
def test_a_damaged_cell_is_named(finished, damage):
    path, out, rows, _ = finished
    file = out / "cells" / f"{rows[0]['cells'][0]}.json"
    sound = file.read_text()
    file.write_text(damage)
    try:
        with pytest.raises(DataError, match=rf"{file.name} is damaged or was edited; delete it"):
            study(path, out=out)
    finally:
        file.write_text(sound)


def test_equal_variants_and_bad_keys_stop_before_the_first_run(tmp_path):
    path = tmp_path / "taus.toml"
    path.write_text(STUDY.replace('"neuron.tau" = 4.0', '"neuron.tau" = 2.0'))
    with pytest.raises(RecipeError, match="'tau 2 / digits' and 'tau 4 / digits' are the same recipe"):
        study(path, out=tmp_path / "out")
    path.write_text(STUDY.replace('"neuron.tau" = 4.0', '"neuron.tua" = 2.0'))
    with pytest.raises(RecipeError, match="tua"):
        study(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mean_and_spread_have_known_values():
    recipe = load_recipe({"model": "mlp"})
    cells = [Cell("v", "d", seed, recipe, str(seed)) for seed in range(3)]
    record = {
        "loss": 1.0,
        "step_seconds": 0.5,
        "parameters": 9,
        "recipe": recipe.to_dict(),
        "environment": {"device": "cpu"},
    }
    records = {
        str(i): {
            **record,
            "accuracy": value,
            "spike_rates": {"a": value / 2},
            "history": [{"epoch": 1, "test_accuracy": value, "note": "x"}],
        }
        for i, value in enumerate((0.5, 0.75, 1.0))
    }
    (row,) = summarise(cells, records, {})
    assert (row["accuracy"], row["accuracy_spread"], row["loss_spread"], row["n"]) == (0.75, 0.25, 0.0, 3)
    assert row["spike_rates"] == {"a": 0.375}
    assert row["history"] == [{"epoch": 1.0, "test_accuracy": 0.75}]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('"data.root" = "nowhere", "data.name" = "mnist"', "study: odd / mnist: .*expected a folder"),
        ('"data.augment" = ["spin"]', "study: odd / digits: .*expected some of crop"),
        ('"model.name" = "nowhere:make"', "study: odd / digits: .*cannot find the factory"),
        ('"train.accelerator" = "abacus"', "study: odd / digits: .*accelerator"),
        ('"train.devices" = 2', "study: odd / digits: .*train.devices=1"),
    ],
)
def test_every_row_is_checked_before_the_first_one_trains(tmp_path, change, told):
    path = tmp_path / "odd.toml"
    path.write_text(f'{STUDY}[[variants]]\nname = "odd"\nset = {{ {change} }}\n')
    with pytest.raises(SpikefitError, match=told):
        study(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
