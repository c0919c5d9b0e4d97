"""Chains in depth: blocks one after the other, each over the whole sequence."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikefit.errors import StrategyError
from spikefit.layers import frozen_statistics

State = tuple[Any, ...]


def run_plain(blocks: list[nn.Module], x: Tensor, state: State, option: str | None = None) -> tuple[Tensor, State]:
    """Run the blocks and let autograd keep what it needs.

    Args:
        blocks: modules (sequence, state) -> (sequence, state).
        x: [T, B, ...].
        state: one entry per block; None starts that block from zero.

    Returns:
        (output of the last block, state after the last step).
    """
    after = []
    for block, before in zip(blocks, state, strict=True):
        x, s = block(x, before)
        after.append(s)
    return x, tuple(after)


def run_checkpointed(blocks: list[nn.Module], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """As `run_plain`, but keep only the input of every run of blocks; backward runs it again.

    The second pass repeats autocast and random numbers of the first and leaves running statistics alone, so output,
    gradient and buffers are those of `run_plain`.
    """
    if not torch.is_grad_enabled():
        return run_plain(blocks, x, state)
    length = run_length(len(blocks), option)
    after: list[Any] = []
    for i in range(0, len(blocks), length):
        run = slice(i, i + length)
        x, s = checkpoint(
            run_plain,
            blocks[run],
            x,
            state[run],
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), frozen_statistics()),
        )
        after.extend(s)
    return x, tuple(after)


def run_length(blocks: int, option: str | None) -> int:
    """Blocks per run: the option, or the square root of their number, which balances inputs kept and states redone."""
    return max(1, math.isqrt(blocks)) if option is None else int(option)


def check_run_length(option: str | None) -> None:
    """Raise StrategyError unless the option is None or a whole number of at least 1."""
    if option is not None and not (option.isdecimal() and int(option) >= 1):
        raise StrategyError(
            f"strategy checkpoint: the option is the number of units per run, 1 or more, got {option!r}."
        )
