"""A run that was stopped or killed ends where an uninterrupted one ends, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import stop_at

from spikefit.errors import CheckpointError
from spikefit.training import load_checkpoint, load_recipe, train
from spikefit.training.checkpoint import checkpoints

DIGITS = {
    "data": {"name": "digits", "batch_size": 8, "limit": 60, "augment": ["crop:1", "flip"]},
    "encoding": {"name": "rate", "timesteps": 3},
    "model": {"name": "vgg6", "width": 0.1},
    "train": {
        "optimizer": "sgd",
        "lr": 0.05,
        "epochs": 3,
        "ema": 0.9,
        "accumulate": 3,
        "warmup_epochs": 1,
        "checkpoint_every": 2,
    },
}

# Kills itself in the middle of flush number argv[3] (of writing a checkpoint), or trains until it is killed.
SCRIPT = """
import json, os, signal, sys
from spikefit.training import checkpoint, train
flush, left = checkpoint._flush, int(sys.argv[3])
def dying(path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
checkpoint._flush = dying
def say(event):
    print(event.step, flush=True)
train(json.loads(sys.argv[1]), out=sys.argv[2], resume=True, on_progress=say)
"""


def assert_same_run(a, b):
    one, two = load_checkpoint(a), load_checkpoint(b)
    assert one.tensors.keys() == two.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two.tensors[group][name]), f"{group} {name}"
            assert tensor.dtype == two.tensors[group][name].dtype
    for entry, other in zip(one.state["history"], two.state["history"], strict=True):
        assert {**entry, "seconds": 0} == {**other, "seconds": 0}


def test_stopped_again_and_again(tmp_path):
    # 3 updates per epoch: within epochs, at their ends, and before the first checkpoint
    recipe = load_recipe(DIGITS)
    train(recipe, out=tmp_path / "whole")
    for step in (1, 3, 5, 6, 8):
        stop_at(recipe, tmp_path / "torn", step)
    assert [p.name for p in checkpoints(tmp_path / "torn")] == ["checkpoint-00000004", "checkpoint-00000006"]
    record = train(recipe, out=tmp_path / "torn", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    assert record.steps == 9
    again = train(recipe, out=tmp_path / "torn", resume=True)
    assert (again.steps, again.accuracy, again.spike_rates) == (9, record.accuracy, record.spike_rates)
    assert again.step_seconds > 0


def test_stopped_with_dropout_and_adam(tmp_path, sensors):
    values = {**sensors, "model": "har_conv"}
    values["train"] = {**values["train"], "checkpoint_every": 1, "clip_norm": 1.0}
    train(values, out=tmp_path / "whole")
    for step in (2, 4, 7):
        stop_at(values, tmp_path / "torn", step)
    train(values, out=tmp_path / "torn", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def killed(out, *, flush=0, step=0, wait=0.0):
    """Run in another process until it is killed: by itself at a flush, or from outside `wait` s after update `step`."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(DIGITS), str(out), str(flush)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if step and int(line) >= step:
                time.sleep(wait)
                os.kill(process.pid, signal.SIGKILL)
                break
        errors = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, errors


def test_killed_at_any_moment(tmp_path):
    moment = random.Random()
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(DIGITS, out=whole)
    # a checkpoint makes six flushes: three files of tensors, the JSON, the directory, its parent
    flush = moment.randint(7, 12)
    killed(torn, flush=flush)
    assert checkpoints(torn), f"flush {flush}: the checkpoint before is gone"
    wait = moment.uniform(0, 0.05)
    killed(torn, step=5, wait=wait)
    train(DIGITS, out=torn, resume=True)
    assert_same_run(whole, torn)
    assert not [p for p in torn.iterdir() if p.name.startswith(".")]


def test_another_run_is_refused(tmp_path):
    recipe = load_recipe(DIGITS)
    stop_at(recipe, tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"another run; train\.lr was 0\.05 and is 0\.1"):
        train(recipe.override({"lr": "0.1"}), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"another model.*blocks\.0\.synapse\.weight"):
        train(recipe.override({"width": "0.2"}), out=tmp_path, resume=True)
    # how gradients are obtained, and how often a checkpoint is written, may change
    train(recipe.override({"strategy": "checkpoint", "checkpoint_every": "0"}), out=tmp_path, resume=True)
