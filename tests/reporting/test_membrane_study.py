"""Studies that train nothing: bytes of membranes by formula and counted."""

import json

import pytest

from spikefit.errors import OptionError, RecipeError
from spikefit.reporting import study

# one layer of 8 alone and three of 8 that can share, leak 1/2, T = 5, batch 2, 4 bytes
STUDY = """
train = false
[recipe]
data = { batch_size = 2 }
encoding = { name = "repeat", timesteps = 5 }
model = { name = "har_mlp", hidden = 8, num_classes = 3 }
neuron = { tau = 2.0 }
norm = { name = "step_bn" }
[[variants]]
name = "none"
[[variants]]
name = "layer"
set = { "model.share" = "layer" }
[[variants]]
name = "layer_channel 2"
set = { "model.share" = "layer_channel", "model.groups" = 2 }
[[data]]
name = "4 sensors"
set = { "model.input_shape" = [4] }
"""
P = 2 * 8 * 4
SPIKES = 4 * 5 * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("membranes")
    path = folder / "shares.toml"
    path.write_text(STUDY)
    seen = []
    rows = study(path, out=folder / "out", on_progress=lambda where, event: seen.append(where["reused"]))
    return path, folder / "out", {row["variant"]: row for row in rows}, seen


def test_bytes_are_those_of_the_formula_and_of_the_tensors(finished):
    _, out, rows, _ = finished
    assert [rows[v]["lif_forward_bytes"] for v in rows] == [4 * P, 2 * P, P]
    for row in rows.values():
        assert row["state_bytes"] == row["lif_forward_bytes"]
        assert row["lif_backward_saved_bytes"] == row["lif_backward_kept_bytes"]
        assert row["lif_backward_kept_bytes"]["bptt"] == 4 * 5 * P
        assert row["lif_backward_kept_bytes"]["replay"] == SPIKES
        # the whole step keeps weights' inputs as well, whatever the neurons do
        assert all(row["step_saved_bytes"][s] > row["lif_backward_saved_bytes"][s] for s in row["step_saved_bytes"])
    assert list(json.loads((out / "study.json").read_text())) == list(rows.values())


def test_ratios_are_to_the_unshared_variant_under_bptt(finished):
    _, out, rows, _ = finished
    ratios = rows["layer"]["ratios"]
    assert (ratios["baseline"], ratios["forward"]) == ("none", 2.0)
    assert (ratios["kept"]["bptt"], ratios["kept"]["replay"]) == (1.0, 4 * 5 * P / SPIKES)
    assert ratios["peak"]["inverse"] == 4 * 5 * P / rows["layer"]["lif_backward_peak_bytes"]["inverse"]
    text, html = (out / "table.txt").read_text(), (out / "report.html").read_text(encoding="utf-8")
    for part in ("times less than unshared and stored", "Membranes at the peak of backward", "32.00"):
        assert part in text
        assert part in html
    assert "Nothing was trained. At T = 5, batch 2, soft reset" in text


def test_counted_rows_are_not_repeated(finished):
    path, out, rows, seen = finished
    assert seen == [False] * 3
    (out / "membranes" / f"{rows['layer']['cells'][0]}.json").unlink()
    again = []
    assert study(path, out=out, on_progress=lambda where, event: again.append(where["reused"])) == list(rows.values())
    assert again == [True, False, True]


def test_a_strategy_that_does_not_apply_is_left_open(tmp_path):
    path = tmp_path / "hard.toml"
    path.write_text(STUDY.replace("tau = 2.0", "tau = 2.0, v_reset = 0.0"))
    rows = study(path, out=tmp_path / "out")
    for row in rows:
        assert row["lif_backward_kept_bytes"]["inverse"] is None
        assert row["lif_backward_saved_bytes"]["integer"] is None
        assert row["lif_backward_saved_bytes"]["bptt"] > row["lif_backward_kept_bytes"]["bptt"], "it keeps spikes too"
    assert "inverse" not in (tmp_path / "out" / "table.txt").read_text()


def test_a_norm_over_the_sequence_leaves_replay_alone(tmp_path):
    path = tmp_path / "sequence.toml"
    path.write_text(
        STUDY.partition("[[variants]]")[0].replace("step_bn", "bn").replace("3 }", "3, input_shape = [4] }")
    )
    (row,) = study(path, out=tmp_path / "out")
    for key in ("kept", "peak", "saved"):
        found = row[f"lif_backward_{key}_bytes"]
        assert [s for s in found if found[s] is not None] == ["bptt", "replay"]
    assert row["data"] == "no data"


def test_without_an_unshared_variant_there_are_no_ratios(tmp_path):
    path = tmp_path / "layer.toml"
    first, _, rest = STUDY.partition('[[variants]]\nname = "none"\n')
    path.write_text(first + rest)
    rows = study(path, out=tmp_path / "out")
    assert [row["ratios"] for row in rows] == [None, None]
    assert "unshared and stored" not in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (("train = false", "train = false\nseeds = [0, 1]"), RecipeError, "seeds has no effect"),
        (("train = false", "train = false\nmemory = true"), RecipeError, "memory has no effect"),
        (("train = false", "trian = false"), RecipeError, r"Did you mean train\?"),
        (("train = false", 'train = "no"'), RecipeError, "expected train = true or false"),
        (('"model.groups" = 2', '"model.groups" = 3'), OptionError, "layer_channel 2 / 4 sensors: .*divisor"),
        (("[4]", '[4], "model.name" = "torch.nn:Identity"'), OptionError, "expected|has no input_shape"),
    ],
)
def test_mistakes_are_told_before_anything_is_counted(tmp_path, change, error, told):
    path = tmp_path / "odd.toml"
    assert change[0] in STUDY
    path.write_text(STUDY.replace(*change))
    with pytest.raises(error, match=told):
        study(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
