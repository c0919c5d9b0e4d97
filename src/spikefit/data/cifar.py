"""CIFAR-10 and CIFAR-100 in the publishers' Python batches, read without trusting them.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

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
CLASSES = {"cifar10": 10, "cifar100": 100}


def load_cifar(name: str, root: str | Path | None, split: str, *, download: bool = False) -> Dataset:
    """CIFAR-10 or CIFAR-100: images uint8 [n, 3, 32, 32].

    Raises:
        DataError: a file is missing, damaged or unsafe, or does not hold images and classes; or it cannot be fetched.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    if download:
        torchvision_download(name.upper(), root)
    folder = find_folder(name, root, (FOLDERS[name],), "It is the publishers' Python version, unpacked.")
    images: list[np.ndarray] = []
    labels: list[int] = []
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
            raise DataError(
                f"{name}: {path} must hold 'data' as uint8 [n, 3072], got {_told(pixels)}; unpack the data set again."
            )
        if (
            not isinstance(classes, list)
            or len(classes) != len(pixels)
            or not all(type(c) is int and 0 <= c < CLASSES[name] for c in classes)
        ):
            raise DataError(
                f"{name}: {path} must hold {LABELS[name]!r} as a list of {len(pixels)} classes, numbers from 0 to "
                f"{CLASSES[name] - 1}, got {_told(classes)}; unpack the data set again."
            )
        images.append(pixels)
        labels += classes
    file, key = META[name]
    path = find_file(name, folder, file)
    names = read_batch(path).get(key)
    if not isinstance(names, list) or len(names) != CLASSES[name]:
        raise DataError(
            f"{name}: {path} must hold {key!r} as a list of {CLASSES[name]} names, got {_told(names)}; "
            "unpack the data set again."
        )
    return Dataset(
        name=f"{name} {split}",
        inputs=torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32)),
        targets=torch.tensor(labels, dtype=torch.int64),
        classes=[str(c) for c in names],
        kind="image",
        shape=(3, 32, 32),
    )


def _told(value: Any) -> str:
    """What came instead, for messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, list):
        return f"a list of {len(value)}, {value[:3]}"[:80]
    return "nothing" if value is None else type(value).__name__


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
    return {
        k.decode("latin1") if isinstance(k, bytes) else str(k): v.values if isinstance(v, _PlainArray) else v
        for k, v in content.items()
    }


class _PlainDtype:
    """Stands for a dtype of numbers; the state that follows tells its byte order."""

    def __init__(self, *arguments: Any) -> None:
        self.dtype = np.dtype(*arguments)
        if self.dtype.kind not in "biuf":
            raise DataError("cifar: an array of Python objects or texts; expected plain arrays of numbers.")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PlainArray:
    """Stands for an array: its values are read from the state that follows, and numpy's own loading never runs.

    numpy trusts the state of a pickled array or dtype, and a crafted one lets it read memory that is not there.
    """

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _PlainDtype) or not isinstance(raw, bytes):
            raise DataError("cifar: an array of Python objects; expected plain arrays of numbers.")
        # a copy, because a view of bytes cannot be written to
        values = np.frombuffer(raw, dtype.dtype).copy()
        self.values = values.reshape(shape, order="F" if column_major else "C")


# What stands for numpy.ndarray in a file: a name that nothing can call.
_ARRAY_CLASS = "numpy.ndarray"


class _PlainUnpickler(pickle.Unpickler):
    """Accepts arrays of numbers, and what pickle builds without any import."""

    def find_class(self, module: str, name: str) -> Any:
        # methods and a text, because a file could change the attributes of a class or a function
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy._core.multiarray", "_reconstruct"): self._array,
            ("numpy", "ndarray"): _ARRAY_CLASS,
            ("numpy", "dtype"): self._dtype,
            ("_codecs", "encode"): self._latin1,
        }
        if (module, name) not in allowed:
            raise DataError(
                f"cifar: the file asks for {module}.{name}, which a CIFAR batch never needs; it was not run. "
                "Fetch the file from its publisher"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("cifar: the file refers to something outside itself; fetch it from its publisher")

    def _array(self, cls: Any, shape: Any, kind: Any) -> _PlainArray:
        if cls != _ARRAY_CLASS:
            raise DataError("cifar: an array of a foreign class; expected plain arrays.")
        return _PlainArray()

    def _dtype(self, *arguments: Any) -> _PlainDtype:
        return _PlainDtype(*arguments)

    def _latin1(self, text: Any, encoding: Any = "latin1") -> bytes:
        """How protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding != "latin1":
            raise DataError("cifar: unexpected text encoding; expected latin1.")
        return text.encode("latin1")
