"""Batches in a reproducible order: all that is random derives from (seed, epoch, batch index)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spikefit.data.dataset import Dataset
from spikefit.errors import OptionError

Augment = Callable[[Tensor, torch.Generator], Tensor]


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all `numbers`."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        # multiply and fold, as hash functions do, so that neighbouring numbers give unrelated streams
        state = (state ^ (n & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
    start: int = 0,
    augment: Sequence[Augment] = (),
) -> Iterator[tuple[int, Any, Tensor]]:
    """Yield (batch index, inputs, targets) of one epoch, from batch `start` on.

    The order depends on (seed, epoch) only, the augmentation of a batch on (seed, epoch, batch index) only; so a run
    that goes on at batch k sees the same data as one that was never stopped.

    Args:
        dataset: where the samples come from.
        batch_size: samples per batch; the last batch may be smaller.
        seed, epoch: choose the order.
        shuffle: False keeps the order of the data set.
        drop_last: leave out a smaller last batch.
        start: index of the first batch to yield.
        augment: functions (images [B, C, H, W], generator) -> images.

    Raises:
        OptionError: batch_size below 1, or larger than the data set with drop_last.
    """
    total = count_batches(dataset, batch_size, drop_last=drop_last)
    order = torch.randperm(len(dataset), generator=seeded(seed, epoch)) if shuffle else torch.arange(len(dataset))
    for index in range(start, total):
        x, y = dataset.batch(order[index * batch_size : (index + 1) * batch_size])
        generator = seeded(seed, epoch, index)
        for function in augment:
            x = function(x, generator)
        yield index, x, y


def count_batches(dataset: Dataset, batch_size: int, *, drop_last: bool = False) -> int:
    """Number of batches of an epoch, at least 1.

    Raises:
        OptionError: batch_size below 1, or larger than the data set with drop_last.
    """
    if batch_size < 1:
        raise OptionError(f"{dataset.name}: batch_size must be at least 1, got {batch_size}.")
    total = len(dataset) // batch_size if drop_last else -(-len(dataset) // batch_size)
    if total == 0:
        raise OptionError(
            f"{dataset.name}: batch_size {batch_size} leaves no batch of {len(dataset)} samples with drop_last; "
            "use a smaller one."
        )
    return total


def random_crop(padding: int = 4) -> Augment:
    """Shift every image by up to `padding` pixels in both directions, zeros coming in at the edge.

    Raises:
        OptionError: padding below 1.
    """
    if padding < 1:
        raise OptionError(f"random_crop: padding must be at least 1 pixel, got {padding}.")

    def crop(x: Tensor, generator: torch.Generator) -> Tensor:
        B, C, H, W = x.shape
        wide = torch.nn.functional.pad(x, (padding,) * 4)
        shift = torch.randint(0, 2 * padding + 1, (2, B, 1), generator=generator)
        rows, columns = shift[0] + torch.arange(H), shift[1] + torch.arange(W)
        b, c = torch.arange(B)[:, None, None, None], torch.arange(C)[None, :, None, None]
        return wide[b, c, rows[:, None, :, None], columns[:, None, None, :]]

    return crop


def horizontal_flip(p: float = 0.5) -> Augment:
    """Mirror every image with probability `p`.

    Raises:
        OptionError: p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise OptionError(f"horizontal_flip: p must lie in [0, 1], got {p}.")

    def flip(x: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(x), generator=generator) < p
        return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)

    return flip
