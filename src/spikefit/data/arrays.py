"""Arrays of your own in one .npz file."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from spikefit.data.dataset import Dataset, image_tensor
from spikefit.data.files import data_root
from spikefit.errors import DataError


def load_npz(root: str | Path | None, split: str, *, file: str) -> Dataset:
    """An .npz with x_train, y_train, x_test, y_test and, optionally, classes.

    x is [n, H, W] or [n, C, H, W] (images) with uint8 pixels, or float [n, T, C] (sequences); y is [n] or [n, T].
    """
    path = Path(file).expanduser()
    path = path if path.is_absolute() else data_root(root) / path
    if not path.is_file():
        raise DataError(f"npz: expected the file {path}, found none; set data.file, and root or SPIKEFIT_DATA.")
    try:
        with np.load(path, allow_pickle=False) as content:
            missing = [key for key in (f"x_{split}", f"y_{split}") if key not in content]
            if missing:
                raise DataError(
                    f"npz: {path} must hold {' and '.join(missing)}, got {', '.join(content.files) or 'nothing'}."
                )
            x, y = content[f"x_{split}"], content[f"y_{split}"]
            names = content.get("classes")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"npz: {path} cannot be read as plain arrays ({error}).") from None
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"npz: y_{split} in {path} must hold whole numbers, got {y.dtype}.")
    targets = torch.from_numpy(y.astype(np.int64))
    classes = (
        [str(n) for n in names]
        if names is not None
        else [str(i) for i in range(int(targets.max()) + 1 if len(y) else 0)]
    )
    if x.dtype == np.uint8 or x.ndim == 4:
        images = image_tensor("npz", x if x.dtype == np.uint8 else x.astype(np.float32))
        return Dataset(f"npz {split}", images, targets, classes, "image", tuple(images.shape[1:]))
    if x.ndim != 3 or not np.issubdtype(x.dtype, np.number):
        raise DataError(f"npz: x_{split} in {path} must be uint8 images or a float [n, T, C], got {x.dtype} {x.shape}.")
    return Dataset(f"npz {split}", torch.from_numpy(x.astype(np.float32)), targets, classes, "sequence", (x.shape[2],))
