"""Image folders: root/<split>/<class>/<image>."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikefit.data.dataset import Dataset
from spikefit.data.files import data_root
from spikefit.errors import DataError, OptionError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))


def load_image_folder(
    root: str | Path | None, split: str, *, folder: str = ".", side: int = 32, channels: int = 3
) -> Dataset:
    """Images of one folder per class, decoded batch by batch: short side scaled to `side`, then cut in the middle.

    Raises:
        OptionError: side below 1, or channels neither 1 nor 3.
        DataError: no folder <split>/<class>/.
    """
    if side < 1 or channels not in (1, 3):
        raise OptionError(f"image_folder: side must be at least 1 and channels 1 or 3, got {side} and {channels}.")
    base = data_root(root) / folder / split
    classes = sorted(p.name for p in base.iterdir() if p.is_dir()) if base.is_dir() else []
    if not classes:
        raise DataError(f"image_folder: expected folders {base}/<class>/, found none; set root=... and folder=...")
    names = sorted(
        {
            p.name
            for s in ("train", "test")
            if (base.parent / s).is_dir()
            for p in (base.parent / s).iterdir()
            if p.is_dir()
        }
    )
    paths = [(p, names.index(c)) for c in classes for p in sorted((base / c).iterdir()) if p.suffix.lower() in SUFFIXES]
    return Dataset(
        name=f"image_folder {split}",
        inputs=[p for p, _ in paths],
        targets=torch.tensor([label for _, label in paths], dtype=torch.int64),
        classes=names,
        kind="image",
        shape=(channels, side, side),
        decode=partial(read_image, side=side, channels=channels),
    )


def read_image(path: Path, *, side: int, channels: int) -> Tensor:
    """One image as uint8 [C, side, side].

    Raises:
        DataError: Pillow is missing, or the file is no image.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError("image_folder: reading images needs Pillow; pip install 'spikefit[images]'.") from None
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # a damaged image can fail in any way
        raise DataError(f"image_folder: {path} cannot be read as an image ({error}); remove or replace it.") from None
    scale = side / min(image.size)
    wide = image.resize(
        (max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (wide.width - side) // 2, (wide.height - side) // 2
    pixels = np.asarray(wide.crop((left, top, left + side, top + side)))
    return torch.from_numpy(np.array(pixels)).view(side, side, channels).permute(2, 0, 1).contiguous()
