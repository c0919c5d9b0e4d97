"""One training step of vgg6: ours against SpikingJelly and snnTorch, same net, same weights, in one process.

The step: forward, cross-entropy of the mean logits, backward, SGD. The net: conv-norm-LIF units of width 64, 64, pool,
128, 128, pool, 256, 256, pool, mean over space, linear head; batch norm over time and batch; leak 0.5, threshold 1,
soft reset, detached, atan(2); images 3x32x32, batch 16, repeated T = 8 times.

Three forms of each peer: as written (NCHW), in channels-last, and "once" (channels-last, first convolution and norm run
on the image and repeated behind, which a careful user writes by hand). Compiled peers are not among them.

No time is printed unless all first losses agree: to 1e-5 in float64, where no spike flips by rounding, and to 1 % in
float32, where one flip of a spike at the threshold changes many spikes behind it.

snnTorch: `reset_delay=False` subtracts the threshold in the step of the spike, as here, but only while the membrane
after reset is at most the threshold, and its gradient passes through the reset. Norms therefore start at weight 0.2,
bias 0.5, where no membrane gets that far; losses agree, gradients are those of another reset.

Run by `benchmarks/run.py` in the environment of `benchmarks/peers.py`.
"""

import argparse
import sys
from functools import partial

import torch
from harness import describe, interleave, ratio, write
from peer_nets import CLASSES, Forward, our_net, peer_net, same_weights
from torch import Tensor, nn
from torch.nn import functional as F

T, BATCH = 8, 16
TOLERANCE = {"float64": 1e-5, "float32": 1e-2}

# module, its forward, input [T or 1, B, 3, 32, 32]
Contestant = tuple[nn.Module, Forward, Tensor]


def training_step(net: nn.Module, forward: Forward, x: Tensor, labels: Tensor, optimizer) -> float:
    """Forward, loss, backward, update; returns the loss before the update."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(forward(net, x).mean(0), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def build() -> tuple[dict[str, Contestant], Tensor]:
    """All contestants by name, ours first, and the labels [B]."""
    torch.manual_seed(0)
    image, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    repeated = image.expand(T, *image.shape)
    lasts = image.repeat(T, 1, 1, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, BATCH))
    once = image.contiguous(memory_format=torch.channels_last).unsqueeze(0)
    contestants: dict[str, Contestant] = {"ours": (*our_net("vgg6"), repeated)}
    for name in ("spikingjelly", "snntorch"):
        contestants[name] = (*peer_net(name, "vgg6", T), repeated.contiguous())
        for form, x in (("channels_last", lasts), ("once", once)):
            net, forward = peer_net(name, "vgg6", T)
            contestants[f"{name} {form}"] = (net.to(memory_format=torch.channels_last), forward, x)
    same_weights([net for net, _, _ in contestants.values()])
    return contestants, labels


@torch.no_grad()
def first_losses(contestants: dict[str, Contestant], labels: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The loss of the initial weights, in training mode."""
    losses = {}
    for name, (net, forward, x) in contestants.items():
        x = x.to(dtype) if x.stride(0) else x[:1].to(dtype).expand_as(x)
        losses[name] = F.cross_entropy(forward(net.to(dtype), x).mean(0), labels).item()
        net.float()
    return losses


def disagreements(losses: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The losses that are further from ours than the tolerance of their dtype."""
    return {
        dtype: wrong
        for dtype, values in losses.items()
        if (wrong := {k: v for k, v in values.items() if not abs(v / values["ours"] - 1) <= TOLERANCE[dtype]})
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    contestants, labels = build()
    losses = {
        str(d).removeprefix("torch."): first_losses(contestants, labels, d) for d in (torch.float64, torch.float32)
    }
    wrong = disagreements(losses)
    record = describe("vgg6_step", extra=("spikingjelly", "snntorch"))
    record |= {"parity": not wrong, "first_losses": losses, "tolerance": TOLERANCE}
    if wrong:
        print(f"vgg6_step: RED, no times: first losses of ours {losses}, too far from it {wrong}.")
        write(record, args.out)
        return 1
    print(f"vgg6_step: first losses agree, ours {losses['float64']['ours']:.7f}; threads {args.threads}")
    steps = {
        name: partial(training_step, net, forward, x, labels, torch.optim.SGD(net.parameters(), lr=0.01))
        for name, (net, forward, x) in contestants.items()
    }
    seconds = interleave(steps, rounds=3 if args.quick else 5)
    plain = min(("spikingjelly", "snntorch"), key=lambda name: ratio(seconds, name))
    best = min((name for name in seconds if name != "ours"), key=lambda name: ratio(seconds, name))
    record |= {
        "seconds": seconds,
        "ratios": {f"ours / {name}": ratio(seconds, "ours", name) for name in dict.fromkeys((plain, best))},
        "targets": {f"ours / {plain}": "<= 1.05"},
    }
    write(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
