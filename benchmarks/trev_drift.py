"""Keep the last state of T-RevSNN alone, and walk back: how often that fails, and how often our strategies do.

Plain: forward keeps v[T], and backward makes v[t-1] = (v[t] - F) / a with spikes of the states it made itself. A run is
destroyed if any spike or window bit of any state comes back otherwise. Beside it the same with true spikes as arguments
of F, where no gradient of a weight would read such a bit, and the error alone counts. Ours: `spike_bits` and
`reversible` with the largest distance of anchors that their guard accepts; a run is destroyed if a weight gradient is
off bptt by more than `LIMIT`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from spikefit import create_model
from spikefit.encoding import repeat
from spikefit.layers.coupled_function import _Backward
from spikefit.layers.coupled_keep import ROUNDINGS
from spikefit.layers.coupled_steps import broadcast, laid_out
from spikefit.layers.coupling import uncouple
from spikefit.layers.rebuild import safe_anchor_every
from spikefit.losses import create_loss
from spikefit.models import use_strategy
from spikefit.ops import threshold

LIMIT = 1e-3  # of the norm of a weight gradient
# Depthwise weights start at 0.02, with which no layer inside a block fires; times this, about a quarter does.
LIVELY = 20.0
GAINS = (0.5, 0.75, 0.9, 1.0)
BATCH = 4


def network(timesteps: int, *, seed: int = 0, lively: bool = False, gain: Any = None, **options: Any) -> Any:
    """A `trevsnn_mini` with the final head alone; a number as `gain` sets free gains to it."""
    torch.manual_seed(seed)
    kind = {} if gain is None else {"gain": "free" if isinstance(gain, float) else gain}
    net: Any = create_model("trevsnn_mini", timesteps=timesteps, auxiliary=False, **kind, **options)
    with torch.no_grad():
        if isinstance(gain, float):
            for raw in net.body.gains.raw:
                raw.fill_(gain)
        for module in net.modules():
            if lively and isinstance(module, nn.Conv2d) and module.groups > 1:
                module.weight.mul_(LIVELY)
    return net


def images(timesteps: int, batch: int, seed: int = 0, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return repeat(torch.rand(batch, 3, side, side, generator=generator), timesteps=timesteps)


class Trace:
    """What a forward went through: inputs x_t, gains, states, F of every stage and step."""

    @torch.no_grad()
    def __init__(self, net: Any, x: Tensor) -> None:
        self.body, v, s = net.body, [], []
        self.seen, self.gains = self.body.inputs(net.blocks[0](x)[0]), self.body.gains()
        self.states: list[list[Tensor]] = []
        self.made: list[list[Tensor]] = []
        for t, x_t in enumerate(self.seen):
            self.made.append([])
            v, s = self.body.advance(t, x_t, v, s, self.gains[t], self._run(t))
            self.states.append(v)

    def _run(self, t: int) -> Any:
        def run(stage: int, *args: Tensor) -> Tensor:
            self.made[t].append(self.body.branch(t, stage)(*args))
            return self.made[t][-1]

        return run

    @torch.no_grad()
    def undone(self, T: int, *, stored: bool) -> dict[str, Any]:
        """Walk back from v[T] alone, without detector or repair; with `stored`, F reads true spikes: it is as it was.

        Returns:
            {"destroyed", "error"}: whether any spike or window bit of a state came back otherwise; the largest error
            of v[1].
        """
        body, v, flipped = self.body, self.states[T - 1], False
        for t in range(T - 1, 0, -1):
            now = [threshold.fire(one) for one in v]
            before: list[Any] = [None] * body.count
            spikes: list[Any] = [None] * body.count
            for stage in reversed(range(body.count)):
                if stored:
                    f = self.made[t][stage]
                else:
                    below = self.seen[t] if stage == 0 else now[stage - 1]
                    f = body.branch(t, stage)(below, *body.deeper(stage, spikes, before))
                carried = uncouple(v[stage], f)
                before[stage] = laid_out(carried / broadcast(self.gains[t][stage], carried))
                spikes[stage] = threshold.fire(before[stage])
            flipped |= any(not same_bits(a, b) for a, b in zip(before, self.states[t - 1], strict=True))
            v = before
        worst = max(float((a - b).abs().amax()) for a, b in zip(v, self.states[0], strict=True))
        return {"destroyed": flipped, "error": worst}

    def safest(self, gain: float) -> int:
        """The largest distance of anchors that the guard accepts for these states."""
        largest = max(float(v.abs().amax()) for row in self.states for v in row)
        return safe_anchor_every(gain, ROUNDINGS * largest, self.states[0][0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two states have the same spikes and windows."""
    return torch.equal(threshold.spikes(a), threshold.spikes(b)) and torch.equal(
        threshold.window(a), threshold.window(b)
    )


def gradients(net: Any, strategy: str, x: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter under a strategy."""
    use_strategy(net, strategy).zero_grad(set_to_none=True)
    create_loss("ce_mean")(net(x), torch.arange(x.shape[1]) % 10).backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()}


def differences(twin: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Any]:
    """Largest relative difference of a gradient, of weights and of gains apart, and whether weights agree in bits."""
    found: dict[str, Any] = {"weights": 0.0, "gains": 0.0, "equal": True}
    for name, g in twin.items():
        kind = "gains" if ".gains." in name else "weights"
        off, size = float((ours[name] - g).norm()), float(g.norm())
        # a NaN is a difference
        relative = 0.0 if off == 0 else off / size if size > 0 and off == off else float("inf")
        found[kind] = max(found[kind], relative)
        found["equal"] &= kind == "gains" or torch.equal(ours[name], g)
    return found


@contextmanager
def repairs() -> Iterator[list[int]]:
    """Counts, in the list it gives, the steps that backward runs again after its detector found other spikes."""
    run_again, steps = _Backward._run_again, list[int]()

    def noted(self: Any, t: int, stage: int) -> Any:
        steps.append(t)
        return run_again(self, t, stage)

    with patch.object(_Backward, "_run_again", noted):
        yield steps


def plain_run(seed: int, lively: bool, gain: float, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """The walk back from every T in `lengths`; a step does not know how many follow it, so one forward does."""
    net = network(max(lengths), seed=seed, lively=lively, gain=gain)
    trace = Trace(net, images(max(lengths), BATCH, seed))
    return [{"T": T, **{k: trace.undone(T, stored=k == "stored") for k in ("remade", "stored")}} for T in lengths]


def our_run(seed: int, gain: float | None, T: int) -> list[dict[str, Any]]:
    """Gradients beside those of bptt; a gain of None stands for gains of one and states on a grid."""
    how: dict[str, Any] = {"gain": "one", "state_grid": 14} if gain is None else {"gain": gain}
    net, x = network(T, seed=seed, lively=True, **how), images(T, BATCH, seed)
    twin = gradients(net, "bptt", x)
    if gain is None:
        return [{"T": T, "reversible": differences(twin, gradients(net, "reversible", x)) | {"repairs": 0, "A": None}}]
    A = Trace(net, x).safest(gain)
    row: dict[str, Any] = {"T": T}
    for name, strategy in (("spike_bits", f"spike_bits:{A}"), ("reversible", f"reversible:{A},0.001,repair")):
        with repairs() as steps:
            row[name] = differences(twin, gradients(net, strategy, x)) | {"repairs": len(steps), "A": A}
    return [row]


def drift(record: dict[str, Any], save: Callable[[], None], *, lengths: tuple[int, ...], seeds: range) -> None:
    """Both tables into `record`; runs that it has are not run again. Every seed has weights and images of its own."""
    record |= {"batch": BATCH, "limit": LIMIT, "lively": LIVELY}
    plain, ours = record.setdefault("plain", []), record.setdefault("ours", [])
    for seed in seeds:
        for lively in (False, True):
            for a in GAINS:
                who = {"seed": seed, "lively": lively, "a": a}
                if not any(who.items() <= row.items() for row in plain):
                    plain += [who | row for row in plain_run(seed, lively, a, lengths)]
                    save()
    for seed in seeds:
        for gain in (0.5, 0.75, None):
            for T in lengths:
                who = {"seed": seed, "a": "one, grid" if gain is None else gain}
                if not any((who | {"T": T}).items() <= row.items() for row in ours):
                    ours += [who | row for row in our_run(seed, gain, T)]
                    save()


def print_drift(record: dict[str, Any]) -> None:
    """One line per weights, gain and T: destroyed of all runs, and errors."""
    print("  walk back from the last state: destroyed of runs (off by > 0.1 at t = 1; median, largest error there)")
    for (lively, a, T), rows in _grouped(record["plain"], ("lively", "a", "T")).items():
        text = f"    {'lively ' if lively else 'initial'} a = {a:<4} T = {T:<3}"
        for kind in ("remade", "stored"):
            errors = [r[kind]["error"] for r in rows]
            text += f" {kind} {sum(r[kind]['destroyed'] for r in rows):2}/{len(rows)}"
            text += f" ({sum(not e <= 0.1 for e in errors):2}; {median(errors):.0e}, {max(errors):.0e})  "
        print(text)
    print(
        f"  ours, lively weights: weight gradients off by more than {LIMIT:g} (equal in bits, repaired; gains off by)"
    )
    for (a, T), rows in _grouped(record["ours"], ("a", "T")).items():
        text = f"    a = {a:<9} T = {T:<3}"
        for kind in [k for k in ("spike_bits", "reversible") if k in rows[0]]:
            found = [r[kind] for r in rows]
            anchors = sorted({f["A"] for f in found if f["A"] is not None})
            every = f":{anchors[0]}..{anchors[-1]}" if anchors else ""
            text += f" {kind}{every} {sum(not f['weights'] <= LIMIT for f in found)}/{len(rows)}"
            text += f" ({sum(f['equal'] for f in found)}, {sum(f['repairs'] > 0 for f in found)};"
            text += f" {max(f['gains'] for f in found):.0e})  "
        print(text)


def _grouped(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: [str(r[k]).zfill(2) for k in keys]):
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return groups
