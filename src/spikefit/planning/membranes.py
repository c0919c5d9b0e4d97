"""Bytes of membranes: what the neurons of a network hold in forward, and for backward under every strategy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spikefit.engines.membranes import read_inverse, stages_of
from spikefit.errors import StrategyError
from spikefit.layers.rebuild import Rebuild, neuron_of
from spikefit.layers.shared import SharedStage
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron
from spikefit.ops.lif.equation import grid_leak
from spikefit.ops.packbits.op import BITS, packed_length

# Shapes [T, B, C, ...] that the neuron at a path got, one per call.
Currents = dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True)
class MembraneBytes:
    """Bytes of membranes of one training step.

    Attributes:
        forward: all membranes at one moment, as a step of inference holds them.
        kept: strategy -> what neurons keep between forward and backward, packed spikes included; None where the
            strategy refuses a layer of this network.
        peak: strategy -> the same, and what the membrane that takes most is rebuilt into.
        anchor_every: distances in calls of the membranes that "inverse" keeps; empty where it does not apply.
        assumes_grid: whether "integer" is counted as if neurons without a grid (frac_bits) had one.
    """

    forward: int
    kept: dict[str, int | None]
    peak: dict[str, int | None]
    anchor_every: list[int]
    assumes_grid: bool


@dataclass(frozen=True)
class _Membrane:
    """One membrane and its calls, with the equation of the neurons that use it."""

    pixels: int  # of all samples
    channels: int  # of one group
    bytes_each: int
    layers: int
    groups: int
    steps: int
    pieces: int
    together: int  # steps of a piece
    bits: int
    leak: Any

    @property
    def calls(self) -> int:
        return self.layers * self.groups * self.steps

    @property
    def bytes(self) -> int:
        return self.pixels * self.channels * self.bytes_each


def membrane_bytes(network: SpikingNetwork, currents: Currents, dtype: torch.dtype) -> MembraneBytes:
    """Count the membranes of `network`.

        forward         sum of B C/n pixels e over the membranes, e = 4 or 8 bytes
        bptt            every u_k:  K P e for a membrane of P neurons that is visited K times
        replay          spikes as bits; rebuilt in a stage whose steps run in p pieces of k steps: the membranes before
                        all pieces but the first, and k n P e, or (m + n) P e where m layers of n groups share it
        inverse         spikes as bits and ceil(K / A) membranes, A of the network's strategy; rebuilt: the membranes of
                        a stage, and u of one
        integer         spikes as bits, the last membrane and per call m bits at leak = 2^-m, 1 bit at 1 - 2^-m;
                        rebuilt: the membranes of a stage, and a byte for what each call of a piece lost

    Neurons that stand alone, or in blocks of two streams, keep their u under all of them.

    Args:
        network: its chain tells who shares what.
        currents: what every neuron got.
        dtype: of the membranes.
    """
    stages = _membranes(network, currents, dtype)
    found = [m for stage in stages for m in stage]
    alone, alone_kept = _alone(network, currents, dtype)
    kept: dict[str, int | None] = {"bptt": sum(m.calls * m.bytes for m in found) + alone_kept}
    peak = dict(kept)
    chosen = network.strategy
    inverse = read_inverse(chosen.option if chosen.name == "inverse" else None)
    for rebuild, beside in (
        (Rebuild("replay"), lambda m: 0),
        (inverse, partial(_anchors, inverse, dtype)),
        (Rebuild("integer"), _digits),
    ):
        name = rebuild.name
        try:
            if not stages:
                raise StrategyError(f"{name}: the network has no block of neurons that can be rebuilt.")
            for stage in _stages(network):
                stage.check(rebuild, any_grid=True)
            held = sum(m.bits + beside(m) for m in found) + alone_kept
        except StrategyError:
            kept[name] = peak[name] = None
            continue
        rebuilt = {"replay": _replayed, "inverse": _undone, "integer": _undone_on_grid}[name]
        kept[name], peak[name] = held, held + max(map(rebuilt, stages), default=0)
    every = set() if kept["inverse"] is None else {inverse.distance(m.leak, dtype) for m in found}
    neurons = [neuron_of(layer) for stage in _stages(network) for layer in stage.layers]
    assumes_grid = kept["integer"] is not None and any(neuron.frac_bits is None for neuron in neurons)
    return MembraneBytes(sum(m.bytes for m in found) + alone, kept, peak, sorted(every), assumes_grid)


def _alone(network: SpikingNetwork, currents: Currents, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the membranes that belong to no stage, and of all their u: no strategy here rebuilds them."""
    in_stages = {neuron_of(layer) for stage in _stages(network) for layer in stage.layers}
    forward = kept = 0
    for path, module in network.named_modules():
        if path in currents and module not in in_stages:
            calls = currents[path]
            sequence = torch.Size(calls[0][1:]).numel() * dtype.itemsize
            forward += sequence // module.groups
            kept += sum(call[0] for call in calls) * sequence
    return forward, kept


def _stages(network: SpikingNetwork) -> list[SharedStage]:
    return [stage for stage in stages_of(network.chain) if isinstance(stage, SharedStage)]


def _membranes(network: SpikingNetwork, currents: Currents, dtype: torch.dtype) -> list[list[_Membrane]]:
    """The membranes of every stage."""
    paths = {module: path for path, module in network.named_modules()}
    found = []
    for stage in _stages(network):
        shapes = [currents[paths[neuron_of(layer)]] for layer in stage.layers]
        values = max(torch.Size(s[0][1:]).numel() for s in shapes)
        made = []
        for membrane in dict.fromkeys(stage.membranes):
            own = [i for i, m in enumerate(stage.membranes) if m == membrane]
            neuron = neuron_of(stage.layers[own[0]])
            calls = shapes[own[0]]
            steps, (batch, channels, *space) = sum(s[0] for s in calls), calls[0][1:]
            pixels = batch * torch.Size(space).numel()
            pieces = stage.pieces(steps, Rebuild("replay"), values)
            leak = neuron.coefficients()[0]
            made.append(
                _Membrane(
                    pixels=pixels,
                    channels=channels // neuron.groups,
                    bytes_each=dtype.itemsize,
                    layers=len(own),
                    groups=neuron.groups,
                    steps=steps,
                    pieces=len(pieces),
                    together=pieces[0][1] - pieces[0][0],
                    bits=len(own) * steps * pixels * packed_length(channels),
                    leak=leak if isinstance(leak, float) else None,
                )
            )
        found.append(made)
    return found


def _replayed(stage: list[_Membrane]) -> int:
    """Bytes of membranes that a replay of a stage holds at once."""
    starts = sum((m.pieces - 1) * m.bytes for m in stage)
    return starts + max(((m.layers if m.layers > 1 else 0) + m.groups * m.together) * m.bytes for m in stage)


def _undone(stage: list[_Membrane]) -> int:
    """Bytes of membranes that running a stage backwards holds at once."""
    return sum(m.bytes for m in stage) + max(m.bytes for m in stage)


def _undone_on_grid(stage: list[_Membrane]) -> int:
    """Bytes of membranes and unpacked digits that running a stage backwards on a grid holds at once."""
    calls = max(m.groups * m.together * m.pixels * m.channels for m in stage)
    return sum(m.bytes for m in stage) + calls


def _anchors(rebuild: Rebuild, dtype: torch.dtype, m: _Membrane) -> int:
    """Bytes that `inverse` keeps beside the bits of spikes."""
    return -(-m.calls // rebuild.distance(m.leak, dtype)) * m.bytes


def _digits(m: _Membrane) -> int:
    """Bytes that `integer` keeps beside the bits of spikes."""
    form = None if m.leak is None else grid_leak(m.leak)
    if form is None or form.digits > max(BITS):
        raise StrategyError("integer: it needs leak = 2^-m, at least 1/256, or 1 - 2^-m.")
    digits = next(bits for bits in BITS if bits >= form.digits)
    # every pixel of a call ends on a whole byte
    return m.bytes + m.calls * m.pixels * packed_length(m.channels, digits)


@contextmanager
def watched_currents(model: nn.Module, currents: Currents) -> Iterator[None]:
    """Note in `currents` what every neuron of `model` gets within the block."""
    handles = [
        m.register_forward_pre_hook(lambda m, inputs, n=name: currents.setdefault(n, []).append(tuple(inputs[0].shape)))
        for name, m in model.named_modules()
        if isinstance(m, SpikingNeuron)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
