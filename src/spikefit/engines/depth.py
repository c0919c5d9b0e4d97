"""Chains in depth: blocks one after the other, each over the whole sequence."""

import difflib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikefit.errors import StrategyError
from spikefit.layers import SpikingUnit, frozen_statistics
from spikefit.layers.packed import Spikes, dense
from spikefit.ops.dispatch import resolve, use_backend

State = tuple[Any, ...]

KEEP_OPTIONS = ("auto", "input", "spikes")
# Multiply-accumulates per value of z up to which "auto" runs a weight again instead of keeping z: a first layer of
# colour images (27), not a 3x3 convolution of 64 channels (576).
CHEAP_MACS = 100


def run_plain(blocks: list[nn.Module], x: Tensor, state: State, option: str | None = None) -> tuple[Tensor, State]:
    """Run the blocks one after the other; each keeps for backward what autograd or its own `keep` says.

    Blocks with `takes_packed` hand each other packed spikes where they have them; the others get dense tensors.

    Args:
        blocks: modules (sequence, state) -> (sequence, state).
        x: [T, B, ...].
        state: one entry per block; None starts that block from zero.

    Returns:
        (output of the last block, state after the last step).
    """
    after = []
    value: Spikes = x
    for block, before in zip(blocks, state, strict=True):
        takes_packed = getattr(block, "takes_packed", False)
        value, s = block(value, before, packed=True) if takes_packed else block(dense(value), before)
        after.append(s)
    return dense(value), tuple(after)


def run_checkpointed(blocks: list[nn.Module], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """As `run_plain`, but keep only the input of every run of blocks; backward runs it again.

    The second pass repeats autocast and random numbers of the first and leaves running statistics alone, so output,
    gradient and buffers are those of `run_plain`.
    """
    if not torch.is_grad_enabled():
        return run_plain(blocks, x, state)
    length, backend = run_length(len(blocks), option), resolve("auto")
    after: list[Any] = []
    for i in range(0, len(blocks), length):
        run = slice(i, i + length)
        x, s = checkpoint(
            run_plain,
            blocks[run],
            x,
            state[run],
            use_reentrant=False,
            context_fn=partial(_contexts, blocks[run], backend),
        )
        after.extend(s)
    return x, tuple(after)


def _contexts(blocks: list[nn.Module], backend: str) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a run, and its repetition in backward, run in."""
    return nullcontext(), _second_pass(blocks, backend)


@contextmanager
def _second_pass(blocks: list[nn.Module], backend: str) -> Iterator[None]:
    """Statistics stand still, and `use_backend` is what it was in the first pass, wherever backward is called."""
    with frozen_statistics(blocks), use_backend(backend):
        yield


def run_length(blocks: int, option: str | None) -> int:
    """Blocks per run: the option, or the square root of their number, which balances inputs kept and states redone."""
    return max(1, math.isqrt(blocks)) if option is None else int(option)


def check_keep(option: str | None) -> None:
    """Raise StrategyError unless the option of `lean` is known."""
    if option is not None and option not in KEEP_OPTIONS and not option.endswith(".json"):
        near = difflib.get_close_matches(option, KEEP_OPTIONS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise StrategyError(
            f"strategy lean: the option is what a unit keeps, one of {', '.join(KEEP_OPTIONS)}, or a saved "
            f"plan (a .json file), got {option!r}.{hint}"
        )


def keep_of(unit: SpikingUnit, option: str | None) -> str:
    """What `unit` keeps under lean:option.

    "auto" recomputes where that is cheap: where a value of z costs few multiplications.
    """
    if option in ("input", "spikes"):
        return option
    return "spikes" if unit.synapse.weight[0].numel() <= CHEAP_MACS else "input"


def check_run_length(option: str | None) -> None:
    """Raise StrategyError unless the option is None or a whole number of at least 1."""
    if option is not None and not (option.isdecimal() and int(option) >= 1):
        raise StrategyError(
            f"strategy checkpoint: the option is the number of units per run, 1 or more, got {option!r}."
        )
