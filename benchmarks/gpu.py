"""Benchmarks for a CUDA machine: LIF parity, kernel time over the bandwidth floor, memory per strategy, a training.

    python benchmarks/gpu.py [--quick] [--out FILE]

Needs torch with CUDA and Triton and nothing else beside this package. Ends within 8 minutes: once `--minutes` are over
the remaining parts are skipped, with a line that says so. Parity comes first: with a red one no time is printed and the
exit status is 1.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from harness import ROOT, describe, write
from torch import Tensor
from torch.nn import functional as F

from spikefit import create_model
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.surrogate import parse_surrogate

DEVICE = "cuda"
EQUATIONS: dict[str, dict[str, Any]] = {
    "soft": {},
    "soft, rest": {"v_rest": 0.25},
    "hard": {"v_reset": 0.0},
    "hard, level, rest": {"v_reset": -0.25, "v_rest": 0.125},
    "none": {"reset": False},
}
SURROGATES = ("atan(2)", "triangle(1)", "rect(1)", "sigmoid(4)", "fast_sigmoid(25)")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
STRATEGIES = ("bptt", "checkpoint")


def dyadic(*shape: int) -> Tensor:
    """Random multiples of 1/16 in [-1, 2): sums are exact, so rounding flips no spike."""
    return torch.randint(-16, 32, shape, device=DEVICE) / 16


def run_lif(backend: str, x: Tensor, v_0: Tensor, g: Tensor, **options: Any) -> list[Tensor]:
    """[spikes, v_T, dx, dv_0, d(leak), d(gain), d(threshold)]."""
    s, v_T = lif(x, v_0, gain=0.75, backend=backend, **options)  # type: ignore[arg-type]
    return [s, v_T, *lif_backward(g, torch.ones_like(v_0), x, v_0, gain=0.75, backend=backend, **options)]


def parity() -> dict[str, str]:
    """What differs between compiled Triton and the reference, by case; empty if nothing does."""
    wrong = {}
    for dtype, tolerance in TOLERANCE.items():
        for equation, options in EQUATIONS.items():
            for surrogate in SURROGATES if equation == "soft" else SURROGATES[:1]:
                for detach in (True, False):
                    for shape in ((1, 3, 40), (8, 2, 5, 33), (16, 4, 1000)):
                        x, v_0 = dyadic(*shape).to(dtype), torch.zeros(shape[1:], device=DEVICE)
                        g = torch.randn(shape, device=DEVICE).to(dtype)
                        case = dict(options, detach_reset=detach, surrogate=parse_surrogate(surrogate))
                        got, want = (run_lif(backend, x, v_0, g, **case) for backend in ("triton", "reference"))
                        name = f"{dtype} {equation} {surrogate} detach={detach} {shape}"
                        if not torch.equal(got[0], want[0]):
                            wrong[name] = f"{int((got[0] != want[0]).sum())} spikes"
                            continue
                        for a, b in zip(got[1:], want[1:], strict=True):
                            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
                            if not error <= tolerance:
                                wrong[name] = f"error {error.item():.1e}"
    return wrong


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median device time of `run`, by CUDA events, after three calls that compile and warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), rounds) * 1e3


def lif_times(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict[str, tuple[float, int]]:
    """(milliseconds, bytes that must move) of the LIF forward and backward.

    Forward reads x and writes s; backward reads g and x and writes dx; each also reads and writes one membrane.
    """
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    g, v_0 = torch.randn_like(x), torch.zeros(shape[1:], device=DEVICE, requires_grad=True)
    s, _ = lif(x, v_0, backend="triton")

    def forward() -> None:
        with torch.no_grad():
            lif(x, v_0, backend="triton")

    def backward() -> None:
        torch.autograd.grad(s, (x, v_0), g, retain_graph=True)

    return {
        "forward": (milliseconds(forward, rounds), 2 * x.nbytes + 2 * v_0.nbytes),
        "backward": (milliseconds(backward, rounds), 3 * x.nbytes + 2 * v_0.nbytes),
    }


def kernels(rounds: int) -> dict[str, Any]:
    """LIF against the floor: the bytes that must move over the bandwidth of a large copy."""
    bandwidth, rows = copy_bandwidth(rounds), []
    for shape in ((8, 16, 128, 32, 32), (4, 64, 256, 32, 32), (64, 32, 4096), (128, 16, 512)):
        for dtype in (torch.float32, torch.bfloat16):
            for name, (ms, moved) in lif_times(shape, dtype, rounds).items():
                floor = moved / bandwidth * 1e3
                rows.append({"shape": shape, "dtype": str(dtype), "pass": name, "ms": ms, "floor_ms": floor})
                print(f"  lif {name:<9}{shape!s:<24}{str(dtype)[6:]:<9}{ms:8.3f} ms   {ms / floor:5.2f} x floor")
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


def training_step(net: torch.nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Forward, cross-entropy of the mean logits, backward, update; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(x).mean(0), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def memory(rounds: int, over: Callable[[], bool]) -> list[dict[str, Any]]:
    """Peak allocated bytes, step time and first loss of a training step, per model, precision and strategy."""
    rows: list[dict[str, Any]] = []
    for model, T, batch in (("vgg6", 8, 64), ("resnet19", 4, 32)):
        for precision in ("float32", "bfloat16"):
            for strategy in STRATEGIES:
                if over():
                    print(f"  {model} {precision} {strategy}: skipped, the time is over")
                    continue
                torch.manual_seed(0)
                net = create_model(model, strategy=strategy).to(DEVICE)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
                image = torch.randn(batch, 3, 32, 32, device=DEVICE)
                x, labels = image.expand(T, *image.shape), torch.randint(10, (batch,), device=DEVICE)

                def step(net=net, x=x, labels=labels, optimizer=optimizer, precision=precision) -> Tensor:
                    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
                        return training_step(net, x, labels, optimizer)

                first = step().item()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
                row = {"model": model, "T": T, "batch": batch, "precision": precision, "strategy": strategy}
                row |= {"first_loss": first, "peak_bytes": peak, "level_bytes": before}
                row["ms"] = milliseconds(step, rounds)
                rows.append(row)
                measured = f"peak {peak / 2**20:9.1f} MiB  step {row['ms']:8.1f} ms  first loss {first:.5f}"
                print(f"  {model:<9}{precision:<9}{strategy:<11}{measured}")
                del net, optimizer, step
                torch.cuda.empty_cache()
    return rows


def training(steps: int) -> dict[str, Any]:
    """A short training of vgg6 on ten images with noise; the last losses must lie well below the first."""
    torch.manual_seed(0)
    prototypes = torch.randn(10, 3, 32, 32, device=DEVICE)
    net = create_model("vgg6", width=0.25).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        labels = torch.randint(10, (32,), device=DEVICE)
        image = prototypes[labels] + 0.5 * torch.randn(32, 3, 32, 32, device=DEVICE)
        losses.append(training_step(net, image.expand(4, *image.shape), labels, optimizer).item())
    seconds, tenth = time.perf_counter() - start, max(1, steps // 10)
    before, after = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"  training: loss {before:.3f} -> {after:.3f} in {steps} steps, {seconds:.1f} s")
    return {"losses": losses, "seconds": seconds, "learned": math.isfinite(after) and after < 0.7 * before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no further part after this time")
    parser.add_argument("--out", help="JSON file to write; default benchmarks/results/gpu_<date>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: expected a CUDA device, found none; run benchmarks/run.py for the CPU benchmarks.")
        return 2
    stop = time.monotonic() + 60 * args.minutes
    out = args.out or str(ROOT / "benchmarks" / "results" / f"gpu_{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json")
    rounds = 5 if args.quick else 20

    wrong = parity()
    record = describe("gpu") | {"parity": not wrong}
    if wrong:
        print(
            f"gpu: RED, no times: {len(wrong)} LIF cases differ from the reference, first {next(iter(wrong.items()))}."
        )
        write(record | {"disagreements": wrong}, out)
        return 1
    print(f"gpu: compiled LIF equals the reference; {torch.cuda.get_device_name()}")
    record["kernels"] = kernels(rounds)
    record["memory"] = memory(rounds, lambda: time.monotonic() > stop)
    first: dict[tuple[str, str], float] = {}
    for row in record["memory"]:
        key = (row["model"], row["precision"])
        if not abs(row["first_loss"] / first.setdefault(key, row["first_loss"]) - 1) <= 1e-5:
            print(f"gpu: RED, strategy {row['strategy']} of {key} has another first loss than {STRATEGIES[0]}.")
            record["parity"] = False
    if time.monotonic() < stop:
        record["training"] = training(100 if args.quick else 300)
        record["parity"] &= record["training"]["learned"]
    else:
        print("  training: skipped, the time is over")
    write(record, out)
    return 0 if record["parity"] else 1


if __name__ == "__main__":
    sys.exit(main())
