"""MNIST and Fashion-MNIST in the IDX format.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; Xiao et al. 2017, arXiv:1708.07747.
"""

import math
from pathlib import Path

import numpy as np
import torch

from spikefit.data.dataset import Dataset, image_tensor
from spikefit.data.download import torchvision_download
from spikefit.data.files import find_file, find_folder, read_bytes
from spikefit.errors import DataError

FOLDERS = {
    "mnist": ("MNIST/raw", "mnist", "MNIST"),
    "fashion_mnist": ("FashionMNIST/raw", "fashion-mnist", "FashionMNIST"),
}
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CLASSES = {"mnist": [str(d) for d in range(10)], "fashion_mnist": FASHION}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def load_idx(name: str, root: str | Path | None, split: str, *, download: bool = False) -> Dataset:
    """MNIST or Fashion-MNIST: images uint8 [n, 1, 28, 28].

    Raises:
        DataError: a file is missing, damaged, or of another rank than images [n, H, W] and labels [n]; or it cannot be
            fetched.

    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; Xiao et al. 2017, arXiv:1708.07747.
    """
    if download:
        torchvision_download(TORCHVISION[name], root)
    folder = find_folder(name, root, FOLDERS[name], "It holds the four -ubyte files, zipped or not.")
    stem = "train" if split == "train" else "t10k"
    images, labels = (
        read_idx(
            find_file(name, folder, f"{stem}-{kind}-ubyte.gz", f"{stem}-{kind}-ubyte", f"{stem}-{kind}.ubyte"), rank
        )
        for kind, rank in (("images-idx3", 3), ("labels-idx1", 1))
    )
    return Dataset(
        name=f"{name} {split}",
        inputs=image_tensor(name, images),
        targets=torch.from_numpy(labels.astype(np.int64)),
        classes=CLASSES[name],
        kind="image",
        shape=(1, *images.shape[1:]),
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """An IDX file of unsigned bytes with `rank` axes: magic 0, 0, 8, rank; sizes as big-endian int32; then the values.

    Raises:
        DataError: wrong magic number, another rank, or fewer or more bytes than the header says.
    """
    raw = read_bytes("idx", path)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(
            f"idx: {path} must begin with the bytes 0 0 8 (unsigned bytes), got {raw[:3].hex(' ') or 'nothing'}."
        )
    if raw[3] != rank:
        raise DataError(
            f"idx: {path} must hold an array of {rank} axes, got one of {raw[3]}; are images and labels swapped?"
        )
    if len(raw) < 4 + 4 * rank:
        raise DataError(f"idx: {path} ends inside its header; fetch it again.")
    sizes = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    expected = 4 + 4 * rank + math.prod(sizes)
    if len(raw) != expected:
        raise DataError(f"idx: {path} must hold {expected} bytes for sizes {sizes}, got {len(raw)}; fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
