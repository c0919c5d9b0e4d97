"""Bytes of a training step against T and against depth, row by row, for `gradient_rules.py`."""

import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import linear_regression
from typing import Any

import torch
from rules_rows import ROWS, STEPS, VGG6, driver_of, zoo
from torch.utils._pytree import tree_leaves

from spikefit.errors import RuleWarning, SpikefitError
from spikefit.losses import create_loss
from spikefit.planning import predicted_bytes, saved_bytes
from spikefit.planning.measured import measured_peak_bytes_of
from spikefit.planning.memory import reliability
from spikefit.reporting.units import MIB

LENGTHS, BATCH = (4, 16, 64, 256), 4
# no fresh process for a step that would take more
LIMIT = 6 << 30
# RevSResNet of one stage: (blocks, T), both ways from the middle one
DEEP = ("bptt", "sltt", "sltt over reversible")
SIZES = ((2, 16), (6, 16), (10, 16), (6, 4), (6, 64))
BYTES = {"saved": "saved_bytes", "predicted peak": "predicted_peak_bytes", "peak": "measured_peak_bytes"}

Row = dict[str, Any]


def memory(quick: bool, processes: int, measure_to: int) -> dict[str, Any]:
    """Rows of bytes and their slopes in bytes per step; `processes` rows at a time, with one thread each.

    Peaks are measured up to T = `measure_to`, where a step is predicted to stay below `LIMIT`.
    """
    networks = {"vgg6": VGG6 | {"width": 0.125 if quick else 0.5}, "har_mlp": {}}
    lengths = LENGTHS[:2] if quick else LENGTHS
    jobs = [(name, options, T, row) for name, options in networks.items() for row in ROWS for T in lengths]
    # the longest first, so that no process is left alone with one at the end
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i][2])
    context = multiprocessing.get_context("spawn")
    found: dict[int, Row] = {}
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quietly_alone) as pool:
        results = pool.map(partial(_measure, measure_to), [jobs[i] for i in order])
        for i, row in zip(order, results, strict=True):
            found[i] = row
            told = ", ".join(f"{name} {row[key] / MIB:,.2f}" for name, key in BYTES.items() if key in row)
            print(f"  {row['network']:<8} {row['row']:<24} T = {row['timesteps']:<4} MiB: {told}", flush=True)
    rows = [found[i] for i in range(len(jobs))]
    refused = {f"{r['row']}, {r['network']}, T = {r['timesteps']}": r["refused"] for r in rows if "refused" in r}
    slopes: dict[str, dict[str, Row]] = {
        name: {row: _slopes([r for r in rows if (r["network"], r["row"]) == (name, row)]) for row in ROWS}
        for name in networks
    }
    for name, by_row in slopes.items():
        for row, slope in by_row.items():
            print(f"  {name:<8} {row:<24} bytes per step: " + ", ".join(f"{k} {v:,.0f}" for k, v in slope.items()))
    ratios = {
        f"{name}: saved per step, {row} / bptt": by_row[row]["saved"] / by_row["bptt"]["saved"]
        for name, by_row in slopes.items()
        for row in ("sltt", "ottt", "rate")
        if "saved" in by_row[row]
    }
    targets = {name: "0" for name in ratios if name.startswith("vgg6")}
    made = {"memory": rows, "slopes": slopes, "ratios": ratios, "targets": targets, "unmeasured": refused}
    return made | {"depth": against_depth(quick)}


def against_depth(quick: bool) -> list[Row]:
    """Bytes held for backward by rows over streams in depth, and those of membranes, which a forward keeps anyway."""
    options: dict[str, Any] = {"width": 0.125 if quick else 0.5, "input_shape": (3, 32, 32)}
    rows: list[Row] = []
    for row in DEEP:
        for blocks, timesteps in SIZES:
            network = zoo("revsresnet21", timesteps, BATCH, blocks=(blocks,), **options)
            model, driver = network.make(), driver_of(row, timesteps)
            state = model.init_state(BATCH, model.input_shape)
            driver.apply(model)
            held = saved_bytes(model, network.x, network.y, loss=create_loss(ROWS.get(row, STEPS)), driver=driver)
            membranes = sum(v.numel() * v.element_size() for v in tree_leaves(state) if isinstance(v, torch.Tensor))
            size = {"blocks": blocks, "timesteps": timesteps}
            rows.append({"row": row, **size, "saved_bytes": held.total, "membrane_bytes": membranes})
            print(f"  {row:<22} n = {blocks:<3} T = {timesteps:<4} held {held.total / MIB:,.2f} MiB", flush=True)
    return rows


def slope_of(points: Sequence[tuple[int, int]]) -> float:
    """Slope of a least-squares line."""
    sizes, values = zip(*points, strict=True)
    return linear_regression(sizes, values).slope


def _quietly_alone() -> None:
    warnings.simplefilter("ignore", RuleWarning)
    torch.set_num_threads(1)


def _measure(measure_to: int, job: tuple[str, dict[str, Any], int, str]) -> Row:
    name, options, timesteps, row = job
    network, loss = zoo(name, timesteps, BATCH, **options), create_loss(ROWS[row])
    model, driver = network.make(), driver_of(row, timesteps)
    made: Row = {"network": name, "row": row, "loss": ROWS[row], "timesteps": timesteps, "batch": BATCH}
    made["input_bytes"] = network.x.untyped_storage().nbytes()
    try:
        driver.apply(model)
        found = predicted_bytes(model, network.x, network.y, loss=loss, driver=driver)
        made |= {"saved_bytes": found.saved.total, "predicted_peak_bytes": found.peak}
        made["prediction"] = reliability(network.x, found, autocast=False, driver=driver)
        if timesteps <= measure_to and found.peak <= LIMIT:
            made["measured_peak_bytes"] = measured_peak_bytes_of(model, network.x, network.y, loss, driver=driver)
    except SpikefitError as error:
        made["refused"] = str(error)
    return made


def _slopes(rows: list[Row]) -> dict[str, float]:
    """Bytes per step of a least-squares line, of all that is known at two lengths or more."""
    found = {}
    for name, key in BYTES.items():
        points = [(r["timesteps"], r[key]) for r in rows if key in r]
        if len(points) > 1:
            found[name] = slope_of(points)
    return found
