"""The command as a program of its own: where it starts, how it is stopped, and what it prints in several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

MYNET = """
import torch
def make(num_classes=10):
    return torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(64, num_classes))
"""
# -P: as an installed program starts, without the working directory among the places of modules
SPIKEFIT = [sys.executable, "-P", "-m", "spikefit"]
SMALL = ["data=digits", "limit=64", "timesteps=2", "accelerator=cpu"]
TRAIN = ["train", "mlp", "hidden=[8]", *SMALL]


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def run(folder, *words, **options):
    return subprocess.run([*SPIKEFIT, *words], cwd=folder, capture_output=True, text=True, timeout=120, **options)


def test_a_factory_beside_the_command_is_found(tmp_path):
    (tmp_path / "mynet.py").write_text(MYNET)
    done = run(tmp_path, "train", "mynet:make", *SMALL, "epochs=1", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["model"]["name"] == "mynet:make"
    done = run(tmp_path, "evaluate", "run")
    assert done.returncode == 0, done.stderr


def test_no_words_print_the_help(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 10
    assert done.stdout == run(tmp_path, "--help").stdout


@pytest.mark.parametrize(("package", "words"), [("typer", []), ("pydantic", ["list", "recipes"]), ("rich", ["env"])])
def test_a_missing_extra_is_named(tmp_path, package, words):
    code = f"import sys; sys.modules[{package!r}] = None; from spikefit.cli import main; main({words!r})"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.toml").write_text("")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"spikefit: this needs the package {package}; install it with: pip install 'spikefit[train]'."
    ]


def stopped(folder, *words, when):
    """Standard error of a command that gets a SIGINT once `when()` is true."""
    process = subprocess.Popen(
        [*SPIKEFIT, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what runs in the background deaf to SIGINT, and processes inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # a busy machine takes minutes to import and to write two checkpoints
        deadline = time.monotonic() + 300
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("spikefit: ")]


def test_stopped_by_hand_says_what_is_left_and_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    words = [*TRAIN, "epochs=100000", "--out", "run"]
    (line,) = stopped(tmp_path, *words, when=lambda: len(list(out.glob("checkpoint-*"))) > 1)
    saved = line.split(" is saved")[0].removeprefix("spikefit: stopped; ")
    assert (tmp_path / saved / "state.json").is_file()
    assert "the same command with --resume goes on there" in line
    epochs = json.loads((tmp_path / saved / "state.json").read_text())["epoch"]
    again = stopped(tmp_path, *words, "--resume", when=lambda: newest_epoch(out) > epochs)
    assert "is saved" in again[0]


def newest_epoch(out):
    found = sorted(out.glob("checkpoint-*"))
    try:
        return json.loads((found[-1] / "state.json").read_text())["epoch"]
    except OSError:  # replaced by a newer one at this moment
        return 0


def test_stopped_without_a_folder_says_that_nothing_is_saved(tmp_path):
    # long enough to be in the middle of the run, which ends in hours; a busy machine takes longer to get there
    started = time.monotonic()
    run(tmp_path, *TRAIN, "epochs=1")
    once, started = time.monotonic() - started, time.monotonic()
    words = [*TRAIN, "epochs=100000"]
    (line,) = stopped(tmp_path, *words, when=lambda: time.monotonic() - started > 5 + 1.5 * once)
    assert line == "spikefit: stopped; nothing is saved, because there was no --out."


def test_two_processes_print_one_document(tmp_path):
    done = run(tmp_path, *TRAIN, "norm=ws", "epochs=1", "devices=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["train"]["devices"] == 2
