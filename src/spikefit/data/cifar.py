"""CIFAR-10 and CIFAR-100 in the publishers' Python batches, read without trusting them.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from spikefit.data.dataset import Dataset
from spikefit.data.download import torchvision_download
from spikefit.data.files import find_file, find_folder
from spikefit.errors import DataError

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
META = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def load_cifar(name: str, root: str | Path | None, split: str, *, download: bool = False) -> Dataset:
    """CIFAR-10 or CIFAR-100: images uint8 [n, 3, 32, 32]."""
    if download:
        torchvision_download(name.upper(), root)
    folder = find_folder(name, root, (FOLDERS[name],), "It is the publishers' Python version, unpacked.")
    images, labels = [], []
    for file in FILES[name, split]:
        path = find_file(name, folder, file)
        batch = read_batch(path)
        pixels, classes = batch.get("data"), batch.get(LABELS[name])
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.ndim != 2
            or pixels.shape[1] != 3072
        ):
            raise DataError(f"{name}: {path} must hold 'data' as uint8 [n, 3072]; unpack the data set again.")
        if not isinstance(classes, list) or len(classes) != len(pixels):
            raise DataError(f"{name}: {path} must hold {LABELS[name]!r} as a list of {len(pixels)} classes.")
        images.append(pixels)
        labels += classes
    file, key = META[name]
    return Dataset(
        name=f"{name} {split}",
        inputs=torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32)),
        targets=torch.tensor(labels, dtype=torch.int64),
        classes=[str(c) for c in read_batch(find_file(name, folder, file)).get(key, [])],
        kind="image",
        shape=(3, 32, 32),
    )


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary of a batch file; keys and strings as str, also where Python 2 wrote bytes.

    Raises:
        DataError: the file is damaged, or holds anything but arrays, lists, strings, bytes and numbers.
    """
    try:
        with warnings.catch_warnings():
            # numpy 2.4 and later warn about the integer `align` flag that old pickles of dtypes carry
            warnings.simplefilter("ignore")
            content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{error} ({path})") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"cifar: {path} is damaged ({type(error).__name__}: {error}); unpack it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"cifar: {path} must hold a dictionary, got {type(content).__name__}.")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}


def _empty_array(cls: Any, shape: Any, kind: Any) -> np.ndarray:
    """Stands for numpy's own reconstruction, which fills the array from the state that follows."""
    if cls is not np.ndarray:
        raise DataError("cifar: an array of a foreign class; expected plain arrays.")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _plain_dtype(*arguments: Any) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.hasobject:
        raise DataError("cifar: an array of Python objects; expected plain arrays of numbers.")
    return dtype


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise DataError("cifar: unexpected text encoding; expected latin1.")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Accepts numpy arrays of numbers, and what pickle builds without any import."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise DataError(
                f"cifar: the file asks for {module}.{name}, which a CIFAR batch never needs; it was not run. "
                "Fetch the file from its publisher"
            )
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("cifar: the file refers to something outside itself; fetch it from its publisher")
