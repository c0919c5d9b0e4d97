"""N-MNIST: recordings of an event camera, one file of 5-byte events per sample.

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437.
"""

from pathlib import Path

import numpy as np
import torch

from spikefit.data.dataset import Dataset
from spikefit.data.files import find_folder
from spikefit.errors import DataError

SIDE = 34
EVENT = np.dtype([("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.int8)])


def load_nmnist(root: str | Path | None, split: str) -> Dataset:
    """Recordings of about 0.3 s on 34x34 pixels, 2 polarities, 10 digits; inputs are arrays of events."""
    folder = find_folder("nmnist", root, ("NMNIST", "N-MNIST"), "It holds Train/ and Test/.") / split.capitalize()
    paths = sorted(folder.glob("[0-9]/*.bin"))
    if not paths:
        raise DataError(f"nmnist: expected files <digit>/*.bin in {folder}, found none; unpack the data set again.")
    return Dataset(
        name=f"nmnist {split}",
        inputs=[read_events(path) for path in paths],
        targets=torch.tensor([int(path.parent.name) for path in paths]),
        classes=[str(d) for d in range(10)],
        kind="events",
        shape=(2, SIDE, SIDE),
    )


def read_events(path: Path) -> np.ndarray:
    """Events of one file: x | y | polarity (bit 7) and time in microseconds (23 bits), ascending in time.

    Returns:
        Structured array with fields t (us), x, y, p.

    Raises:
        DataError: the size is no multiple of 5 bytes.
    """
    raw = path.read_bytes()
    if len(raw) % 5:
        raise DataError(f"nmnist: {path} must hold events of 5 bytes, got {len(raw)} bytes; it is truncated.")
    b = np.frombuffer(raw, np.uint8).reshape(-1, 5).astype(np.int64)
    events = np.empty(len(b), EVENT)
    events["x"], events["y"], events["p"] = b[:, 0], b[:, 1], b[:, 2] >> 7
    events["t"] = (b[:, 2] & 127) << 16 | b[:, 3] << 8 | b[:, 4]
    # y = 240 marks an overflow of the camera's clock, not an event on the sensor
    return events[events["y"] < SIDE]
