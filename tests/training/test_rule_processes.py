"""Two processes that train by a rule end with the weights of one, by one message of gradients per update."""

import json
import subprocess
import sys

import pytest
import torch
from runs import weights

from spikefit.training import train

SCRIPT = """
import json, sys, warnings
import torch
from pathlib import Path
from spikefit.training import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    true, sizes = torch.distributed.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return true(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    for name, recipe in jobs.items():
        sizes.clear()
        train(recipe, out=out / name)
        if torch.distributed.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(sizes))
"""
# how it is written, its loss, and how often weights move in 3 batches of 3 steps
RULES = {
    "sltt": ({"strategy": "sltt"}, "tet", 3),
    "sltt_k": ({"strategy": "sltt_k:2"}, "tet", 3),
    "ottt": ({"strategy": "ottt"}, "ce_steps", 3),
    "lean": ({"strategy": "ottt", "strategy.inside": "lean:spikes"}, "tet", 3),
    "tbptt": ({"strategy": "tbptt:2"}, "tet", 3),
    "rate": ({"strategy": "rate"}, "ce_mean", 3),
    "accumulated": ({"strategy": "ottt", "accumulate": "2"}, "tet", 2),
    "each step": ({"strategy": "sltt", "strategy.update_every": "step"}, "tet", 9),
    "some steps": (
        {"strategy": "sltt_k", "strategy.sampler": "every", "strategy.update_every": "step", "seed": "3"},
        "tet",
        None,
    ),
}
# where OTTT has the gradient of BPTT: one time step, and one spiking layer in front of a read-out without a membrane
EXACT = {
    f"{where}, {strategy}": ({"strategy": strategy, **changes}, "ce_steps")
    for where, changes in {"one step": {"timesteps": "1"}, "one layer": {"hidden": "[8]", "timesteps": "4"}}.items()
    for strategy in ("bptt", "ottt")
}


def recipe_of(small, changes, loss):
    # batches of 7, 7 and 1: four rows here and three there, then one row here and none there
    base = {"limit": "15", "batch": "7", "epochs": "1", "encoding": "rate", "timesteps": "3", "norm": "ws"}
    settings = {"lr": "0.5", "momentum": "0.5", "schedule": "constant", "precision": "64-true", "accelerator": "cpu"}
    return small(**base, **settings, loss=loss).override(changes)


@pytest.fixture
def both(small, tmp_path):
    """Folder with the runs of two processes."""
    script, folder = tmp_path / "script.py", tmp_path / "two"
    script.write_text(SCRIPT)
    folder.mkdir()
    cases = {name: case[:2] for name, case in RULES.items()} | EXACT
    jobs = {name: recipe_of(small, *case).override({"devices": "2"}).to_dict() for name, case in cases.items()}
    command = [sys.executable, str(script), json.dumps(jobs), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_end_with_the_weights_of_one(small, both, tmp_path):
    for name, (*case, updates) in RULES.items():
        recipe = recipe_of(small, *case)
        record = train(recipe, out=tmp_path / "one" / name)
        start = train(recipe.override({"lr": "1e-12"}), out=tmp_path / "start" / name)
        one, two, before = (weights(folder / name) for folder in (tmp_path / "one", both, tmp_path / "start"))
        moved = {key: float((t - before[key]).abs().max()) for key, t in one.items()}
        assert max(moved.values()) > 1e-3, name
        # the gain reaches its weight through the leaf of the standardised weight
        assert moved["blocks.1.synapse.gain"] > 1e-4, name
        # the loss is a float32
        for key, tensor in one.items():
            torch.testing.assert_close(
                two[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name, k=key: f"{n}, {k}: {m}"
            )
        losses = [
            json.loads((f / "record.json").read_text())["history"][0] for f in (tmp_path / "one" / name, both / name)
        ]
        assert losses[1]["train_loss"] == pytest.approx(losses[0]["train_loss"], rel=1e-5), name
        assert start.parameters == record.parameters
        sizes = json.loads((both / f"{name}.json").read_text())
        # evaluation and losses send a few numbers
        messages = [size for size in sizes if size > 10]
        # gradients, and for each parameter whether it has one; these networks have no buffers
        assert set(messages) == {record.parameters + len(one)}, name
        # without chance in how many, one message per update and nothing else but losses
        if updates is not None:
            assert len(messages) == updates, name
        assert 2 <= len(messages) <= 9
        assert sizes.count(1) >= record.steps, name
    for where in ("one step", "one layer"):
        exact, rule = (weights(both / f"{where}, {strategy}") for strategy in ("bptt", "ottt"))
        for key, tensor in exact.items():
            torch.testing.assert_close(
                rule[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, k=key, w=where: f"{w}, {k}: {m}"
            )
