"""Two processes on the CPU share every batch and end with the weights of one."""

import json
import subprocess
import sys

import pytest
import torch

from spikefit.training import load_checkpoint, load_recipe, train

SCRIPT = """
import json, sys
from spikefit.training import train
if __name__ == "__main__":
    record = train(json.loads(sys.argv[1]), out=sys.argv[2])
    print(record.accuracy)
"""


@pytest.mark.parametrize("strategy", ["bptt", "lean:spikes"])
def test_two_processes(strategy, small, tmp_path):
    # 33 samples: the last batch has one, so that one process has no row of it; no statistics of batches
    options = {"norm": "ws", "limit": "33", "accelerator": "cpu", "encoding": "rate", "ema": "0.5", "lr": "0.5"}
    recipe = small(**options, accumulate="2", strategy=strategy)
    alone = train(recipe, out=tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    both = recipe.override({"devices": "2"})
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(both.to_dict()), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    one, two = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    for group in ("model", "ema"):
        for name, tensor in one.tensors[group].items():
            torch.testing.assert_close(two.tensors[group][name], tensor, rtol=1e-3, atol=1e-4)
    record = json.loads((tmp_path / "two" / "record.json").read_text())
    assert record["accuracy"] == alone.accuracy
    assert abs(record["history"][-1]["train_loss"] - alone.history[-1]["train_loss"]) < 1e-3
    assert load_recipe(record["recipe"]).train.devices == 2
