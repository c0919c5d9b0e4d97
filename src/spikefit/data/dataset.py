"""The data set as a value: samples, targets, class names, and how a batch is made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spikefit.errors import DataError, OptionError

Kind = Literal["image", "sequence", "events"]


@dataclass(frozen=True)
class Dataset:
    """Samples and targets in memory (image folders: paths, decoded per batch).

    Attributes:
        name: name of the data set and split, for messages.
        inputs: images uint8 or float [n, C, H, W], sequences float32 [n, T, C], or a list with one entry per sample
            (event recordings; paths of images).
        targets: int64 [n], or [n, T] for labels of every step; -1 marks what has no label.
        classes: names, in the order of the targets.
        kind: "image", "sequence" or "events".
        shape: shape of one time step of one sample: (C, H, W) or (C,).
        note: what must be said beside any number on these data.
        mean, std: per channel, applied by `batch` after scaling images to [0, 1]; None for none.
        decode: makes one uint8 image [C, H, W] of an entry of `inputs`, where that is needed.

    Raises:
        DataError: no sample, another number of labels than samples, or a label that is no class.
    """

    name: str
    inputs: Tensor | list[Any]
    targets: Tensor
    classes: list[str]
    kind: Kind
    shape: tuple[int, ...]
    note: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    decode: Callable[[Any], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{self.name}: {len(self.inputs)} samples but {len(self.targets)} labels; is a file truncated?"
            )
        if len(self.inputs) == 0:
            raise DataError(f"{self.name}: the data set is empty; expected at least one sample.")
        top = int(self.targets.max())
        if top >= len(self.classes) or int(self.targets.min()) < -1:
            raise DataError(
                f"{self.name}: labels must lie in 0..{len(self.classes) - 1}, got {int(self.targets.min())}..{top}."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Any, Tensor]:
        """Samples and targets of `indices`: images [B, C, H, W] and sequences [B, T, C] float32, events a list.

        Raises:
            OptionError: mean or std with another number of values than channels.
            DataError: an image cannot be decoded.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        targets = self.targets[index]
        if isinstance(self.inputs, Tensor):
            x = self.inputs[index]
        elif self.decode is not None:
            x = torch.stack([self.decode(self.inputs[i]) for i in index.tolist()])
        else:
            return [self.inputs[i] for i in index.tolist()], targets
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if self.mean is not None or self.std is not None:
            x = (x - self._channels(self.mean, 0.0)) / self._channels(self.std, 1.0)
        return x, targets

    def limited(self, limit: int | None) -> "Dataset":
        """At most `limit` samples, spread evenly over the classes, the first ones of each; the same ones every time.

        Raises:
            OptionError: limit below 1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise OptionError(f"{self.name}: limit must be at least 1 sample, got {limit}.")
        keys = self.targets if self.targets.ndim == 1 else self.targets.amax(1)
        # rank of every sample inside its class; taking the lowest ranks first balances the classes
        order = torch.argsort(keys, stable=True)
        sizes = torch.unique_consecutive(keys[order], return_counts=True)[1]
        rank = torch.empty(len(self), dtype=torch.int64)
        rank[order] = torch.cat([torch.arange(int(n)) for n in sizes])
        chosen = torch.argsort(rank, stable=True)[:limit].sort().values
        inputs = self.inputs[chosen] if isinstance(self.inputs, Tensor) else [self.inputs[i] for i in chosen.tolist()]
        return replace(self, inputs=inputs, targets=self.targets[chosen])

    def _channels(self, values: tuple[float, ...] | None, default: float) -> Tensor:
        """Values per channel, shaped to broadcast over a batch."""
        channels = self.shape[0]
        values = (default,) * channels if values is None else tuple(values)
        if len(values) != channels:
            raise OptionError(
                f"{self.name}: mean and std need one value for each of {channels} channels, got {len(values)}."
            )
        v = torch.tensor(values, dtype=torch.float32)
        return v.view(-1, 1, 1) if self.kind == "image" else v


def image_tensor(name: str, pixels: np.ndarray) -> Tensor:
    """Numpy images [n, H, W] or [n, C, H, W] as a tensor [n, C, H, W] of its own memory.

    Raises:
        DataError: neither of the two shapes.
    """
    if pixels.ndim not in (3, 4):
        raise DataError(f"{name}: expected images [n, H, W] or [n, C, H, W], got {pixels.shape}.")
    x = torch.from_numpy(np.array(pixels))
    return x.unsqueeze(1) if x.ndim == 3 else x
