"""Windows of one image, forward + backward: the fused scans against a plain torch loop over the windows.

    python benchmarks/windows.py [--quick] [--threads 2] [--only scans] [--out FILE]

Part `scans`: the element-wise chain of a convolutional block, that is both neuron layers without their convolutions.
The first layer runs its windows in turn (fuse="a"), the second behind it (fuse="omega"); 4 windows of 12 x 12, batch
32, 96 channels, float32. The loop is what one writes without this library: torch.sin, torch.cos and a step with a
rectangular slope, by autograd. All run in turns in one process, so they share threads and allocator.

Part `block`: a whole dilated block on a map of 16 x 16, same batch and channels; the loop calls both convolutions once
per window.

No time of a part is printed unless spikes are equal and gradients agree. A further part is a function that returns a
`Part`, with names of its own for seconds and ratios, and a row in `PARTS`.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from harness import describe, interleave, ratio, write
from torch import Tensor

from spikefit.layers.window_block import WindowSpike
from spikefit.layers.windows import recompose, windows_of
from spikefit.ops.window_scan import behind, in_turn, window_scan

SHAPE = (4, 32, 96, 12, 12)
LEAK, THRESHOLD, PHI = 0.4, 0.5, 0.5


class Part(NamedTuple):
    """What one part found: `wrong` says what differs, and then nothing else is filled."""

    wrong: str | None
    seconds: dict[str, list[float]]
    ratios: dict[str, float]
    targets: dict[str, str]


class Step(torch.autograd.Function):
    """[d > 0] with slope 1 where |d| < 1/2."""

    @staticmethod
    def forward(ctx, d: Tensor) -> Tensor:
        ctx.save_for_backward(d)
        return (d > 0).to(d.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        return g * (ctx.saved_tensors[0].abs() < 0.5).to(g.dtype)


def fused(x1: Tensor, x2: Tensor, backend: str = "numba") -> tuple[Tensor, Tensor]:
    """Spikes of both layers, [P, B, C, H, W]."""
    constants = {"leak": LEAK, "v_threshold": THRESHOLD, "backend": backend}
    s1, m1 = window_scan(x1, links=in_turn(len(x1)), fuse="a", **constants)
    s2, _ = window_scan(x2, m1, links=behind(len(x2)), phi=PHI, want_membranes=False, **constants)
    return s1, s2


def loop(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The same, window by window, in plain torch."""
    h = PHI * math.pi / 2
    u1 = u2 = torch.zeros_like(x1[0])
    s1, s2 = [], []
    for p in range(len(x1)):
        start = 2 * torch.sin(h * u1) * torch.cos(h * u2)
        u1 = LEAK * u1 + x1[p]
        u2 = LEAK * start + x2[p]
        s1.append(Step.apply(u1 - THRESHOLD))
        s2.append(Step.apply(u2 - THRESHOLD))
    return torch.stack(s1), torch.stack(s2)


def disagreement(x: list[Tensor], g: list[Tensor]) -> str | None:
    """What differs between kernels, reference and loop, or None."""
    runs = {}
    for name, layers in (("numba", fused), ("reference", lambda a, b: fused(a, b, "reference")), ("loop", loop)):
        spikes = layers(*x)
        runs[name] = [*(s.detach() for s in spikes), *torch.autograd.grad(spikes, x, g)]
    for s in runs["loop"][:2]:
        if not 0.05 < s.mean().item() < 0.95:
            return f"the firing rate is {s.mean().item():.3f}, which proves nothing"
    for other in ("reference", "loop"):
        for i, (got, wanted) in enumerate(zip(runs["numba"], runs[other], strict=True)):
            # the sine of torch may differ in its last bit, and so may a spike in millions
            off = int(((got - wanted).abs() > 1e-5 + 1e-5 * wanted.abs()).sum())
            if off > (0 if other == "reference" else 1e-6 * got.numel()):
                return f"numba and {other}: {off} of {got.numel()} {('spikes', 'gradients')[i // 2]} differ"
    return None


def scans(rounds: int) -> Part:
    """Both scans of a block, kernels against the loop."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(SHAPE, generator=generator).mul_(0.6).add_(0.2).requires_grad_() for _ in range(2)]
    g = [torch.randn(SHAPE, generator=generator) for _ in range(2)]
    wrong = disagreement(x, g)
    if wrong is not None:
        return Part(wrong, {}, {}, {})

    def run(layers: Callable[..., tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(layers(*x), x, g)

    seconds = interleave({"ours": lambda: run(fused), "torch loop": lambda: run(loop)}, rounds=rounds)
    name = "scans: torch loop / ours"
    return Part(None, seconds, {name: ratio(seconds, "torch loop", "ours")}, {name: ">= 2"})


def block_loop(block: WindowSpike, x: Tensor) -> Tensor:
    """A whole block, window by window, in plain torch: two convolutions and two steps of a membrane each."""
    windows = windows_of(block.kind, block.windows, (x.shape[3], x.shape[4]))
    pixels = x[0].permute(0, 2, 3, 1).contiguous()
    first, second = block.cell.weights
    h, u1, u2, spikes = PHI * math.pi / 2, 0.0, 0.0, []
    for (row, column), (high, wide) in ((place, windows.side) for place in windows.offsets):
        seen = pixels[:, row : row + high, column : column + wide]
        coded = (seen > 0.5).to(x.dtype).permute(0, 3, 1, 2)
        start = 2 * torch.sin(h * u1) * torch.cos(h * u2) if spikes else 0.0
        u1 = LEAK * u1 + first(coded)
        u2 = LEAK * start + second(Step.apply(u1 - THRESHOLD))
        spikes.append(Step.apply(u2 - THRESHOLD).permute(0, 2, 3, 1))
    pixels = pixels + block.fc(recompose(torch.stack(spikes), windows, block.condense))
    return (pixels + block.mlp(pixels)).permute(0, 3, 1, 2).unsqueeze(0)


def blocks(rounds: int) -> Part:
    """A whole block: coding, convolutions, scans, recomposition and MLP, all windows at once against one by one."""
    torch.manual_seed(0)
    channels, side = SHAPE[2], SHAPE[3] * 4 // 3
    # a coding without draws, so that both see the same spikes; it has a gradient, and the loop would have none
    block = WindowSpike(channels, kind="dilated", coding="heaviside")
    x = torch.randn((1, SHAPE[1], channels, side, side)).mul_(0.6).add_(0.5)
    parameters = list(block.parameters())
    g = torch.randn(x.shape)

    def run(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        out = forward(x)
        return (out.detach(), *torch.autograd.grad(out, parameters, g))

    ours, looped = (lambda x: block(x)[0]), (lambda x: block_loop(block, x))
    for got, wanted in zip(run(ours), run(looped), strict=True):
        off = (got - wanted).abs() > 1e-3 * wanted.abs().max()
        if off.float().mean() > 1e-4:
            return Part(f"block and loop: {int(off.sum())} of {got.numel()} values differ", {}, {}, {})
    seconds = interleave({"block, ours": lambda: run(ours), "block, loop": lambda: run(looped)}, rounds=rounds)
    name = "block: torch loop / ours"
    return Part(None, seconds, {name: ratio(seconds, "block, loop", "block, ours")}, {name: "reported"})


# name -> what runs it, given the number of rounds
PARTS: dict[str, Callable[[int], Part]] = {"scans": scans, "block": blocks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 rounds instead of 21")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(PARTS), help="run one part")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    record = describe("windows") | {"shape": SHAPE, "dtype": "float32", "parity": True}
    found: dict[str, dict] = {"seconds": {}, "ratios": {}, "targets": {}}
    for name in [args.only] if args.only else list(PARTS):
        part = PARTS[name](7 if args.quick else 21)
        if part.wrong is not None:
            print(f"windows: {name} is RED, no times: {part.wrong}.")
            write(record | {"parity": False, "disagreement": f"{name}: {part.wrong}"}, args.out)
            return 1
        print(f"windows: {name}: same spikes, gradients agree; threads {args.threads}")
        for key, values in found.items():
            values |= getattr(part, key)
    record |= found
    write(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
