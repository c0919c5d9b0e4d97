"""N-MNIST: recordings of an event camera, one file of 5-byte events per sample.

Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437.
"""

from pathlib import Path

import numpy as np
import torch

from spikefit.data.dataset import Dataset
from spikefit.data.files import find_folder, read_bytes
from spikefit.errors import DataError

SIDE = 34
# As y, this marks an overflow of the camera's clock, not an event on the sensor.
OVERFLOW = 240
EVENT = np.dtype([("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.int8)])


def load_nmnist(root: str | Path | None, split: str) -> Dataset:
    """Recordings of about 0.3 s on 34x34 pixels, 2 polarities, 10 digits; inputs are arrays of events.

    Raises:
        DataError: no recordings, or one that is truncated, empty or of another sensor.

    Source: Orchard et al. 2015, doi:10.3389/fnins.2015.00437.
    """
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
        DataError: the file is empty, its size is no multiple of 5 bytes, or a pixel lies outside 34x34.
    """
    raw = read_bytes("nmnist", path)
    if not raw:
        raise DataError(f"nmnist: {path} must hold events of 5 bytes, got an empty file; unpack the data set again.")
    if len(raw) % 5:
        raise DataError(f"nmnist: {path} must hold events of 5 bytes, got {len(raw)} bytes; it is truncated.")
    b = np.frombuffer(raw, np.uint8).reshape(-1, 5).astype(np.int64)
    events = np.empty(len(b), EVENT)
    events["x"], events["y"], events["p"] = b[:, 0], b[:, 1], b[:, 2] >> 7
    events["t"] = (b[:, 2] & 127) << 16 | b[:, 3] << 8 | b[:, 4]
    events = events[events["y"] != OVERFLOW]
    if max(events["x"].max(initial=0), events["y"].max(initial=0)) >= SIDE:
        raise DataError(
            f"nmnist: {path} must hold events on {SIDE}x{SIDE} pixels, got x up to {events['x'].max()} and y up to "
            f"{events['y'].max()}; it is damaged, or of another sensor."
        )
    return events
