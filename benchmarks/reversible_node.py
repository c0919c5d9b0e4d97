"""The two-group node under bptt, generic and streamlined: bytes kept, errors of the gradient, and seconds.

Bytes: what saved-tensor hooks see between forward and backward, on the reference backend, per neuron of the whole
sequence. "states" leaves out the outputs y, which the next layer keeps anyway; "outputs, reversed" counts them on the
reversed side alone, "outputs, both" on both; "against kernels" compares with bptt on compiled kernels, which keep one
value per neuron and step whatever the reset. A layer is the difference between chains of three and two conv-norm-node
layers, so an input is counted once. Every row names T, reset mode, dtype (the same on both sides), alpha, kappa and the
distance of anchors, and carries the error of the gradient of the node against bptt in the same dtype:

    max    largest |difference| over the largest |gradient|
    rms    length of the difference over the length of the gradient
    off    inputs whose gradient is wrong by more than 1 % of the largest: a spike came back wrong

"large" rows look for such spikes among many neurons: they are rare, and near the threshold any rounding makes one.

Seconds: 2^21 neurons in float32, all in turns in one process, forward and backward apart; numba and reference each
against itself. No number is printed unless outputs are equal bit for bit and float64 gradients agree to 1e-12.

Nodes run with check="off", so that wrong spikes can be counted instead of refused.

    python benchmarks/reversible_node.py [--quick] [--threads 2] [--out benchmarks/results/FILE.json]
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import describe, ratio, write
from torch import Tensor

from spikefit import SpikingNetwork, use_backend, use_strategy
from spikefit.layers import GlobalAveragePool, Readout, SpikingConv2d
from spikefit.ops.node import Reversal, two_group
from spikefit.ops.node.equation import TwoGroups, forward_multiplier, reverse_growth, reverse_multiplier, safe_steps
from spikefit.ops.surrogate import atan
from spikefit.planning import watch_saved

STRATEGIES = ("bptt", "generic", "streamlined")
BACKENDS = ("numba", "reference")
RESETS: dict[str, dict[str, Any]] = {
    "hard, attached": {"v_reset": 0.0, "detach_reset": False},
    "hard, detached": {"v_reset": 0.0, "detach_reset": True},
    "soft": {"v_reset": None, "detach_reset": False},
}
# (T, dtype, alpha, kappa, distance of anchors or None)
SETTINGS = [
    (4, torch.float32, 0.4, 0.5, None),
    (8, torch.float32, 0.4, 0.5, 4),
    (20, torch.float32, 0.4, 0.5, 4),
    (64, torch.float32, 0.4, 0.5, 4),
    (20, torch.float64, 0.5, 0.5, None),
    (20, torch.float32, 0.8, 0.8, None),
    (20, torch.float32, 0.8, 0.9, None),
    (20, torch.float32, 0.9, 0.9, None),
    (29, torch.float32, 0.8, 0.9, None),
    (46, torch.float32, 0.9, 0.9, None),
    (64, torch.float32, 0.8, 0.9, 20),
]
GROWTHS = [
    *((alpha, 0.5) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)),
    (0.6, 0.6), (0.7, 0.7), (0.8, 0.8), (0.6, 0.8), (0.9, 0.9), (0.8, 0.9), (0.7, 0.9), (0.6, 0.9),
]  # fmt: skip
# (T, neurons, dtype, alpha, kappa, distance of anchors)
LARGE = [
    (4, 2**21, torch.float32, 0.4, 0.5, 1),
    (4, 2**21, torch.float32, 0.4, 0.5, 4),
    (20, 2**19, torch.float32, 0.4, 0.5, 4),
    (20, 2**19, torch.float32, 0.8, 0.9, None),
    (20, 2**19, torch.float32, 0.9, 0.9, None),
    (20, 2**19, torch.float64, 0.5, 0.5, None),
]
CLAIM, FASTER = 58.65, 0.25
# Largest error of the gradient with which a ratio counts as reached safely.
SAFE_ERROR = 1e-5


def currents(T: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random currents that make about a third of the neurons fire."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, *shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5).to(dtype)


def reversal(strategy: str, every: int | None) -> Reversal | None:
    """What `two_group` takes for a strategy."""
    return None if strategy == "bptt" else Reversal(strategy, every)  # type: ignore[arg-type]


def gradient(strategy: str, backend: str, x: Tensor, every: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(outputs, dL/dx) for a fixed random dL/dy; wrong spikes are counted here, not refused."""
    leaf = x.detach().requires_grad_()
    how = reversal(strategy, every)
    y, _ = two_group(leaf, reversal=how, check="off", backend=backend, **options)  # type: ignore[arg-type]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (dx,) = torch.autograd.grad(y, leaf, g)
    return y.detach(), dx


def disagreement() -> str | None:
    """What differs between strategies and backends, or None."""
    for reset, options in RESETS.items():
        x = currents(4, 4, 32, 16, dtype=torch.float64)
        y, wanted = gradient("bptt", "reference", x, **options)
        for backend in BACKENDS:
            for strategy in STRATEGIES:
                got, dx = gradient(strategy, backend, x, **options)
                error = float((dx - wanted).abs().max() / wanted.abs().max())
                if not torch.equal(got, y) or error > 1e-12:
                    return f"{strategy} on {backend}, {reset}: gradients differ by {error:.1e}, or outputs differ"
    return None


def saved_by(forward: Callable[[], object]) -> int:
    """Bytes that autograd holds after `forward()`, each storage once."""
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(t.untyped_storage().nbytes() for t in held.values())
    del result
    return total


def node_row(T: int, dtype: torch.dtype, alpha: float, kappa: float, every: int | None, reset: str) -> dict[str, Any]:
    """Bytes and ratios of one node, and the error of its gradient."""
    options = RESETS[reset] | {"alpha": alpha, "kappa": kappa}
    x = currents(T, 2, 32, 64, dtype=dtype)
    leaf, neurons = x.clone().requires_grad_(), x[0].numel()
    plain, kept = (
        saved_by(lambda r=r: two_group(leaf, reversal=r, check="off", backend="reference", **options))
        for r in (None, Reversal("streamlined", every))
    )
    kernels = saved_by(lambda: two_group(leaf, backend="numba", **options))
    states = kept - x.nbytes
    _, wanted = gradient("bptt", "numba", x, **options)
    _, dx = gradient("streamlined", "numba", x, every, **options)
    difference = (dx - wanted).abs()
    node = TwoGroups.make(
        alpha=alpha, beta=0.5, kappa=kappa, v_threshold=1.0, v_reset=0.0, detach_reset=False, surrogate=atan(2)
    )
    undone = min(T, every or T)
    return {
        "T": T,
        "reset": reset,
        "dtype": str(dtype).removeprefix("torch."),
        "alpha": alpha,
        "kappa": kappa,
        "anchor_every": every,
        "rho^K eps": reverse_growth(undone, node, dtype),
        "safe K": safe_steps(node, dtype),
        "bytes per neuron": {"bptt": plain / neurons, "states": states / neurons, "outputs": x.nbytes / neurons},
        "ratio": {
            "states": plain / states,
            "states, against kernels": kernels / states,
            "outputs, reversed": plain / kept,
            "outputs, both": (plain + x.nbytes) / kept,
        },
        "error": {
            "max": float(difference.max() / wanted.abs().max()),
            "rms": float(difference.norm() / wanted.norm()),
            "off": int((difference > 0.01 * wanted.abs().max()).sum()),
            "inputs": x.numel(),
        },
    }


def layer_row(T: int, every: int, reset: str) -> dict[str, Any]:
    """Bytes of one more conv-norm-node layer in a chain, per neuron and step, and their ratio."""
    held: dict[str, float] = {}
    for strategy in ("bptt", f"streamlined:{every}"):
        counts = []
        for units in (2, 3):
            options = {"name": "two_group", "check": "off", **RESETS[reset]}
            blocks = [SpikingConv2d(32, 32, neuron=dict(options)) for _ in range(units)]
            net = SpikingNetwork([*blocks, GlobalAveragePool(), Readout(32, 10)], input_shape=(32, 8, 8))
            use_strategy(net, strategy)
            with use_backend("reference"), watch_saved(net) as saved:
                net(currents(T, 4, 32, 8, 8))
            counts.append(saved.total)
        held[strategy] = (counts[1] - counts[0]) / (T * 4 * 32 * 64)
    bptt, ours = held.values()
    return {
        "T": T,
        "reset": reset,
        "dtype": "float32",
        "anchor_every": every,
        "bytes per neuron and step": {"bptt": bptt, "streamlined": ours},
        "ratio": bptt / ours,
    }


def growth_row(alpha: float, kappa: float) -> dict[str, float]:
    """How far a node runs backwards: rho, forward multiplier, safe K, and 3 K, what hard attached resets save."""
    node = TwoGroups.make(
        alpha=alpha, beta=0.5, kappa=kappa, v_threshold=1.0, v_reset=0.0, detach_reset=False, surrogate=atan(2)
    )
    k = {str(d).removeprefix("torch."): safe_steps(node, d) for d in (torch.float32, torch.float64)}
    return {
        "alpha": alpha,
        "kappa": kappa,
        "rho": reverse_multiplier(alpha, kappa),
        "forward": forward_multiplier(alpha, kappa),
        **{f"K {d}": v for d, v in k.items()},
        **{f"3 K {d}": 3 * v for d, v in k.items()},
    }


def large_row(
    T: int, neurons: int, dtype: torch.dtype, alpha: float, kappa: float, every: int | None
) -> dict[str, Any]:
    """How often a spike comes back wrong, on many neurons: inputs with a wrong gradient (hard reset, attached)."""
    options = {"alpha": alpha, "kappa": kappa}
    x = currents(T, 32, neurons // 32, dtype=dtype)
    _, wanted = gradient("bptt", "numba", x, **options)
    _, dx = gradient("streamlined", "numba", x, every, **options)
    difference, largest = (dx - wanted).abs(), wanted.abs().max()
    off = int((difference > 0.01 * largest).sum())
    return {
        "T": T,
        "neurons": neurons,
        "dtype": str(dtype).removeprefix("torch."),
        "alpha": alpha,
        "kappa": kappa,
        "anchor_every": every,
        "off": off,
        "off per million": 1e6 * off / x.numel(),
        "max": float(difference.max() / largest),
        "rms": float(difference.norm() / wanted.norm()),
    }


def times(T: int, neurons: int, backend: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward, backward and total of each strategy, one entry per round; all in turns."""
    x = currents(T, 32, 64, neurons // 2048).requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {f"{s} {p}": [] for s in STRATEGIES for p in ("forward", "backward", "total")}
    for i in range(-1, rounds):
        shift = i % len(STRATEGIES)
        for strategy in STRATEGIES[shift:] + STRATEGIES[:shift]:
            start = time.perf_counter()
            how = reversal(strategy, 4)
            y, _ = two_group(x, reversal=how, check="off", backend=backend)  # type: ignore[arg-type]
            middle = time.perf_counter()
            torch.autograd.grad(y, x, g)
            end = time.perf_counter()
            del y
            if i >= 0:
                parts = {"forward": middle - start, "backward": end - middle, "total": end - start}
                for part, value in parts.items():
                    seconds[f"{strategy} {part}"].append(value)
    return seconds


def timed(quick: bool) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """(seconds, ratios, targets) of all timings."""
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    targets: dict[str, str] = {}
    neurons = 2**18 if quick else 2**21
    for T in (4,) if quick else (4, 8):
        for backend in BACKENDS:
            found = times(T, neurons, backend, 3 if quick else 11 if backend == "numba" else 5)
            seconds |= {f"{backend} T={T} {name}": values for name, values in found.items()}
            for part in ("backward", "total"):
                name = f"{backend} T={T} {part}: streamlined / generic"
                ratios[name] = ratio(found, f"streamlined {part}", f"generic {part}")
                if backend == "numba" and part == "backward":
                    targets[name] = f"<= {1 - FASTER}"
            ratios[f"{backend} T={T} total: streamlined / bptt"] = ratio(found, "streamlined total", "bptt total")
    seconds["ours"] = seconds["numba T=4 streamlined total"]
    return seconds, ratios, targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2^18 neurons, T = 4, 3 rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    record = describe("reversible_node")
    wrong = disagreement()
    record |= {"parity": wrong is None}
    if wrong is not None:
        print(f"reversible_node: RED, no numbers: {wrong}.")
        write(record | {"disagreement": wrong}, args.out)
        return 1
    print(f"reversible_node: outputs equal, float64 gradients agree to 1e-12; threads {args.threads}")
    nodes = [node_row(*setting, reset) for setting in SETTINGS for reset in RESETS]
    layers = [layer_row(T, 4, reset) for T in (4, 8, 20) for reset in RESETS]
    seconds, ratios, targets = timed(args.quick)
    safe = [r for r in nodes if r["rho^K eps"] <= 1e-3 and r["error"]["max"] <= SAFE_ERROR]
    best = max(safe, key=lambda r: r["ratio"]["states"])
    ratios["bytes of a node: bptt / states, safe, best"] = best["ratio"]["states"]
    targets["bytes of a node: bptt / states, safe, best"] = f">= {CLAIM}"
    record |= {
        "growth": [growth_row(*pair) for pair in GROWTHS],
        "nodes": nodes,
        "layers": layers,
        "large": [large_row(T, n // 8 if args.quick else n, *rest) for T, n, *rest in LARGE],
        "seconds": seconds,
        "ratios": ratios,
        "targets": targets,
    }
    write(record, args.out)
    for row in nodes:
        ratios_of, error = row["ratio"], row["error"]
        print(
            f"  T={row['T']:<3} {row['reset']:<15} {row['dtype']} alpha {row['alpha']:g} kappa {row['kappa']:g} "
            f"K={row['anchor_every']!s:<5} states {ratios_of['states']:5.1f} "
            f"(kernels {ratios_of['states, against kernels']:4.1f})  with y {ratios_of['outputs, reversed']:5.2f}"
            f"  error {error['max']:.0e} rms {error['rms']:.0e} off {error['off']}"
        )
    for row in layers:
        print(f"  layer T={row['T']:<3} {row['reset']:<15} K={row['anchor_every']}  {row['ratio']:.2f}")
    for row in record["large"]:
        print("  large", ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
