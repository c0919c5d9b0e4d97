"""Arrays of your own in one .npz file."""

from pathlib import Path

import numpy as np
import torch

from spikefit.data.dataset import Dataset, image_tensor
from spikefit.data.files import data_root
from spikefit.errors import DataError


def load_npz(root: str | Path | None, split: str, *, file: str) -> Dataset:
    """An .npz with x_train, y_train, x_test, y_test and, optionally, classes.

    x is [n, H, W] or [n, C, H, W] (images) with uint8 pixels, or float [n, T, C] (sequences); y is [n] or [n, T].

    Raises:
        DataError: no such file, a missing key, or an array of another kind or shape.
    """
    path = Path(file).expanduser()
    path = path if path.is_absolute() else data_root(root) / path
    if not path.is_file():
        raise DataError(f"npz: expected the file {path}, found none; set data.file, and root or SPIKEFIT_DATA.")
    x, y, names = _read(path, split)
    targets = _targets(path, split, y)
    classes = [str(i) for i in range(int(targets.max()) + 1 if len(y) else 0)] if names is None else _names(path, names)
    if x.dtype.kind not in "biuf" or (x.dtype.kind == "f" and not np.isfinite(x).all()):
        came = "nan or inf" if x.dtype.kind == "f" else str(x.dtype)
        raise DataError(f"npz: x_{split} in {path} must hold finite numbers, got {came}; correct the file.")
    if (x.dtype == np.uint8 and x.ndim == 3) or x.ndim == 4:
        images = image_tensor("npz", x if x.dtype == np.uint8 else x.astype(np.float32))
        return Dataset(f"npz {split}", images, targets, classes, "image", tuple(images.shape[1:]))
    if x.ndim != 3:
        raise DataError(
            f"npz: x_{split} in {path} must be uint8 images [n, H, W], images [n, C, H, W] or a float [n, T, C], got "
            f"{x.dtype} {list(x.shape)}."
        )
    if y.ndim == 2 and y.shape != x.shape[:2]:
        raise DataError(
            f"npz: y_{split} in {path} must be [n, T] = {list(x.shape[:2])} as x_{split}, or [n], got {list(y.shape)}."
        )
    return Dataset(f"npz {split}", torch.from_numpy(x.astype(np.float32)), targets, classes, "sequence", (x.shape[2],))


def _read(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(x, y, classes) of a split."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise DataError(f"npz: {path} must hold arrays by name, got one array; write it with np.savez.")
        with content:
            missing = [key for key in (f"x_{split}", f"y_{split}") if key not in content]
            if missing:
                raise DataError(
                    f"npz: {path} must hold {' and '.join(missing)}, got {', '.join(content.files) or 'nothing'}."
                )
            return content[f"x_{split}"], content[f"y_{split}"], content.get("classes")
    except DataError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise DataError(f"npz: {path} cannot be read as plain arrays ({error}).") from None


def _targets(path: Path, split: str, y: np.ndarray) -> torch.Tensor:
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"npz: y_{split} in {path} must hold whole numbers, got {y.dtype}.")
    if y.ndim not in (1, 2):
        raise DataError(f"npz: y_{split} in {path} must be [n] or [n, T], got {list(y.shape)}.")
    return torch.from_numpy(y.astype(np.int64))


def _names(path: Path, names: np.ndarray) -> list[str]:
    if names.ndim != 1:
        raise DataError(f"npz: classes in {path} must be a list of names, got an array {list(names.shape)}.")
    return [str(n) for n in names]
