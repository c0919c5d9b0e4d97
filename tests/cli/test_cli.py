"""The command line as users type it: every verb, the key=value grammar, and one sentence for every mistake."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from spikefit.cli import main
from spikefit.cli.show import show_profile
from spikefit.cli.targets import read_recipe
from spikefit.errors import OptionError
from spikefit.neurons import TwoGroupNode, create_neuron
from spikefit.planning import profile
from support import known_steps

RECIPE = """
seed = 1
data = { name = "digits", batch_size = 32, limit = 96 }
encoding = { name = "repeat", timesteps = 2 }
model = { name = "mlp", hidden = [16] }
neuron = { name = "lif", tau = 2.0, decay_input = false, v_threshold = 1.0, v_reset = "soft", detach_reset = true }
train = { optimizer = "adamw", lr = 0.01, epochs = 1 }
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(capsys):
    """run("verb", ...) -> (exit status, standard output, standard error)."""

    def call(*words):
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        seen = capsys.readouterr()
        return stopped.value.code, seen.out, seen.err

    return call


def test_train_evaluate_predict(run, recipe, tmp_path):
    status, out, _ = run("train", str(recipe), "epochs=2", "train.lr=0.02", "--out", "run", "--json")
    record = json.loads(out)
    assert status == 0
    assert (record["recipe"]["train"]["epochs"], record["recipe"]["train"]["lr"]) == (2, 0.02)
    assert len(record["history"]) == 2

    status, out, _ = run("evaluate", "run", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["accuracy"] == record["accuracy"]
    assert json.loads(run("evaluate", "run", "--split", "train", "--json")[1])["split"] == "train"
    assert f"{100 * record['accuracy']:.2f} %" in run("evaluate", "run")[1]

    samples = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    np.save(tmp_path / "samples.npy", samples)
    np.savez(tmp_path / "samples.npz", x=samples)
    status, out, _ = run("predict", "run", "samples.npy", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [r["sample"] for r in rows] == list(range(5))
    assert all(r["class"] in "0123456789" and 0.1 <= r["probability"] <= 1 for r in rows)
    assert json.loads(run("predict", "run", "samples.npz", "--json")[1]) == rows
    assert "probability" in run("predict", "run", "samples.npy")[1]

    odd = {
        "objects.npy": (np.array([{}, None]), "cannot be read as a plain array"),
        "words.npy": (np.array(["a", "b"]), "expected real numbers"),
        "complex.npy": (samples * 1j, "expected real numbers in complex.npy, got complex64"),
        "none.npy": (samples[:0], "got an array of shape (0, 1, 8, 8)"),
        "number.npy": (np.float32(1), "got an array of shape ()"),
        "nan.npy": (samples * np.nan, "expected finite numbers"),
        "other.npy": (samples[:, :, :5, 0], "got (2, 5, 1, 5)"),
    }
    for name, (content, told) in odd.items():
        np.save(tmp_path / name, content, allow_pickle=True)
        status, out, err = run("predict", "run", name)
        assert (status, out) == (2, ""), name
        assert told in err, (name, err)
    np.savez(tmp_path / "empty.npz")
    assert "found none" in run("predict", "run", "empty.npz")[2]

    status, _, err = run("train", str(recipe), "epochs=2", "--out", "run")
    assert status == 2
    assert "--resume" in err or "resume" in err
    assert run("train", str(recipe), "epochs=2", "train.lr=0.02", "--out", "run", "--resume", "--json")[0] == 0


def test_train_prints_a_result(run, recipe):
    status, out, err = run("train", str(recipe))
    assert status == 0
    assert "test accuracy" in out
    assert "firing rates" in out
    assert "Traceback" not in err


def test_profile_prints_json_and_a_table(run):
    words = ("vgg9", "timesteps=2", "batch=2", "image=3x16x16", "width=0.0625", "strategy=checkpoint", "--predict-only")
    status, out, err = run("profile", *words, "--json")
    seen = json.loads(out)
    assert (status, err) == (0, "")
    assert {"predicted_peak_bytes", "measured_peak_bytes", "saved_bytes", "step_seconds", "layers", "energy"} <= set(
        seen
    )
    assert (seen["settings"]["timesteps"], seen["settings"]["batch"]) == (2, 2)
    assert (seen["settings"]["strategy"], seen["settings"]["sample_shape"]) == ("checkpoint", [3, 16, 16])
    status, out, _ = run("profile", *words)
    assert status == 0
    for text in ("blocks.0", "kept MiB", "peak of a step, predicted", "Energy assumes"):
        assert text in out


def test_profile_tells_the_strict_accounting_from_the_published_one(run):
    words = ("vgg6", "timesteps=2", "batch=2", "image=3x8x8", "width=0.0625")
    status, out, err = run("profile", *words, "--json")
    assert status == 0, err
    energy = json.loads(out)["energy"]
    published = energy["published"]
    assert published["ann_pj"] == pytest.approx(5.5 / 4.6 * energy["ann_pj"])
    assert published["snn_pj"] == pytest.approx(0.9 * published["adds"] + 4.6 * published["mults"])
    for account in (energy, published):
        assert account["ratio"] == pytest.approx(account["ann_pj"] / account["snn_pj"])
    status, out, _ = run("profile", *words)
    assert status == 0
    assert "the strict one charges accumulates only where a layer was seen to read 0 and 1" in out
    assert re.search(r"energy as published \(flatters\)\W+[\d.]+ uJ at a rate of [\d.]+ %", out)
    for account in ("its ANN twin, strict", "its ANN twin as published"):
        assert re.search(rf"{account}\W+[\d.]+ uJ, [\d.]+ times as much", out), account


def test_profile_prints_both_accountings_where_they_differ(capsys):
    result = profile(known_steps(), torch.full((2, 3, 1, 4, 4), 0.25), predict_only=True).to_dict()
    shown = []
    for numbers in ({}, {"snn_pj": 2e6}, {"snn_pj": 2e6, "all_spiking_pj": 1e6, "all_spiking_rate": 0.083}):
        result["energy"] |= numbers
        show_profile("mynet:make", result)
        shown.append(capsys.readouterr().out)
    row = r"with accumulates only behind the first layer\W+1\.00 uJ at a firing rate of 8\.3 %"
    assert [re.search(row, text) is not None for text in shown] == [False, False, True]
    assert all("charges accumulates only behind the first layer" in text for text in shown)


def test_words_make_the_neuron_that_python_makes():
    made = read_recipe("vgg6", {"neuron": "two_group", "strategy": "streamlined"}).neuron
    assert repr(create_neuron(made.name, **made.options())) == repr(TwoGroupNode())


def test_profile_of_an_own_factory(run, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "import spikefit\n"
        "from spikefit.layers import Readout\n"
        "def make(hidden=8):\n"
        "    blocks = [spikefit.SpikingLinear(4, hidden), Readout(hidden, 3)]\n"
        "    return spikefit.SpikingNetwork(blocks, input_shape=(4,))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    status, out, err = run("profile", "mynet:make", "hidden=16", "timesteps=3", "batch=2", "--predict-only", "--json")
    assert status == 0, err
    assert json.loads(out)["layers"][0]["parameters"] == 4 * 16 + 2 * 16


def test_a_prediction_needs_no_memory(run):
    # 60 GB of weights and as much input
    words = ("hidden=[100000,50000]", "image=3x224x224", "batch=100000", "timesteps=2")
    for strategy in ("bptt", "checkpoint"):
        status, out, err = run("profile", "mlp", *words, f"strategy={strategy}", "--predict-only", "--json")
        assert status == 0, err
        assert json.loads(out)["predicted_peak_bytes"] > 100e9
    status, out, err = run("plan", "mlp", *words, "budget=least", "--json")
    assert status == 0, err
    assert json.loads(out)["predicted_peak_bytes"] > 50e9
    assert run("report", "mlp", *words, "strategy=lean")[0] == 0


def test_plan_saves_what_a_strategy_uses(run, tmp_path):
    words = ("timesteps=8", "batch=4", "image=3x16x16", "width=0.25")
    free = json.loads(run("plan", "vgg6", *words, "budget=least", "--json")[1])
    budget = f"budget={int(1.2 * (free['static_bytes'] + free['predicted_peak_bytes']))}"
    status, out, err = run("plan", "vgg6", *words, budget, "--save", str(tmp_path / "plan.json"), "--json")
    assert status == 0, err
    made = json.loads(out)
    assert {"budget_bytes", "predicted_peak_bytes", "predicted_slowdown", "units"} <= set(made)
    assert made["static_bytes"] + made["predicted_peak_bytes"] <= made["budget_bytes"]
    assert [u["name"] for u in made["units"]] == [f"blocks.{i}" for i in range(6)]
    assert "blocks.5" in run("plan", "vgg6", *words, budget)[1]
    strategy = f"strategy=lean:{tmp_path / 'plan.json'}"
    seen = json.loads(run("profile", "vgg6", *words, strategy, "--predict-only", "--json")[1])
    assert seen["predicted_peak_bytes"] == made["predicted_peak_bytes"]
    status, _, err = run("profile", "vgg9", *words, strategy, "--predict-only")
    assert status == 2
    assert "made for another model" in err
    assert "Traceback" not in err


def test_plan_for_a_device_that_is_not_here(run):
    words = ("plan", "vgg6", "timesteps=8", "batch=16", "image=3x32x32", "accelerator=cuda")
    status, out, err = run(*words, "budget=200MB", "--json")
    assert status == 0, err
    assert any("CUDA" in note for note in json.loads(out)["notes"])
    status, _, err = run(*words, "budget=4 gigs")
    assert (status, "cannot read '4 gigs'" in err) == (2, True)
    status, _, err = run(*words, "budget=10MB")
    assert (status, "the smallest is" in err) == (2, True)


def test_verify_report_and_doctor(run):
    words = ("vgg6", "timesteps=4", "batch=2", "image=3x16x16", "width=0.25")
    status, out, err = run("verify", *words, "strategy=lean:spikes", "--json")
    assert status == 0, err
    verdict = json.loads(out)
    assert verdict["spikes_equal"] is verdict["buffers_equal"] is True
    assert verdict["max_gradient_error"] < 1e-5
    assert verdict["worst"]
    assert "equal" in run("verify", *words, "strategy=lean")[1]
    status, out, err = run("report", *words, "strategy=lean:spikes", "--json")
    assert status == 0, err
    assert json.loads(out)["ratio"] > 1.5
    assert "blocks.1" in run("report", *words, "budget=least")[1]
    status, out, err = run("doctor", *words, "--json")
    assert status == 0, err
    assert json.loads(out)["findings"] == []


def test_compare_and_study(run, recipe, tmp_path):
    status, out, _ = run("compare", str(recipe), "strategies=bptt,checkpoint:1", "--out", "both")
    assert status == 0
    assert "checkpoint:1" in out
    assert "report.html" in out
    rows = json.loads((tmp_path / "both" / "compare.json").read_text())
    keys = {"strategy", "exact", "accuracy", "loss", "peak_bytes", "saved_bytes", "step_seconds", "max_gradient_error"}
    assert [row["strategy"] for row in rows] == ["bptt", "checkpoint:1"]
    assert all(keys <= set(row) for row in rows)
    assert rows[0]["accuracy"] == rows[1]["accuracy"]
    assert rows[1]["max_gradient_error"] < 1e-5

    (tmp_path / "tau.toml").write_text(
        'recipe = "small.toml"\nseeds = [0]\nmemory = false\n'
        '[[variants]]\nname = "short"\nset = { "neuron.tau" = 1.5 }\n'
        '[[variants]]\nname = "long"\nset = { "neuron.tau" = 4.0 }\n'
    )
    status, out, err = run("study", "tau.toml", "--out", "table")
    assert status == 0, err
    assert "short" in out
    assert "long" in out
    assert (tmp_path / "table" / "report.html").is_file()


@pytest.mark.parametrize(
    "what", ["models", "strategies", "neurons", "norms", "surrogates", "data", "encodings", "losses", "backends"]
)
def test_list(run, what):
    status, out, _ = run("list", what, "--json")
    assert status == 0
    rows = json.loads(out)
    assert rows
    assert all(row["name"] for row in rows)
    assert rows[0]["name"].split("(")[0] in run("list", what)[1]


def test_list_without_a_word_and_for_a_model(run):
    assert "strategies" in run("list")[1]
    rows = json.loads(run("list", "strategies", "har_mlp", "--json")[1])
    applies = {row["name"]: row["applies"] for row in rows}
    assert {name for name, text in applies.items() if text == "yes"} == {"bptt", "lean", "checkpoint", "replay"}
    assert "norm=step_bn" in applies["sltt"]
    assert "loss=tet" in applies["sltt"]
    assert "norm='step_bn'" in applies["inverse"], "it says why not, and what to do"
    assert "norm='step_bn'" in applies["integer"]
    words = ("share=layer_channel", "groups=2", "neuron.frac_bits=16")
    rows = json.loads(run("list", "strategies", "har_mlp", *words, "--json")[1])
    applies = {row["name"]: row["applies"] for row in rows}
    wanted = {"bptt", "checkpoint", "step_checkpoint", "replay", "integer"}
    assert "share='none'" in applies["ottt"]
    assert {name for name, text in applies.items() if text == "yes"} == wanted
    assert "share a membrane" in applies["lean"]
    assert "use strategy='integer'" in applies["inverse"]


def test_env(run):
    status, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["torch"] == torch.__version__
    assert facts["backend reference"] == "yes"


MISTAKES = [
    (["trian", "x"], 2, "train"),
    (["profile", "vgg8"], 2, "Did you mean"),
    (["profile", "vgg9", "timestps=3"], 2, "Did you mean timesteps"),
    (["profile", "vgg9", "timesteps"], 2, "key=value"),
    (["profile", "vgg9", "batch=2", "batch=3"], 2, "given twice"),
    (["profile", "vgg9", "timesteps=0"], 2, "at least 1"),
    (["profile", "vgg9", "image=3x4x4"], 2, "at least 8 pixels"),
    (["profile", "vgg9", "strategy=chekpoint"], 2, "Did you mean checkpoint"),
    (["profile", "nowhere:make"], 2, "nowhere"),
    (["train", "missing.toml"], 2, "found none"),
    (["train", "vgg9"], 2, "data.name is missing"),
    (["train", "small.toml", "data=mnist", "root=nothing"], 2, "expected a folder"),
    (["train", "small.toml", "limit=0"], 2, "at least 1 sample"),
    (["train", "small.toml", "lr=fast"], 2, "lr"),
    (["train", "small.toml", "--resume"], 2, "--out"),
    (["train", "small.toml", "lr=3e37", "epochs=3", "--out", "broken"], 2, "expected a finite loss"),
    (["evaluate", "nothing"], 2, "nothing"),
    (["predict", "nothing", "x.npy"], 2, "nothing"),
    (["train", "small.toml", "accelerator=tpu"], 2, "accelerator, devices or precision"),
    (["train", "small.toml", "--out", "small.toml"], 2, "cannot write into small.toml"),
    (["compare", "small.toml", "strategies=bptt,bptt"], 2, "bptt"),
    (["compare", "small.toml", "devices=2"], 2, "train.devices=1"),
    (["compare", "small.toml", "precision=16-mixed"], 2, "train.precision"),
    (["compare", "small.toml", "accelerator=tpu"], 2, "accelerator, devices or precision"),
    (["compare", "small.toml", "--out", "small.toml"], 2, "cannot write into small.toml"),
    (["profile", "vgg9", "precision=16-mixed"], 2, "train.precision"),
    (["profile", "vgg9", "accelerator=cuda"], 2, "train.accelerator"),
    (["study", "missing.toml"], 2, "missing.toml"),
    (["list", "modles"], 2, "Did you mean models"),
    (["list", "models", "vgg9"], 2, "only 'list strategies'"),
    (["list", "strategies", "vgg9", "shar=layer"], 2, "Did you mean share"),
]


@pytest.mark.parametrize(
    ("words", "status", "text"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_mistake_ends_with_one_sentence(run, recipe, tmp_path, words, status, text):
    before = {p.name for p in tmp_path.iterdir()}
    code, out, err = run(*words)
    sentence = [line for line in err.splitlines() if line.startswith("spikefit: ")]
    assert code == status, err
    assert out == ""
    assert len(sentence) == 1
    assert text in sentence[0]
    assert "Traceback" not in err
    left = {p.name for p in tmp_path.iterdir()} - before - {"broken"}
    assert not left, "something half-written is left behind"


def test_a_checkpoint_of_another_model_is_refused(run, recipe):
    assert run("train", str(recipe), "--out", "run", "--json")[0] == 0
    status, _, err = run("evaluate", "run", "hidden=[24]")
    assert status == 2
    assert "(24, 64)" in err or "24" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_anywhere(recipe):
    with pytest.raises(OptionError):
        main(["--debug", "profile", "vgg8"])
    with pytest.raises(OptionError):
        main(["profile", "vgg8", "--debug"])


def test_as_a_program(tmp_path):
    call = [sys.executable, "-c", "from spikefit.cli import main; main()"]
    version = subprocess.run([*call, "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.strip().count(".") == 2
    quick = (
        "import sys; from spikefit.cli import app; sys.argv = ['spikefit', '--help']\n"
        "try: app.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'help loads torch'"
    )
    help_ = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True)
    assert help_.returncode == 0, help_.stderr
    assert "profile" in help_.stdout
