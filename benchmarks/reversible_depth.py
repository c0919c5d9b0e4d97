"""Blocks of two streams: memory and time of a training step against depth, and losses beside those of bptt.

    python benchmarks/reversible_depth.py [--quick] [--threads 2] [--out FILE] [--data FOLDER]

Depth: RevSResNet of one stage of n = 2, 6, 10 blocks of streams of 32 channels, T = 4, batch 8, 32x32. Kept bytes from
saved-tensor hooks (parameters apart), peak from fresh processes, both as slopes in n; a block has 147 kB of weights,
whose gradients are part of every peak. Seconds of one step at n = 6, all strategies in turns in one process.

Losses: RevSResNet21 of an eighth of the width on CIFAR-10, 200 steps of SGD on batches of 32, under bptt and under
reversible, for both orders: they have to be equal bit for bit. Needs the data set in FOLDER ($SPIKEFIT_DATA).
"""

import argparse
import sys
from statistics import linear_regression, median
from typing import Any

import torch
from harness import describe, interleave, ratio, write

from spikefit import create_model
from spikefit.data import load_dataset
from spikefit.encoding import repeat
from spikefit.errors import DataError
from spikefit.losses import create_loss
from spikefit.planning.measured import measured_peak_bytes
from spikefit.planning.memory import saved_bytes
from spikefit.planning.target import Target

STRATEGIES = ("bptt", "lean:input", "lean:spikes", "reversible")
DEPTHS, TIMED = (2, 6, 10), 6
OPTIONS: dict[str, Any] = {"width": 0.5, "input_shape": (3, 32, 32)}
SLOPE_GOAL = 0.02  # of the slope of bptt


def target(blocks: int, strategy: str) -> Target:
    return Target("revsresnet21", OPTIONS | {"blocks": (blocks,)}, strategy=strategy, timesteps=4, batch=8)


def images(batch: int) -> torch.Tensor:
    return repeat(torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)), timesteps=4)


def network(blocks: int, strategy: str, order: str = "rev") -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("revsresnet21", blocks=(blocks,), strategy=strategy, order=order, **OPTIONS)


def kept(blocks: int, strategy: str) -> int:
    """Bytes held between forward and backward, parameters apart."""
    return saved_bytes(network(blocks, strategy), images(8)).total


def step(net: torch.nn.Module, x: torch.Tensor) -> None:
    net.zero_grad(set_to_none=True)
    create_loss("ce_mean")(net(x), torch.arange(x.shape[1]) % 10).backward()


def against_depth(processes: int) -> dict[str, Any]:
    """Kept and peak bytes by strategy and depth, and their slopes in bytes per block."""
    record: dict[str, Any] = {"kept_bytes": {}, "peak_bytes": {}, "slope": {}}
    for strategy in STRATEGIES:
        held = {n: kept(n, strategy) for n in DEPTHS}
        peaks = {n: [measured_peak_bytes(target(n, strategy)) for _ in range(processes)] for n in DEPTHS}
        record["kept_bytes"][strategy], record["peak_bytes"][strategy] = held, peaks
        record["slope"][strategy] = {
            "kept": linear_regression(DEPTHS, list(held.values())).slope,
            "peak": linear_regression(DEPTHS, [median(p) for p in peaks.values()]).slope,
        }
        print(f"  {strategy:<13} kept {held}  peak { ({n: median(p) for n, p in peaks.items()}) }")
    return record


def losses(strategy: str, order: str, folder: str | None, steps: int) -> list[float]:
    """The loss of every step of a short training."""
    torch.manual_seed(0)
    net = create_model("revsresnet21", preset="revsresnet", width=0.125, order=order, strategy=strategy)
    data = load_dataset("cifar10", folder, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    order_of = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    seen = []
    for i in range(steps):
        x, y = data.batch(order_of[32 * i : 32 * (i + 1)])
        loss = create_loss("ce_mean")(net(repeat(x, timesteps=4)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps of training, one process per peak, 3 rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--data", help="folder with CIFAR-10; $SPIKEFIT_DATA if left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = describe("reversible_depth")

    runs: dict[str, Any] = {}
    try:
        for order in ("rev", "para"):
            twin, ours = (losses(s, order, args.data, 10 if args.quick else 200) for s in ("bptt", "reversible"))
            runs[order] = {"equal": twin == ours, "bptt": twin, "reversible": ours}
            print(f"  {order}: {len(ours)} losses, {'equal' if twin == ours else 'NOT equal'}, last {ours[-1]:.6f}")
    except DataError as error:
        record["unmeasured"] = {"losses": str(error)}
    record |= {"parity": all(run["equal"] for run in runs.values()), "losses": runs}
    if not record["parity"]:
        print("reversible_depth: RED, no numbers: losses of the reversible network and its twin differ.")
        write(record, args.out)
        return 1

    record |= against_depth(1 if args.quick else 3)
    nets, x = {s: network(TIMED, s) for s in STRATEGIES}, images(8)
    record["seconds"] = interleave(
        {s: lambda net=n: step(net, x) for s, n in nets.items()}, rounds=3 if args.quick else 9
    )
    slope = record["slope"]
    record["ratios"] = {
        f"{what} per block: reversible / bptt": slope["reversible"][what] / slope["bptt"][what]
        for what in ("kept", "peak")
    }
    record["ratios"] |= {f"step: {s} / bptt": ratio(record["seconds"], s, "bptt") for s in STRATEGIES[1:]}
    record["targets"] = dict.fromkeys(list(record["ratios"])[:2], f"<= {SLOPE_GOAL}")
    write(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
