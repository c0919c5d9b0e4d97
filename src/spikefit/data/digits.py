"""Handwritten digits that ship inside scikit-learn: 1,797 images of 8x8 pixels.

Source: Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits" (UCI).
"""

import numpy as np
import torch

from spikefit.data.dataset import Dataset
from spikefit.errors import DataError


def load_digits(split: str) -> Dataset:
    """Images float32 [n, 1, 8, 8] in [0, 1]; every fifth image of each class is in the test split (355 of 1,797).

    Raises:
        DataError: scikit-learn is missing.

    Source: Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits" (UCI).
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError:
        raise DataError(
            "digits: they ship inside scikit-learn, which is missing; pip install 'spikefit[demo]'."
        ) from None
    pixels, labels = sklearn_digits(return_X_y=True)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[4::5]] = True
    chosen = test if split == "test" else ~test
    return Dataset(
        name=f"digits {split}",
        inputs=torch.from_numpy((pixels[chosen] / 16).astype(np.float32)).view(-1, 1, 8, 8),
        targets=torch.from_numpy(labels[chosen].astype(np.int64)),
        classes=[str(d) for d in range(10)],
        kind="image",
        shape=(1, 8, 8),
        note="Our own split: every fifth image of each class is a test image.",
    )
