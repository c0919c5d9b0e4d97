"""What the tests of the window scan share: the scan as a loop of its own, and runs that are compared."""

import math

import torch
from torch import Tensor

from spikefit.ops.window_scan import Links, across, across_release, apart, behind, in_turn, window_scan
from support import assert_close, assert_same_spikes

LINKS = {"in_turn": in_turn, "behind": behind, "across": across, "apart": apart}
FUSIONS = ["omega", "a", "c", "sum", "mean", "relu", "none"]
RESETS = ["none", "soft", "hard"]


def links_of(name: str, windows: int) -> Links:
    return across_release() if name == "across_release" else LINKS[name](windows)


def sources(name: str, p: int, g: Tensor | None, m: list[Tensor], zero: Tensor) -> tuple[Tensor, Tensor]:
    """(A, C) of window p, spelled out apart from the library."""
    if name == "in_turn":
        return (m[p - 1] if p > 0 else zero), zero
    if name == "behind":
        return (g[p - 1], m[p - 1]) if p > 0 else (zero, zero)
    if name == "across":
        return (m[p - 1] if p > 0 else g[0]), g[p]
    if name == "across_release":
        return [lambda: (g[0], g[1]), lambda: (m[0], g[1]), lambda: (g[2], m[1]), lambda: (g[3], m[2])][p]()
    return zero, zero


class Step(torch.autograd.Function):
    """[d > 0], with slope 1 where |d| < 1/2."""

    @staticmethod
    def forward(ctx, d):
        ctx.save_for_backward(d)
        return (d > 0).to(d.dtype)

    @staticmethod
    def backward(ctx, g):
        (d,) = ctx.saved_tensors
        return torch.where(d.abs() < 0.5, g, 0)


def fused(fuse: str, a: Tensor, c: Tensor, phi) -> Tensor:
    """The fusions with the sine of torch."""
    return {
        "omega": lambda: 2 * torch.sin(phi * math.pi / 2 * a) * torch.cos(phi * math.pi / 2 * c),
        "omega_release": lambda: 2 * torch.sin(phi * math.pi / 2 * a * torch.cos(phi * math.pi / 2 * c)),
        "a": lambda: a,
        "c": lambda: c,
        "sum": lambda: a + c,
        "mean": lambda: (a + c) / 2,
        "relu": lambda: (a + c).clamp(min=0),
        "tanh": lambda: (a + c).tanh(),
        "sigmoid": lambda: 1 / (1 + torch.exp(-(a + c))),
        "none": lambda: torch.zeros_like(a),
    }[fuse]()


def by_hand(
    x: Tensor,
    given: Tensor | None,
    name: str,
    fuse: str,
    *,
    phi=0.5,
    leak=0.4,
    theta=0.5,
    reset="none",
    step=Step.apply,
) -> tuple[Tensor, Tensor]:
    """The scan as a loop over windows, by autograd."""
    zero, m, spikes = torch.zeros_like(x[0]), [], []
    for p in range(len(x)):
        u = leak * fused(fuse, *sources(name, p, given, m, zero), phi) + x[p]
        s = step(u - theta)
        spikes.append(s)
        fired = s.detach()
        m.append(u if reset == "none" else u - theta * fired if reset == "soft" else torch.where(fired > 0, 0 * u, u))
    return torch.stack(spikes), torch.stack(m)


def inputs(windows: int, *shape: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Currents and given membranes with all their bits in use, about 40 % of the neurons above 0.5."""
    generator = torch.Generator().manual_seed(seed)
    x, given = (torch.randn(windows, *shape, generator=generator) for _ in range(2))
    return (0.7 * x + 0.35).to(dtype), given


def run_scan(backend: str, x: Tensor, given: Tensor | None, name: str, fuse: str, **options) -> dict[str, Tensor]:
    """Forward and backward with fixed random gradients: results and gradients by name."""
    x = x.detach().requires_grad_()
    leaves = {"d x": x}
    links = links_of(name, len(x))
    if not links.reads_given:
        given = None
    if given is not None:
        given = leaves["d given"] = given.detach().requires_grad_()
    results = window_scan(x, given, links=links, fuse=fuse, backend=backend, **options)
    return graded(dict(zip(("spikes", "membranes"), results, strict=True)), leaves)


def graded(results: dict[str, Tensor | None], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results and the gradients of `leaves`, by name; what no gradient reaches is zero."""
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for result in results.values():
        if result is not None:
            weight = torch.randn(result.shape, generator=generator).to(result.device)
            loss = loss + (result * weight.to(result.dtype)).sum(dtype=torch.float64)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {k: r.detach() for k, r in results.items() if r is not None} | dict(zip(leaves, found, strict=True))


def assert_same_scan(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Same spikes and membranes bit for bit; gradients within `tolerance`."""
    assert got.keys() == wanted.keys()
    assert_same_spikes(got["spikes"], wanted["spikes"])
    if "membranes" in wanted:
        assert got["membranes"].dtype == wanted["membranes"].dtype
        assert torch.equal(got["membranes"], wanted["membranes"])
    for name in got.keys() - {"spikes", "membranes"}:
        assert_close(got[name], wanted[name], tolerance, name)
