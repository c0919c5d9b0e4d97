"""Rows as `compare` returns them, made by hand so that every number in a test is known."""

import pytest

LAYERS = (
    ("blocks.0", 320, 9.0),
    ("blocks.1", 9248, 4.0),
    ("blocks.3", 4128, 1.0),
)


def layer(name, parameters, size, keep, rate):
    saved = {"membrane": int(size * keep * 2**20), "spikes": int(size * keep * 2**19)}
    return {
        "name": name,
        "kind": "SpikingConv2d",
        "parameters": parameters,
        "saved_bytes": saved,
        "spike_rate": rate,
        "macs": 27648 * size,
        "synops": 24412.5 * size,
        "energy_pj": 346890.24 * size,
    }


def row(strategy, keep, **changes):
    layers = [layer(*spec, keep, 0.05 * (i + 2)) for i, spec in enumerate(LAYERS)]
    saved = sum(sum(one["saved_bytes"].values()) for one in layers)
    made = {
        "strategy": strategy,
        "exact": True,
        "accuracy": 0.9725,
        "loss": 0.1234,
        "peak_bytes": saved + 3 * 2**20,
        "saved_bytes": saved,
        "predicted_peak_bytes": saved + 4 * 2**20,
        "step_seconds": 0.040 / keep**0.5,
        "max_gradient_error": 0.0,
        "parameters": 13696,
        "history": [
            {"epoch": e, "train_loss": 1.0 / e, "test_loss": 1.1 / e, "test_accuracy": 1 - 0.3 / e, "seconds": 1.0}
            for e in range(1, 6)
        ],
        "layers": layers,
        "rates": {one["name"]: one["spike_rate"] for one in layers},
        "memory_against_T": [
            {"timesteps": T, "saved_bytes": saved * T // 8, "predicted_peak_bytes": saved * T // 8 + 2**22}
            for T in (4, 8, 16, 32)
        ],
        "energy": {
            "snn_pj": 4.9e6,
            "ann_pj": 9.8e6,
            "ratio": 2.0,
            "assumptions": ["no memory traffic", "4.6 pJ per MAC, 0.9 pJ per AC"],
        },
        "settings": {
            "timesteps": 8,
            "batch": 32,
            "reset": "soft reset (detached)",
            "dtype": "float32",
            "device": "cpu",
        },
    }
    return made | changes


@pytest.fixture
def rows():
    return [row("bptt", 1.0), row("checkpoint", 0.25, max_gradient_error=3e-7), row("checkpoint:3", 0.5)]


@pytest.fixture
def report(rows):
    return {
        "title": "Strategies on digits",
        "command": "spikefit compare recipes/demo.toml strategies=bptt,checkpoint --out runs/demo",
        "recipe": {"seed": 0, "data": {"name": "digits", "batch_size": 32}, "neuron": {"name": "lif", "tau": 2.0}},
        "environment": {"python": "3.11.9", "torch": "2.13.0", "spikefit": "0.1.0", "cpus": 2},
        "rows": rows,
    }
