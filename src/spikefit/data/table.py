"""Data sets by name, as recipes write them."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from spikefit.data.arrays import load_npz
from spikefit.data.cifar import load_cifar
from spikefit.data.dataset import Dataset
from spikefit.data.digits import load_digits
from spikefit.data.har import load_hapt, load_uci_har
from spikefit.data.idx import load_idx
from spikefit.data.images import load_image_folder
from spikefit.data.nmnist import load_nmnist
from spikefit.errors import OptionError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class DatasetKind:
    """One row of the table: the reader `(root, split, **options)` and a line about it."""

    load: Callable[..., Dataset]
    summary: str


def _digits(root: str | Path | None, split: str) -> Dataset:
    return load_digits(split)


DATASETS: dict[str, DatasetKind] = {
    "digits": DatasetKind(_digits, "handwritten digits inside scikit-learn, 8x8; no download"),
    "mnist": DatasetKind(partial(load_idx, "mnist"), "IDX files, 28x28"),
    "fashion_mnist": DatasetKind(partial(load_idx, "fashion_mnist"), "IDX files, 28x28"),
    "cifar10": DatasetKind(partial(load_cifar, "cifar10"), "Python batches, 32x32 RGB"),
    "cifar100": DatasetKind(partial(load_cifar, "cifar100"), "Python batches, 32x32 RGB, fine labels"),
    "uci_har": DatasetKind(load_uci_har, "sensor windows of 128 steps, 9 channels, split by subject"),
    "hapt": DatasetKind(load_hapt, "continuous sensor recordings, 6 channels, a label per step"),
    "nmnist": DatasetKind(load_nmnist, "event-camera recordings, 34x34"),
    "npz": DatasetKind(load_npz, "your own arrays: x_train, y_train, x_test, y_test"),
    "image_folder": DatasetKind(load_image_folder, "your own images: <split>/<class>/<image>"),
}


def load_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    *,
    limit: int | None = None,
    mean: tuple[float, ...] | list[float] | None = None,
    std: tuple[float, ...] | list[float] | None = None,
    **options: Any,
) -> Dataset:
    """Read a data set from disk, in the layout its publishers ship.

    Args:
        name: a key of `DATASETS`; `spikefit list data` shows them.
        root: folder with the data; None takes $SPIKEFIT_DATA, else ./data.
        split: "train" or "test".
        limit: at most so many samples, spread evenly over the classes.
        mean, std: per channel; batches are (x - mean) / std, images after scaling to [0, 1].
        **options: those of the reader, such as download=True, length, file.

    Returns:
        Dataset.

    Raises:
        OptionError: unknown name, split or option; near names are listed.
        DataError: a file is missing, truncated, unsafe or empty.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"load_dataset: expected one of {', '.join(DATASETS)}, got {name!r}.{hint}")
    if split not in SPLITS:
        raise OptionError(f"load_dataset {name}: split must be 'train' or 'test', got {split!r}.")
    known = dataset_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(f"load_dataset {name}: unknown option {unknown[0]!r}; known: {', '.join(known) or 'none'}.")
    dataset = DATASETS[name].load(root, split, **options).limited(limit)
    if mean is not None or std is not None:
        if std is not None and min(std) <= 0:
            raise OptionError(f"load_dataset {name}: std must be > 0 in every channel, got {tuple(std)}.")
        dataset = replace(dataset, mean=_values(mean), std=_values(std))
        dataset.batch([0])
    return dataset


def _values(values: tuple[float, ...] | list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def dataset_options(name: str) -> list[str]:
    """Names of the options that the reader of `name`, a key of `DATASETS`, takes."""
    parameters = inspect.signature(DATASETS[name].load).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
