"""The backward of blocks of two streams that keeps the last streams alone.

From (y1, y2) and their gradients, for "rev" ("para" swaps the streams of x):

    g = G(y1), with its graph    x2 = y2 - [g]    e1 = dy1 + (dG/dy1)^T dy2    (the graph of G is freed)
    f = F(x2), with its graph    x1 = y1 - [f]    dx1 = e1,  dx2 = dy2 + (dF/dx2)^T e1

Every sub-network runs once in forward and once in backward. Beside the last streams a checksum of each block's input is
kept, if it is asked for, and the state of the random generators where a sub-network draws.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from spikefit.errors import ReconstructionError, StrategyError
from spikefit.layers.chain import State, entries
from spikefit.layers.recompute import (
    TO_REPEAT,
    Surroundings,
    check_owned,
    drawn_since,
    random_state,
    replayed,
    tensors_read,
)
from spikefit.layers.two_streams import TwoStreams, halves
from spikefit.ops.checksum import checksum
from spikefit.ops.values import has_values

# two streams
Pair = tuple[Tensor, Tensor]


def run_reversible(blocks: TwoStreams, x: Tensor, state: State | None = None, *, check: bool = True):
    """As `blocks(x, state)`, with a backward that runs the blocks from the last to the first.

    Args:
        blocks: streams on a grid; without one the way back is not exact.
        x: streams side by side, [T, B, 2C, ...].
        state: one entry per sub-network, None for zeros.
        check: keep a checksum of the input of every block, and compare what backward gets with it.

    Raises:
        StrategyError: the streams have no grid.
        ReconstructionError: in backward, if a block did not get its input back; it is named.
    """
    check_grid("TwoStreams", blocks)
    if not torch.is_grad_enabled():
        return blocks(x, state)
    leaves, spec = tree_flatten(entries("TwoStreams", state, len(blocks.nets)))
    tensors = [tensors_read(net) for net in blocks.nets]
    call = _Call(blocks, check, spec, len(leaves), [list(named) for named in tensors], {})
    flat = [t for named in tensors for t in named.values()]
    streams, *after = _Reversible.apply(call, *blocks.entered(x), *leaves, *flat)
    return streams, tree_unflatten(after, call.found["state"])


def check_grid(who: str, blocks: TwoStreams) -> None:
    """Raise StrategyError if the streams of `blocks` have no grid."""
    if blocks.stream_grid is None:
        raise StrategyError(
            f"{who}: reversible needs streams on a grid, and these have none (stream_grid=None), so that differences "
            "round and a spike may flip on the way back; use stream_grid=14, or strategy='bptt' or 'checkpoint'."
        )


class _Call(NamedTuple):
    """A run without its tensors; forward notes the structure of the state behind it in `found`."""

    blocks: TwoStreams
    check: bool
    spec: TreeSpec
    states: int
    keys: list[list[str]]
    found: dict[str, TreeSpec]


class _Kept(NamedTuple):
    """What forward leaves for backward beside its inputs.

    Attributes:
        streams: the last ones, side by side.
        sums: checksums of both streams in front of every block, [blocks, 2] int64, or None.
        draws: per sub-network, states of the random generators before it ran, None if it did not draw.
    """

    streams: Tensor
    sums: Tensor | None
    draws: list[list[Tensor] | None]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, first, second, *tensors):
        before = tree_unflatten(list(tensors[: call.states]), call.spec)
        ctx.call, ctx.device = call, first.device
        ctx.surroundings = Surroundings.now(first.device.type, call.blocks.nets)
        sums: list[Tensor] = []
        draws: list[list[Tensor] | None] = []

        def run(i: int, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            generators = random_state(ctx.device)
            made = call.blocks.run(i, x, state)
            draws.append(generators if has_values(x) and drawn_since(generators, ctx.device) else None)
            return made

        after: list[Any] = []
        for i in range(0, len(before), 2):
            if call.check:
                sums.append(torch.stack([checksum_of(first), checksum_of(second)]))
            first, second, s = call.blocks.block(i, first, second, before[i : i + 2], run)
            after.extend(s)
        leaves, call.found["state"] = tree_flatten(tuple(after))
        streams = _joined(first, second)
        kept = _Kept(streams, torch.stack(sums) if sums else None, draws)
        saved, ctx.spec = tree_flatten((kept, tensors))
        ctx.save_for_backward(*saved)
        ctx.after = call.found["state"]
        ctx.set_materialize_grads(False)
        return streams, *leaves

    @staticmethod
    def backward(ctx, g, *q):
        if torch.is_grad_enabled():
            raise StrategyError(
                "reversible: rebuilt streams have no second derivative (create_graph=True); use strategy='bptt' with "
                "backend='reference'."
            )
        if g is None and all(one is None for one in q):
            return (None,) * len(ctx.needs_input_grad)
        with ctx.surroundings.again(ctx.call.blocks.nets):
            return None, *_Backward(ctx, g, list(q)).run()


class _Backward:
    """Walks blocks from the last to the first."""

    def __init__(self, ctx, g: Tensor | None, q: list[Tensor | None]) -> None:
        self.blocks, self.device = ctx.call.blocks, ctx.device
        self.kept, tensors = tree_unflatten(list(ctx.saved_tensors), ctx.spec)
        self.g = torch.zeros_like(self.kept.streams) if g is None else g
        self.states = tree_unflatten(list(tensors[: ctx.call.states]), ctx.call.spec)
        # gradients of what a sub-network leaves as state, in the structure of that state
        self.q = tree_unflatten(q, ctx.after)
        rest, wants = tensors[ctx.call.states :], ctx.needs_input_grad[3 + ctx.call.states :]
        leaves = (t.detach().requires_grad_(want) for t, want in zip(rest, wants, strict=True))
        self.tensors = [{key: next(leaves) for key in keys} for keys in ctx.call.keys]
        self.d_states: list[list[Tensor | None]] = [[] for _ in self.states]
        self.d_tensors: list[list[Tensor | None]] = [[] for _ in self.states]

    @torch.no_grad()
    def run(self) -> list[Tensor | None]:
        """Gradients of (first stream, second stream, states, tensors of the sub-networks)."""
        streams, gradients = halves(self.kept.streams), halves(self.g)
        for i in reversed(range(0, len(self.states), 2)):
            streams, gradients = self._block(i, streams, gradients)
        flat = [d for part in (self.d_states, self.d_tensors) for ds in part for d in ds]
        return [*gradients, *flat]

    def _block(self, i: int, y: Pair, dy: Pair) -> tuple[Pair, Pair]:
        """(streams in front of a block, their gradients) from those behind it."""
        g, d = self._through(i + 1, y[0], dy[1])
        changed, e = self.blocks.undone(y[1], g), dy[0] + d
        del g
        f, d = self._through(i, changed, e)
        kept, d_changed = self.blocks.undone(y[0], f), dy[1] + d
        x, dx = ((kept, changed), (e, d_changed)) if self.blocks.order == "rev" else ((changed, kept), (d_changed, e))
        self._compare(i // 2, x)
        return x, dx

    def _through(self, i: int, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """(output of sub-network `i` for the stream `x`, gradient of x from `d`, that of the output)."""
        net, tensors = self.blocks.nets[i], self.tensors[i]
        states, spec = tree_flatten(self.states[i])
        states = [s.detach().requires_grad_(s.is_floating_point()) if isinstance(s, Tensor) else s for s in states]
        x = x.detach().requires_grad_()
        with torch.enable_grad(), replayed(self.kept.draws[i], self.device):
            f, after = functional_call(net, tensors, (x, tree_unflatten(states, spec)))
        outs = [(f, d.to(f.dtype)), *zip(tree_flatten(after)[0], tree_flatten(self.q[i])[0], strict=True)]
        outs = [(out, one) for out, one in outs if one is not None and out.requires_grad]
        wanted = [x, *states, *tensors.values()]
        inputs = [t for t in wanted if isinstance(t, Tensor) and t.requires_grad]
        check_owned(f"reversible: {'FG'[i % 2]} of block {i // 2}", f, inputs)
        found: dict[int, Tensor | None] = {}
        if outs:
            made = torch.autograd.grad([o for o, _ in outs], inputs, [one for _, one in outs], allow_unused=True)
            found = dict(zip(map(id, inputs), made, strict=True))
        dx, *rest = [found.get(id(t)) for t in wanted]
        self.d_states[i], self.d_tensors[i] = rest[: len(states)], rest[len(states) :]
        return f.detach(), torch.zeros_like(x) if dx is None else dx

    def _compare(self, block: int, x: Pair) -> None:
        """Raise ReconstructionError unless `x` are the streams that the block got in forward."""
        if self.kept.sums is None or not has_values(x[0]):
            return
        found = torch.stack([checksum_of(stream) for stream in x])
        if not torch.equal(found, self.kept.sums[block]):
            raise ReconstructionError(
                f"reversible: the streams in front of block {block} came back with other bits, so the gradient would "
                "be wrong: a sub-network of that block gave another output when backward ran it again, or its output "
                f"was changed. {TO_REPEAT}"
            )


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """`side_by_side` as a tensor of its own: a view that a function returns could not be changed in place."""
    channels, order = first.shape[2], (0, 1, *range(3, first.ndim), 2)
    shape = (*first.shape[:2], 2 * channels, *first.shape[3:])
    made = torch.empty_permuted(shape, order, dtype=first.dtype, device=first.device)
    made[:, :, :channels], made[:, :, channels:] = first, second
    return made


def checksum_of(stream: Tensor) -> Tensor:
    """Checksum of a stream [T, B, C, ...] that lies channels last."""
    whole = torch.int64 if stream.dtype == torch.float64 else torch.int32
    return checksum(stream.movedim(2, -1).reshape(-1).view(whole))
