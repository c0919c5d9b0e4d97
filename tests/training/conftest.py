"""Small recipes that train in a moment."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from spikefit.training import load_recipe

SMALL = {
    "data": {"name": "digits", "batch_size": 16, "limit": 40},
    "encoding": {"name": "repeat", "timesteps": 3},
    "model": {"name": "mlp", "hidden": [16]},
    "train": {"optimizer": "sgd", "lr": 0.05, "epochs": 2},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Tiny networks gain nothing from threads, and waiting for each other takes long on a machine that is busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = [(torch.get_num_threads, torch.set_num_threads)]
    if find_spec("numba"):
        import numba

        settings.append((numba.get_num_threads, numba.set_num_threads))
    before = [get() for get, _ in settings]
    for _, put in settings:
        put(1)
    yield
    for (_, put), count in zip(settings, before, strict=True):
        put(count)


@pytest.fixture
def small():
    """Makes the recipe of a tiny run; arguments are changes in the key=value grammar, with __ for a dot."""
    return lambda **changes: load_recipe(SMALL).override({k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def sensors(tmp_path):
    """Sections data, encoding and train of a recipe on two classes of waves with 3 channels and 16 steps."""
    random = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 40), ("test", 12)):
        y = np.arange(count) % 2
        wave = np.sin(np.arange(16)[None, :, None] * (0.5 + y[:, None, None]) + np.arange(3))
        content[f"x_{split}"] = (wave + 0.1 * random.standard_normal(wave.shape)).astype(np.float32)
        content[f"y_{split}"] = y
    np.savez(tmp_path / "sensors.npz", **content)
    data = {"name": "npz", "root": str(tmp_path), "file": "sensors.npz", "batch_size": 8}
    return {"data": data, "encoding": {"name": "sequence"}, "train": {"epochs": 2, "lr": 0.01}}
