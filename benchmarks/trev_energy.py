"""Operations and energy of T-RevSNN at inference, in two accountings, and its operations beside published counts.

Strict: a layer is charged accumulates where its input is binary, else multiply-accumulates. The 1x1 convolutions behind
the first depthwise one of a block, and the depthwise ones at its end, read analog values. Published: every operation
behind the stem is an accumulate, at the rate of the layers that read spikes.
"""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from trev_drift import network

from spikefit.data import load_dataset
from spikefit.encoding import repeat
from spikefit.planning.energy import AC_PJ, MAC_PJ, Operations
from spikefit.planning.operations import macs_of, operations
from spikefit.planning.target import Target
from spikefit.training.build import build_model
from spikefit.training.checkpoint import fill_model, load_checkpoint
from spikefit.training.recipe import load_recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
STEPS = (1, 4, 8)
# Multiply-accumulates per image at 224x224, T = 4, k = 5, final head alone.
GOLDEN = {
    "trevsnn_tiny": {"body": 5_122_367_488, "stem": 233_619_456, "head": 1_384_000, "analog": 2_243_268_608},
    "trevsnn_small": {"body": 10_485_178_368, "stem": 437_133_312, "head": 1_512_000, "analog": 4_544_139_264},
}
PUBLISHED_PJ = 2.8e9  # of the small network
ANALOG = (".pw1", ".pw3", ".dw2", ".dw")


def part_of(name: str) -> str:
    """Stem, body or head, by the name of a layer."""
    return "stem" if name.startswith("blocks.0.") else "head" if ".heads." in name else "body"


@torch.no_grad()
def counted(net: nn.Module, x: Tensor, *, values: bool = True) -> dict[str, Operations]:
    """Operations of every convolution and linear map per image; calls of a shared one add up."""
    found: dict[str, Operations] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            shape = output.shape[1:]
            one = Operations(macs_of(module, shape), 1, False, None)
            one = operations(module, inputs[0].unsqueeze(0), shape) if values else one
            found[name] = found[name] + one if name in found else one

        return hook

    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(note(name)) for name, m in layers]
    try:
        net.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def totals(found: dict[str, Operations]) -> dict[str, int]:
    """Multiply-accumulates per image of stem, body and head, and those of body layers that read analog values."""
    macs: dict[str, int] = defaultdict(int)
    for name, one in found.items():
        macs[part_of(name)] += one.macs * one.steps
        macs["analog"] += one.macs * one.steps if name.endswith(ANALOG) and part_of(name) == "body" else 0
    return dict(macs)


def published_counts() -> dict[str, Any]:
    """Counts of the two published networks, and whether they are those that are known."""
    made = {}
    for name, golden in GOLDEN.items():
        model = Target(name, {"auxiliary": False}, timesteps=4).build().to("meta")
        x = torch.empty(1, 3, 224, 224, device="meta")
        found = totals(counted(model, repeat(x, timesteps=4), values=False))
        made[name] = {"macs": found, "expected": golden, "equal": found == golden}
        made[name] |= {"analog as MACs (mJ)": found["analog"] * MAC_PJ * 1e-9}
    # published for the small network: what rate makes it the energy of all operations behind the stem?
    small = made["trevsnn_small"]["macs"]
    left = PUBLISHED_PJ - MAC_PJ * small["stem"]
    made["trevsnn_small"]["rate of the published energy"] = left / (AC_PJ * (small["body"] + small["head"]))
    return made


def energies(found: dict[str, Operations], steps: int) -> dict[str, Any]:
    """Energy per image and per step [pJ] in both accountings, and the rates behind it."""
    binary = {k: o for k, o in found.items() if o.binary and part_of(k) == "body"}
    work = sum(o.macs * o.steps for o in binary.values())
    rate = sum(o.synops or 0 for o in binary.values()) / work
    macs = totals(found)
    stem = MAC_PJ * macs["stem"]
    strict = sum(o.energy_pj or 0.0 for o in found.values())
    published = stem + AC_PJ * rate * (macs["body"] + macs["head"])
    inner = [o for k, o in binary.items() if k.endswith((".pw2", ".pw"))]
    return {
        "macs": macs,
        "binary_macs": work,
        "synops": sum(o.synops or 0 for o in found.values()),
        "rate": rate,
        "rate_inside_blocks": sum(o.synops or 0 for o in inner) / sum(o.macs * o.steps for o in inner),
        "stem_pj": stem,
        "strict_pj": strict,
        "published_pj": published,
        "strict_pj_per_step": (strict - stem) / steps,
        "published_pj_per_step": (published - stem) / steps,
        "layers": {k: asdict(o) for k, o in found.items()},
    }


@torch.no_grad()
def with_statistics(net: Any, x: Tensor) -> Any:
    """`net` with running statistics of its norms on `x`; those it starts with belong to no data."""
    norms = [m for m in net.modules() if hasattr(m, "running_mean")]
    usual = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    net.train()(x)
    for m, momentum in zip(norms, usual, strict=True):
        m.momentum = momentum
    return net


def trained(path: str) -> tuple[Any, int]:
    """(network, T) of a checkpoint, with averaged weights if it has any."""
    found = load_checkpoint(path)
    net: Any = build_model(load_recipe(found.state["recipe"]), learns=False)
    fill_model(net, found.tensors.get("ema", found.tensors["model"]), found.path)
    return net, net.timesteps


def energy(folder: str | None, weights: str | None, *, quick: bool) -> dict[str, Any]:
    """Energies of the deployed `trevsnn_mini` on test images of CIFAR-10.

    Raises:
        DataError: no data.
    """
    data = load_dataset("cifar10", folder, "test", mean=MEAN, std=STD)
    x = data.batch(range(32 if quick else 64))[0]
    rows = []
    nets = [("initial", False, T) for T in STEPS] + [("lively", True, T) for T in STEPS]
    made = [(k, T, with_statistics(network(T, lively=v), repeat(x, timesteps=T))) for k, v, T in nets]
    if weights is not None:
        net, T = trained(weights)
        made.append((weights, T, net))
    for kind, T, net in made:
        row = {"weights": kind, "T": T} | energies(counted(net.deployed(), repeat(x, timesteps=T)), T)
        rows.append(row)
        print(
            f"  {kind:<8} T = {T}: {sum(row['macs'].values()) / 1e6:7.2f} M operations, rate {row['rate']:.3f} (inside "
            f"blocks {row['rate_inside_blocks']:.3f}); strict {row['strict_pj'] / 1e6:6.2f} uJ "
            f"({row['strict_pj_per_step'] / 1e6:.2f} per step), published {row['published_pj'] / 1e6:6.2f} uJ "
            f"({row['published_pj_per_step'] / 1e6:.2f} per step), stem {row['stem_pj'] / 1e6:.2f} uJ",
            flush=True,
        )
    return {"data": data.name, "note": data.note, "images": len(x), "rows": rows}
