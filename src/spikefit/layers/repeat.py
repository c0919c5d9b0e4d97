"""A stretch of a network that keeps its input alone and runs again in backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from spikefit.errors import StrategyError
from spikefit.layers.norm import OnlineRenorm, again_from, starts_of
from spikefit.layers.recompute import unchanged_buffers
from spikefit.layers.running import Start
from spikefit.ops.dispatch import resolve, use_backend
from spikefit.ops.values import has_values

# Part of its largest possible value by which the mark of a sequence may move when the sequence is computed again.
SAME = 1e-6


def repeated(modules: list[nn.Module], function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which runs `modules`; only `args` are kept, and backward runs it again.

    The second pass repeats autocast and random numbers of the first and leaves running statistics alone.

    Raises:
        StrategyError: in backward, if a module of the user's own gives another output when it runs again.
    """
    own = [m for m in modules if not _repeats_itself(m)]
    contexts = partial(_contexts, modules, own, resolve("auto"), starts_of(modules))
    # a repetition that stops early would not reach the output of the last block
    with set_checkpoint_early_stop(not own):
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _repeats_itself(block: nn.Module) -> bool:
    """Whether it is made of modules of this library and of torch alone, which draw from torch's generators only."""
    return all(type(m).__module__.partition(".")[0] in ("spikefit", "torch") for m in block.modules())


def _contexts(
    blocks: list[nn.Module], own: list[nn.Module], backend: str, starts: dict[OnlineRenorm, Start]
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a run, and its repetitions in backward, run in; outputs of the blocks in `own` have to be the same."""
    marks: list[Mark | None] = []
    first = _watching(own, lambda block, inputs, output: marks.append(_mark(output[0])))
    return first, _EachTime(lambda: _second_pass(blocks, backend, starts, own, iter(marks)))


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
    blocks: list[nn.Module],
    backend: str,
    starts: dict[OnlineRenorm, Start],
    own: list[nn.Module],
    marks: "Iterator[Mark | None]",
) -> Iterator[None]:
    """Buffers stay as they are; `use_backend` and running statistics are those of the first pass."""
    watching = _watching(own, partial(_compare, marks))
    with unchanged_buffers(blocks), again_from(starts), use_backend(backend), watching:
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
