"""Blocks one after the other, as one block."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, StateError, named
from spikefit.layers.packed import Spikes, dense

State = tuple[Any, ...]


def run_blocks(
    blocks: Iterable[Any],
    x: Spikes,
    state: State,
    names: Iterable[str] = repeat(""),
    options: Callable[[Any], dict[str, Any]] = lambda block: {},
) -> tuple[Tensor, State]:
    """Run blocks one after the other; each keeps for backward what autograd or its own `keep` says.

    Blocks with `takes_packed` hand each other packed spikes where they have them; the others get dense tensors.

    Args:
        blocks: modules (sequence, state) -> (sequence, state).
        x: [T, B, ...].
        state: one entry per block; None starts that block from zero.
        names: how messages call the blocks; "" for those that name themselves.
        options: further keyword arguments of a block.

    Returns:
        (output of the last block, state after the last step).
    """
    after = []
    value: Spikes = x
    for (block, before), name in zip(zip(blocks, state, strict=True), names, strict=False):
        further = options(block)
        with named(name) if name else nullcontext():
            if getattr(block, "takes_packed", False):
                value, s = block(value, before, packed=True, **further)
            else:
                value, s = block(dense(value), before, **further)
        after.append(s)
    return dense(value), tuple(after)


class Chain(nn.Module):
    """Blocks one after the other as one block, for example a sub-network of a `TwoStreams`.

    Args:
        *blocks: modules (sequence, state) -> (sequence, state) with `init_state`: units, neurons, layers, your own.

    Shapes:
        [T, B, ...] -> what the last block returns; state: one entry per block.

    Raises:
        OptionError: no block.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        if not blocks:
            raise OptionError("Chain: expected at least one block, got none.")
        self.blocks = nn.ModuleList(blocks)

    @property
    def consumes_time(self) -> bool:
        """Whether a block needs all time steps at once."""
        return any(getattr(block, "consumes_time", False) for block in self.blocks)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Sequence and state (None for zeros) -> (sequence, state)."""
        return run_blocks(self.blocks, x, entries("Chain", state, len(self.blocks)))

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[State, tuple[int, ...]]:
        """(state of every block, shape of one output sample)."""
        made = []
        for block in self.blocks:
            state, shape = block.init_state(batch_size, shape, device=device, dtype=dtype)  # type: ignore[operator]
            made.append(state)
        return tuple(made), shape


def entries(who: str, state: Any, count: int) -> State:
    """The `count` entries of a state, all None if there is none.

    Raises:
        StateError: a state of another kind or length.
    """
    if state is None:
        return (None,) * count
    if not isinstance(state, tuple) or len(state) != count:
        got = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise StateError(
            f"{who}: expected a state of {count} entries, got {got}. Pass what the last call returned, or None to "
            "start from zero."
        )
    return state
