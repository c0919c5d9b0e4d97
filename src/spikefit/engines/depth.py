"""Chains in depth: blocks one after the other, each over the whole sequence."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import StrategyError
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.keeping import Keeping
from spikefit.layers.repeat import repeated
from spikefit.layers.shared import SharedStage
from spikefit.layers.window_block import WindowSpike
from spikefit.layers.window_parts import Stream

KEEP_OPTIONS = ("auto", "input", "spikes")
# Multiply-accumulates per value of z up to which "auto" runs a weight again instead of keeping z: a first layer of
# colour images (27), not a 3x3 convolution of 64 channels (576).
CHEAP_MACS = 100


def run_plain(blocks: list[Any], x: Any, state: State, option: str | None = None, first: int = 0) -> tuple[Any, State]:
    """Run blocks, and stages of them, one after the other, each by itself; see `spikefit.layers.chain.run_blocks`.

    `first` is the number of the first block in its network, for messages.
    """
    return run_blocks(blocks, x, state, names_of(blocks, first))


def names_of(blocks: Iterable[Any], first: int = 0) -> list[str]:
    """How messages call the blocks; a stage names its layers itself."""
    names = []
    for block in blocks:
        names.append("" if isinstance(block, SharedStage) else f"blocks.{first}")
        first += _count(block)
    return names


def _count(block: Any) -> int:
    """Number of blocks of the network that it stands for."""
    return block.count if isinstance(block, SharedStage) else 1


def run_checkpointed(blocks: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """As `run_plain`, but keep only the input of every run of blocks; backward runs it again.

    The second pass repeats autocast and random numbers of the first and leaves running statistics alone, so output,
    gradient and buffers are those of `run_plain`.

    Raises:
        StrategyError: in backward, if a block of the user's own gives another output when it runs again.
    """
    if not torch.is_grad_enabled():
        return run_plain(blocks, x, state)
    length = run_length(len(blocks), option)
    after: list[Any] = []
    for i in range(0, len(blocks), length):
        run, first = slice(i, i + length), sum(map(_count, blocks[:i]))
        # tensors inside a tuple would be held without being seen by those who count what is saved
        parts = x if isinstance(x, Stream) else (x, None)
        x, s = repeated(modules_of(blocks[run]), _run_parts, blocks[run], state[run], first, *parts)
        after.extend(s)
    return x, tuple(after)


def _run_parts(blocks: list[Any], state: State, first: int, x: Tensor, memory: Tensor | None) -> tuple[Tensor, State]:
    """`run_plain` of a sequence and the membranes that may come with it."""
    return run_plain(blocks, x if memory is None else Stream(x, memory), state, None, first)


def modules_of(blocks: list[Any]) -> list[nn.Module]:
    """The modules that blocks and stages run, in order."""
    return [m for block in blocks for m in (block.units if isinstance(block, SharedStage) else [block])]


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


def keep_of(unit: Keeping, option: str | None) -> str:
    """What `unit` keeps under lean:option.

    "auto" recomputes where that is cheap: where a value of z costs few multiplications. Blocks of windows keep bits and
    the stream between them.
    """
    if isinstance(unit, WindowSpike):
        return "spikes"
    if option in ("input", "spikes"):
        return option
    return "spikes" if unit.synapse.weight[0].numel() <= CHEAP_MACS else "input"


def check_count(strategy: str, what: str) -> Callable[[str | None], None]:
    """A check that the option of `strategy`, the number of `what`, is None or a whole number of at least 1."""

    def check(option: str | None) -> None:
        if option is not None and not (option.isdecimal() and int(option) >= 1):
            raise StrategyError(f"strategy {strategy}: the option is the number of {what}, 1 or more, got {option!r}.")

    return check
