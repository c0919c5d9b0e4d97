"""Chains in depth: blocks one after the other, each over the whole sequence."""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from spikefit.errors import StrategyError
from spikefit.layers import SpikingUnit
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.recompute import unchanged_buffers
from spikefit.layers.shared import SharedStage
from spikefit.ops.dispatch import resolve, use_backend
from spikefit.ops.values import has_values

KEEP_OPTIONS = ("auto", "input", "spikes")
# Multiply-accumulates per value of z up to which "auto" runs a weight again instead of keeping z: a first layer of
# colour images (27), not a 3x3 convolution of 64 channels (576).
CHEAP_MACS = 100
# Part of its largest possible value by which the mark of a sequence may move when the sequence is computed again.
SAME = 1e-6


def run_plain(
    blocks: list[Any], x: Tensor, state: State, option: str | None = None, first: int = 0
) -> tuple[Tensor, State]:
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
        x, s = repeated(blocks[run], run_plain, blocks[run], x, state[run], None, first)
        after.extend(s)
    return x, tuple(after)


def repeated(blocks: list[Any], function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which runs `blocks`; only `args` are kept, and backward runs it again."""
    modules = modules_of(blocks)
    own = [m for m in modules if not _repeats_itself(m)]
    contexts = partial(_contexts, modules, own, resolve("auto"))
    # a repetition that stops early would not reach the output of the last block
    with set_checkpoint_early_stop(not own):
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def modules_of(blocks: list[Any]) -> list[nn.Module]:
    """The modules that blocks and stages run, in order."""
    return [m for block in blocks for m in (block.units if isinstance(block, SharedStage) else [block])]


def _repeats_itself(block: nn.Module) -> bool:
    """Whether it is made of modules of this library and of torch alone, which draw from torch's generators only."""
    return all(type(m).__module__.partition(".")[0] in ("spikefit", "torch") for m in block.modules())


def _contexts(
    blocks: list[nn.Module], own: list[nn.Module], backend: str
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a run, and its repetitions in backward, run in; outputs of the blocks in `own` have to be the same."""
    marks: list[Mark | None] = []
    first = _watching(own, lambda block, inputs, output: marks.append(_mark(output[0])))
    return first, _EachTime(lambda: _second_pass(blocks, backend, own, iter(marks)))


class _EachTime(AbstractContextManager):
    """A context made anew whenever it is entered: a graph that is retained goes backward more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.entered = self.make()
        self.entered.__enter__()

    def __exit__(self, *error) -> None:
        self.entered.__exit__(*error)


@contextmanager
def _second_pass(
    blocks: list[nn.Module], backend: str, own: list[nn.Module], marks: "Iterator[Mark | None]"
) -> Iterator[None]:
    """Buffers stay as they are, and `use_backend` is what it was in the first pass, wherever backward is called."""
    with unchanged_buffers(blocks), use_backend(backend), _watching(own, partial(_compare, marks)):
        yield


@contextmanager
def _watching(blocks: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Within the block, `hook` sees the outputs of `blocks`."""
    handles = [b.register_forward_hook(hook) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# (sums of every step under fixed weights, what they could be at most)
Mark = tuple[Tensor, Tensor]


def _mark(x: Tensor) -> Mark | None:
    """A few numbers by which a sequence is known again; None in a prediction, where nothing has a value."""
    if not has_values(x):
        return None
    x = x.detach().flatten(1)
    weights = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64, device=x.device)
    sums = torch.stack([step.double() @ weights for step in x])
    return sums, torch.stack([step.double().norm() for step in x]) * weights.norm()


def _compare(marks: Iterator[Mark | None], block: nn.Module, inputs: Any, output: Any) -> None:
    """Raise StrategyError unless the output of `block` is the one of the first pass."""
    wanted, got = next(marks), _mark(output[0])
    if wanted is not None and got is not None and bool(((got[0] - wanted[0]).abs() > SAME * wanted[1]).any()):
        raise StrategyError(
            f"strategy checkpoint: {type(block).__name__} gave another output when backward ran it again, so the "
            "gradient would be wrong. Draw random numbers from torch's generators only and keep no state between "
            "calls, or use strategy='lean', which never runs a block of your own again."
        )


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


def check_count(strategy: str, what: str) -> Callable[[str | None], None]:
    """A check that the option of `strategy`, the number of `what`, is None or a whole number of at least 1."""

    def check(option: str | None) -> None:
        if option is not None and not (option.isdecimal() and int(option) >= 1):
            raise StrategyError(f"strategy {strategy}: the option is the number of {what}, 1 or more, got {option!r}.")

    return check
