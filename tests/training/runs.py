"""Runs of tests: stopped at a step, and the weights that one left behind."""

import pytest

from spikefit.training import load_checkpoint, train


def weights(out, group="model"):
    return load_checkpoint(out).tensors[group]


class Stop(Exception):
    pass


def stop_at(recipe, out, step):
    """Train until update `step` has been made, then fall over."""

    def listen(event):
        if event.kind == "step" and event.step == step:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, out=out, resume=True, on_progress=listen)
