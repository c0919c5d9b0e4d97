"""The LIF op, forward + backward, on [8, 16, 128, 32, 32] float32: ours, a plain autograd time loop, four clones.

Ours is `lif(..., backend="numba")`, the loop is `lif(..., backend="reference")`; four `clone()` calls of the tensor are
the yardstick of memory traffic. All run in turns in one process, so they share threads and allocator. No time is
printed unless spikes are equal and gradients agree.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from harness import describe, interleave, ratio, write
from torch import Tensor

from spikefit.ops.lif import lif

SHAPE = (8, 16, 128, 32, 32)
# leak, gain and surrogate of the benchmark net; the gradient of the spikes is given
OPTIONS = {"leak": 0.5, "gain": 1.0, "v_threshold": 1.0}


def forward_backward(backend: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(spikes, dL/dx) for a given dL/dspikes."""
    spikes, _ = lif(x, backend=backend, **OPTIONS)
    (dx,) = torch.autograd.grad(spikes, x, g)
    return spikes.detach(), dx


def four_clones(x: Tensor) -> None:
    """The memory traffic of reading and writing the tensor four times; each copy is dropped at once."""
    for _ in range(4):
        x.detach().clone()


def disagreement(x: Tensor, g: Tensor) -> str | None:
    """What differs between the two backends, or None."""
    (s, dx), (s_ref, dx_ref) = (forward_backward(backend, x, g) for backend in ("numba", "reference"))
    rate = s_ref.mean().item()
    if not 0.05 < rate < 0.95:
        return f"the firing rate is {rate:.3f}, which proves nothing"
    if not torch.equal(s, s_ref):
        return f"{int((s != s_ref).sum())} spikes differ"
    if not torch.allclose(dx, dx_ref, rtol=1e-5, atol=1e-6):
        return f"gradients differ by up to {(dx - dx_ref).abs().max().item():.2e}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 rounds instead of 11")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    x, g = torch.randn(SHAPE).add_(0.3).requires_grad_(), torch.randn(SHAPE)
    wrong = disagreement(x, g)
    record = describe("lif_op")
    record |= {"shape": SHAPE, "dtype": "float32", "parity": wrong is None}
    if wrong is not None:
        print(f"lif_op: RED, no times: {wrong}.")
        write(record | {"disagreement": wrong}, args.out)
        return 1
    print(f"lif_op: same spikes, gradients agree; {list(SHAPE)} float32, threads {args.threads}")
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: forward_backward("numba", x, g),
        "time loop": lambda: forward_backward("reference", x, g),
        "four clones": lambda: four_clones(x),
    }
    seconds = interleave(contestants, rounds=7 if args.quick else 11)
    record |= {
        "seconds": seconds,
        "ratios": {
            "time loop / ours": ratio(seconds, "time loop", "ours"),
            "ours / four clones": ratio(seconds, "ours", "four clones"),
        },
        "targets": {"time loop / ours": ">= 5", "ours / four clones": "<= 1.25"},
    }
    write(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
