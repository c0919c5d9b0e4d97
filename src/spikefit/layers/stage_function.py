"""The backward of a stage that keeps spikes as bits and gets every membrane back from them.

    du_k = slope(u_k) ds_k + leak (1 - a theta slope(u_k)) du_{k+1}      (soft reset; a = 0 if it is detached)
    dx_k = gain du_k

over the calls k of a membrane, from the last to the first. x_k is computed again from the spikes that the layer read,
by the operations of forward; v_{k-1}, from which u_k follows, comes back in one of three ways: "replay" runs the calls
forward again with the spikes that were, "inverse" solves the equation of the neuron for it, "integer" does so on a grid
of whole numbers, where nothing is lost.

Source: the inverse is that of Kim et al. 2023, arXiv:2305.18360. Replay, grid and the bound of the inverse are ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from spikefit.errors import StrategyError, named
from spikefit.layers.branch import filled, template_of, tensors_of
from spikefit.layers.packed import PackedSpikes, Spikes, pooled_space
from spikefit.layers.rebuild import Rebuild, check_bound, digits_of, neuron_of
from spikefit.layers.recompute import Surroundings, tensors_read
from spikefit.layers.unit import Layer, SpikingUnit, pool_spikes
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.lif.grid_op import lif_on_grid, lif_on_grid_backward
from spikefit.ops.lif.op import checked_state, dynamics_of
from spikefit.ops.lif.reference import follow, undo
from spikefit.ops.packbits import pack, unpack
from spikefit.ops.values import has_values


class Flow(NamedTuple):
    """What a stage runs.

    Attributes:
        name: of the stage, for messages.
        layers, names: its layers of neurons and their paths.
        membranes: which membrane each layer uses.
        pieces: (first, last) steps that are run together, in order.
    """

    name: str
    layers: list[Layer]
    names: list[str]
    membranes: list[int]
    pieces: list[tuple[int, int]]

    def calls(self, membrane: int) -> int:
        """How often a membrane is visited."""
        groups = [neuron_of(n).groups for n, m in zip(self.layers, self.membranes, strict=True) if m == membrane]
        return self.pieces[-1][1] * sum(groups)


def run_rebuilt(
    flow: Flow, rebuild: Rebuild, x: Spikes, v: list[Tensor | None]
) -> tuple[PackedSpikes, list[Tensor | None]]:
    """Run the layers of `flow` from membranes `v`; returns (spikes of the last layer, membranes)."""
    cells = [_Cell(layer) for layer in flow.layers]
    tensors = [tensors_read(cell) for cell in cells]
    call = _Call(flow, rebuild, cells, [list(t) for t in tensors], template_of(x), len(v))
    carrier, bits, *after = _Rebuilt.apply(call, *tensors_of(x), *v, *(t for named in tensors for t in named.values()))
    last, shape = flow.layers[-1], after[flow.membranes[-1]].shape
    channels, pool = shape[1] * neuron_of(last).groups, last.unit.pool or ""
    return PackedSpikes(carrier, bits, channels, tuple(shape[2:]), pool, False, carrier.dtype), list(after)


class _Cell(nn.Module):
    """The current of a layer as a module of its own, to be called with the tensors that forward saw."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.unit, self.short, self.layer = layer.unit, layer.short, layer

    def forward(self, source: Tensor | None, shortcut: Tensor | None = None) -> Any:
        """The current [T, B, C, ...]; without a source (leak, gain) of the neuron."""
        return neuron_of(self.layer).coefficients() if source is None else self.layer.current(source, shortcut)


class _Call(NamedTuple):
    """A run of a flow without its tensors."""

    flow: Flow
    rebuild: Rebuild
    cells: list[_Cell]
    keys: list[list[str]]
    template: Spikes
    membranes: int

    def named(self, flat: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
        """The tensors of every layer by name."""
        rest = iter(flat)
        return [{key: next(rest) for key in keys} for keys in self.keys]


class _Kept(NamedTuple):
    """What forward leaves for backward.

    Attributes:
        bits: spikes of every layer, [T, B * pixels, ceil(C / 8)] uint8.
        anchors: per membrane, number of calls done -> the membrane then.
        digits: per membrane and visit of a layer, what its calls lost on the grid, packed.
    """

    bits: list[Tensor]
    anchors: list[dict[int, Tensor]]
    digits: list[list[Tensor]]


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, source, source_bits, *tensors):
        v_0, flat = tensors[: call.membranes], tensors[call.membranes :]
        ctx.surroundings = Surroundings.now(source.device.type, call.cells)
        walk = _Forward(call, filled(call.template, source, source_bits), list(v_0), call.named(flat))
        kept, v_T = walk.run()
        saved, ctx.spec = tree_flatten((source, source_bits, v_0, kept, flat))
        ctx.save_for_backward(*saved)
        ctx.call, ctx.dtype = call, walk.currents[-1].dtype
        ctx.shapes = [tuple(c.shape[1:]) for c in walk.currents]
        ctx.mark_non_differentiable(kept.bits[-1])
        ctx.set_materialize_grads(False)
        return walk.carrier(len(kept.bits[-1])), kept.bits[-1], *v_T

    @staticmethod
    def backward(ctx, g, _bits, *q):
        name = ctx.call.rebuild.name
        if torch.is_grad_enabled():
            raise StrategyError(
                f"{name}: rebuilt membranes have no second derivative (create_graph=True); use strategy='bptt' with "
                "backend='reference'."
            )
        if g is None and all(one is None for one in q):
            return (None,) * len(ctx.needs_input_grad)
        with ctx.surroundings.again(ctx.call.cells):
            return None, *_Backward(ctx, g, list(q)).run()


class Watcher:
    """Is told what rebuilt stages do, which hooks of modules do not see; see `watched`."""

    def entered(self, unit: SpikingUnit, phase: str) -> None:
        """`unit` runs now; phase is "forward" or "backward"."""

    def fired(self, unit: SpikingUnit, spikes: Tensor) -> None:
        """`unit` has fired `spikes`, behind its pool, in some steps of a forward."""


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=Watcher())  # noqa: B039 (it has no state)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` what rebuilt stages do within the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class _Forward:
    """Runs the layers piece by piece and leaves spikes as bits, anchors and digits."""

    def __init__(self, call: _Call, x: Spikes, v: list[Tensor | None], tensors: list[dict[str, Tensor]]) -> None:
        self.call, self.flow, self.x, self.v, self.tensors = call, call.flow, x, v, tensors
        # one empty current per layer, for its shape and dtype
        self.currents: list[Tensor] = []
        self.anchors: list[dict[int, Tensor]] = [{} for _ in v]
        self.digits: list[list[Tensor]] = [[] for _ in v]
        self.done, self.total = [0] * len(v), [call.flow.calls(m) for m in range(len(v))]
        self.largest: list[list[Tensor]] = [[] for _ in v]

    def run(self) -> tuple[_Kept, list[Tensor]]:
        """(what is kept, membranes after the last step)."""
        rows: list[list[Tensor]] = [[] for _ in self.flow.layers]
        for piece in self.flow.pieces:
            values, self.currents = [_steps(self.x, *piece)], []
            for i, layer in enumerate(self.flow.layers):
                _watcher.get().entered(layer.unit, "forward")
                shortcut = None if layer.shortcut is None else values[layer.shortcut]
                current = functional_call(self.call.cells[i], self.tensors[i], (values[layer.source], shortcut))
                with named(self.flow.names[i]):
                    spikes = self._fire(i, current)
                rows[i].append(_in_bits(spikes))
                values.append(pool_spikes(spikes, layer.unit.pool))
                _watcher.get().fired(layer.unit, values[-1])
                self.currents.append(current[:0])
        if self.call.rebuild.name == "inverse":
            self._check_range()
        bits = [made[0] if len(made) == 1 else torch.cat(made) for made in rows]
        return _Kept(bits, self.anchors, self.digits), cast(list[Tensor], self.v)

    def _fire(self, i: int, current: Tensor) -> Tensor:
        """Spikes of a layer in a piece; its membrane moves on."""
        layer, m = self.flow.layers[i], self.flow.membranes[i]
        neuron = neuron_of(layer)
        if self.call.rebuild.name == "replay":
            spikes, self.v[m] = neuron(current, self.v[m])
            return spikes
        x = neuron.in_turn(current)
        v = checked_state("lif", x, self.v[m])
        if self.call.rebuild.name == "integer":
            spikes, self.v[m] = self._fire_on_grid(neuron, m, x, v)
            return neuron.side_by_side(spikes)
        made = []
        for k in range(len(x)):
            spikes, v = lif(x[k : k + 1], v, **neuron.options())
            self._keep_anchor(neuron, m, v, spikes[0])
            made.append(spikes)
        self.v[m] = v
        return neuron.side_by_side(torch.cat(made))

    def _fire_on_grid(self, neuron: SpikingNeuron, m: int, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(spikes, membrane) behind the calls `x`; what they lose is kept, and the membrane behind the last of all."""
        spikes, v, lost = lif_on_grid(x, v, dynamics_of(x, **neuron.options()), neuron.backend)
        self.digits[m].append(pack(lost.movedim(2, -1), digits_of(neuron), check=False))
        self.done[m] += len(x)
        if self.done[m] == self.total[m]:
            self.anchors[m][self.done[m]] = v
        return spikes, v

    def _keep_anchor(self, neuron: SpikingNeuron, m: int, after: Tensor, s: Tensor) -> None:
        """Keep the membrane behind this call if the inverse starts from it."""
        self.done[m] += 1
        every = self.call.rebuild.distance(float(neuron.coefficients()[0]), after.dtype)
        self.largest[m].append((after + neuron.v_threshold * s.to(after.dtype)).abs().amax())
        if (self.total[m] - self.done[m]) % every == 0:
            self.anchors[m][self.done[m]] = after

    def _check_range(self) -> None:
        """Raise StrategyError if membranes went beyond what the bound of the inverse was checked for."""
        for i, (name, layer) in enumerate(zip(self.flow.names, self.flow.layers, strict=True)):
            seen = self.largest[self.flow.membranes[i]]
            if has_values(seen[0]):
                dtype = cast(Tensor, self.v[self.flow.membranes[i]]).dtype
                leak = float(neuron_of(layer).coefficients()[0])
                check_bound(name, leak, self.call.rebuild, float(torch.stack(seen).amax()), dtype)

    def carrier(self, timesteps: int) -> Tensor:
        """A tensor of the shape of the result, without memory."""
        last = self.currents[-1]
        space = pooled_space(tuple(last.shape[3:]), self.flow.layers[-1].unit.pool or "")
        return last.new_zeros(()).expand(timesteps, *last.shape[1:3], *space)


class _Opened(NamedTuple):
    """The current of a layer in a piece, with its graph: tensors by name, what it read, and what came out."""

    tensors: dict[str, Tensor]
    source: Tensor
    shortcut: Tensor | None
    current: Tensor


class _Backward:
    """Walks pieces and layers from the last to the first."""

    def __init__(self, ctx, g: Tensor | None, q: list[Tensor | None]) -> None:
        self.call, self.flow, self.dtype, self.shapes = ctx.call, ctx.call.flow, ctx.dtype, ctx.shapes
        source, source_bits, self.v_0, self.kept, flat = tree_unflatten(list(ctx.saved_tensors), ctx.spec)
        self.x, self.tensors = filled(self.call.template, source, source_bits), self.call.named(flat)
        self.g, self.q = g, q
        self.want_source, self.wants = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        self.d_source: Tensor | None = None
        self.d_tensors: list[dict[str, Tensor]] = [{} for _ in self.tensors]
        # for membranes that are run backwards: calls done, and the membrane behind the last of them
        self.done = [self.flow.calls(m) for m in range(self.call.membranes)]
        self.v: list[Tensor | None] = [None] * self.call.membranes
        # pieces of digits that are still to be undone
        self.visits = [len(pieces) for pieces in self.kept.digits]

    @torch.no_grad()
    def run(self) -> list[Tensor | None]:
        """Gradients of (source, bits, membranes, tensors of the layers)."""
        starts = self._starts() if self.call.rebuild.name == "replay" else None
        for piece in reversed(range(len(self.flow.pieces))):
            self._piece(piece, None if starts is None else starts[piece])
        states = [q if want else None for q, want in zip(self.q, self.wants, strict=False)]
        found = [d.get(key) for d, keys in zip(self.d_tensors, self.call.keys, strict=True) for key in keys]
        return [self.d_source, None, *states, *found]

    def _starts(self) -> list[list[Tensor | None]]:
        """The membranes before every piece: the calls of all but the last piece once more, forward."""
        v = list(self.v_0)
        starts = [list(v)]
        for piece in range(len(self.flow.pieces) - 1):
            for i, m in enumerate(self.flow.membranes):
                current = functional_call(self.call.cells[i], self.tensors[i], self._inputs(i, piece))
                v[m] = self._followed(i, current, v[m], piece)
            starts.append(list(v))
        return starts

    def _piece(self, piece: int, start: list[Tensor | None] | None) -> None:
        flow, opened = self.flow, dict[int, _Opened]()
        before: list[Tensor | None] = [None] * len(flow.layers)
        if start is not None:
            one_after_another = len(set(flow.membranes)) < len(flow.layers)
            for i, m in enumerate(flow.membranes):
                before[i] = start[m]
                if one_after_another:
                    # what one layer leaves the next one finds, so all graphs of this step are made on the way
                    opened[i] = self._open(i, piece)
                    start[m] = self._followed(i, opened[i].current.detach(), start[m], piece)
        # output of layer k (k = 0: the input of the stage) -> its gradient in this piece
        gradients: dict[int, Tensor] = {}
        if self.g is not None:
            gradients[len(flow.layers)] = self.g[self._rows(piece)]
        for i in reversed(range(len(flow.layers))):
            layer = opened.pop(i) if i in opened else self._open(i, piece)
            dx = self._through_neuron(i, layer.current.detach(), gradients.pop(i + 1, None), before[i], piece)
            self._through_current(i, layer, dx, gradients)
        if 0 in gradients and self.want_source:
            self._add_source(gradients[0], piece)

    def _open(self, i: int, piece: int) -> _Opened:
        _watcher.get().entered(self.flow.layers[i].unit, "backward")
        layer, (source, shortcut) = self.flow.layers[i], self._inputs(i, piece)
        source = source.detach().requires_grad_(layer.source > 0 or self.want_source)
        if shortcut is not None:
            shortcut = shortcut.detach().requires_grad_(layer.shortcut != 0 or self.want_source)
        tensors = {key: t.detach().requires_grad_(t.requires_grad) for key, t in self.tensors[i].items()}
        with torch.enable_grad():
            current = functional_call(self.call.cells[i], tensors, (source, shortcut))
        return _Opened(tensors, source, shortcut, current)

    def _through_neuron(self, i: int, current: Tensor, g: Tensor | None, before: Tensor | None, piece: int) -> Tensor:
        """dL/d(current) of a layer; the gradient of its membrane moves to before its calls."""
        layer, m = self.flow.layers[i], self.flow.membranes[i]
        neuron, spikes = neuron_of(layer), self._spikes(i, piece)
        g = _through_pool(spikes, g, layer.unit.pool)
        g, x, s = neuron.in_turn(g), neuron.in_turn(current), neuron.in_turn(spikes)
        leak, gain = functional_call(self.call.cells[i], self.tensors[i], (None,))
        options = neuron.options() | {"leak": leak, "gain": gain}
        if self.call.rebuild.name == "replay":
            d = lif_backward(g, self.q[m], x, before, s, **options)
            self.q[m] = d.v_0
            self._add_coefficients(i, d.leak, d.gain)
            return neuron.side_by_side(d.x)
        if self.call.rebuild.name == "integer":
            return neuron.side_by_side(self._through_grid(m, neuron, g, x, s))
        made = []
        for k in reversed(range(len(x))):
            v = self._undone(i, x[k], s[k], options)
            d = lif_backward(g[k : k + 1], self.q[m], x[k : k + 1], v, s[k : k + 1], **options)
            self.q[m] = d.v_0
            self._add_coefficients(i, d.leak, d.gain)
            made.append(d.x)
        return neuron.side_by_side(torch.cat(made[::-1]))

    def _through_grid(self, m: int, neuron: SpikingNeuron, g: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """dL/dx of the last calls that are not undone yet; membrane and its gradient move to before them."""
        after = self.kept.anchors[m].get(self.done[m], self.v[m])
        lost = unpack(self.kept.digits[m][self.visits[m] - 1], x.shape[2], digits_of(neuron), dtype=torch.uint8)
        self.done[m], self.visits[m] = self.done[m] - len(x), self.visits[m] - 1
        dx, self.q[m], self.v[m] = lif_on_grid_backward(
            g,
            self.q[m],
            x,
            cast(Tensor, after),
            s,
            lost.movedim(-1, 2),
            dynamics_of(x, **neuron.options()),
            neuron.backend,
        )
        return dx

    def _undone(self, i: int, x: Tensor, s: Tensor, options: dict[str, Any]) -> Tensor:
        """The membrane before the last call that is not undone yet, which was `x` and fired `s`."""
        m, neuron = self.flow.membranes[i], neuron_of(self.flow.layers[i])
        after = cast(Tensor, self.kept.anchors[m].get(self.done[m], self.v[m]))
        self.done[m] -= 1
        before = undo(
            x,
            after,
            s,
            leak=options["leak"],
            gain=options["gain"],
            v_threshold=neuron.v_threshold,
            equation=neuron.equation(),
        )
        self.v[m] = before
        return before

    def _followed(self, i: int, current: Tensor, v: Tensor | None, piece: int) -> Tensor:
        """The membrane of a layer behind a piece, with the spikes that were."""
        neuron = neuron_of(self.flow.layers[i])
        x, s = neuron.in_turn(current), neuron.in_turn(self._spikes(i, piece))
        v = x.new_zeros(x.shape[1:], dtype=compute_dtype(x.dtype)) if v is None else v
        leak, gain = functional_call(self.call.cells[i], self.tensors[i], (None,))
        return follow(x, v, s, leak=leak, gain=gain, v_threshold=neuron.v_threshold, equation=neuron.equation())

    def _through_current(self, i: int, layer: _Opened, dx: Tensor, gradients: dict[int, Tensor]) -> None:
        """Gradients of what a layer read and of its tensors, from that of its current."""
        place, named = self.flow.layers[i], layer.tensors
        inputs = [("", layer.source), *named.items()]
        if layer.shortcut is not None and layer.shortcut.requires_grad:
            inputs.append((" ", layer.shortcut))
        inputs = [(key, t) for key, t in inputs if t.requires_grad]
        if not inputs:
            return
        made = torch.autograd.grad(layer.current, [t for _, t in inputs], dx, allow_unused=True)
        for (key, _), d in zip(inputs, made, strict=True):
            if d is None:
                continue
            if key.strip():
                _sum_up(self.d_tensors[i], key, d)
            else:
                _add(gradients, cast(int, place.shortcut if key else place.source), d)

    def _add_coefficients(self, i: int, d_leak: Tensor, d_gain: Tensor) -> None:
        """Gradients of what a neuron learns, from those of its leak and gain."""
        own = {key: t for key, t in self.tensors[i].items() if key.startswith("unit.neuron.") and t.requires_grad}
        if not own:
            return
        leaves = {key: t.detach().requires_grad_() for key, t in own.items()}
        with torch.enable_grad():
            pair = functional_call(self.call.cells[i], self.tensors[i] | leaves, (None,))
        outs = [(c, d) for c, d in zip(pair, (d_leak, d_gain), strict=True) if isinstance(c, Tensor)]
        made = torch.autograd.grad(
            [c for c, _ in outs], list(leaves.values()), [d.to(c.dtype) for c, d in outs], allow_unused=True
        )
        for key, d in zip(leaves, made, strict=True):
            if d is not None:
                _sum_up(self.d_tensors[i], key, d)

    def _add_source(self, d: Tensor, piece: int) -> None:
        if len(self.flow.pieces) == 1:
            self.d_source = d
            return
        if self.d_source is None:
            strides = d.stride()
            order = sorted(range(1, d.ndim), key=lambda axis: (-strides[axis], axis))
            shape = (self.flow.pieces[-1][1], *d.shape[1:])
            self.d_source = torch.empty_permuted(shape, (0, *order), dtype=d.dtype, device=d.device)
        self.d_source[slice(*self.flow.pieces[piece])] = d

    def _rows(self, piece: int) -> slice:
        # the one piece of a weight that reaches over time may end with another number of steps
        return slice(None) if len(self.flow.pieces) == 1 else slice(*self.flow.pieces[piece])

    def _spikes(self, i: int, piece: int) -> Tensor:
        """Spikes of a layer in a piece, [k, B, C, ...]."""
        batch, channels, *space = self.shapes[i]
        made = unpack(self.kept.bits[i][self._rows(piece)], channels, dtype=self.dtype)
        return made.unflatten(1, (batch, *space)).movedim(-1, 2)

    def _inputs(self, i: int, piece: int) -> tuple[Tensor, Tensor | None]:
        """What a layer read in a piece."""
        layer = self.flow.layers[i]
        return self._value(layer.source, piece), None if layer.shortcut is None else self._value(layer.shortcut, piece)

    def _value(self, k: int, piece: int) -> Tensor:
        if k == 0:
            return _steps(self.x, *self.flow.pieces[piece])
        return pool_spikes(self._spikes(k - 1, piece), self.flow.layers[k - 1].unit.pool)


def _steps(x: Spikes, first: int, last: int) -> Tensor:
    return x.steps(first, last) if isinstance(x, PackedSpikes) else x[first:last]


def _in_bits(spikes: Tensor) -> Tensor:
    """[k, B, C, ...] -> [k, B * pixels, ceil(C / 8)]."""
    return pack(spikes.movedim(2, -1).flatten(1, -2), check=False)


def _through_pool(spikes: Tensor, g: Tensor | None, pool: str | None) -> Tensor:
    """The gradient of spikes from that of their pool; zeros if there is none."""
    if g is None:
        return spikes.new_zeros(()).expand_as(spikes)
    if pool is None:
        return g
    with torch.enable_grad():
        leaf = spikes.detach().requires_grad_()
        (made,) = torch.autograd.grad(pool_spikes(leaf, pool), leaf, g)
    return made


def _add(total: dict[int, Tensor], key: int, d: Tensor) -> None:
    # not in place: what flows along a shortcut is the same tensor as what it was added to
    total[key] = d if key not in total else total[key] + d


def _sum_up(total: dict[str, Tensor], key: str, d: Tensor) -> None:
    """Add the gradient of a parameter in place, which no graph shares."""
    total[key] = d if key not in total else total[key].add_(d)
