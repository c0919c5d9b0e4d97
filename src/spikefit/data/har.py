"""Human activity from a phone's sensors: UCI HAR windows, and the continuous HAPT recordings.

Source: Anguita et al. 2013, "A public domain dataset for human activity recognition using smartphones" (ESANN);
Reyes-Ortiz et al. 2016, doi:10.1016/j.neucom.2015.07.085.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikefit.data.dataset import Dataset
from spikefit.data.files import find_file, find_folder
from spikefit.errors import DataError, OptionError

CHANNELS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
# Subjects of the official UCI HAR test split; the same people recorded HAPT.
TEST_USERS = frozenset((2, 4, 9, 10, 12, 13, 18, 20, 24))
UCI_FOLDERS = ("UCI HAR Dataset", "UCI_HAR_Dataset")
HAPT_FOLDERS = ("HAPT Data Set", "HAPT")


def load_uci_har(root: str | Path | None, split: str) -> Dataset:
    """Windows of 128 samples at 50 Hz, 9 channels (g and rad/s), 6 activities, official split by subject."""
    folder = find_folder("uci_har", root, UCI_FOLDERS, "It holds train/ and test/.")
    signals = folder / split / "Inertial Signals"
    if not signals.is_dir():
        raise DataError(f"uci_har: expected the folder {signals}; unpack the data set again.")
    columns = [_numbers("uci_har", find_file("uci_har", signals, f"{c}_{split}.txt")) for c in CHANNELS]
    shapes = {c.shape for c in columns}
    if len(shapes) != 1:
        raise DataError(f"uci_har: the nine files in {signals} differ in size, {sorted(shapes)}; one is truncated.")
    labels = _numbers("uci_har", find_file("uci_har", folder / split, f"y_{split}.txt")).astype(np.int64)
    return Dataset(
        name=f"uci_har {split}",
        inputs=torch.from_numpy(np.stack(columns, -1)),
        targets=torch.from_numpy(labels.reshape(-1) - 1),
        classes=_activities(folder),
        kind="sequence",
        shape=(len(CHANNELS),),
    )


def load_hapt(root: str | Path | None, split: str, *, length: int = 2000, stride: int | None = None) -> Dataset:
    """Windows of `length` steps of the HAPT recordings at 50 Hz, 6 channels, one label per step (-1: none).

    The split is by user, with the test users of UCI HAR. A window starts every `stride` steps (default: `length`).
    """
    if length < 1 or (stride is not None and stride < 1):
        raise OptionError(f"hapt: length and stride must be at least 1 step, got {length} and {stride}.")
    base = find_folder("hapt", root, HAPT_FOLDERS, "It holds RawData/.")
    folder = base / "RawData"
    if not folder.is_dir():
        raise DataError(f"hapt: expected the folder {folder}; unpack the data set again.")
    labels = _numbers("hapt", find_file("hapt", folder, "labels.txt")).astype(np.int64).reshape(-1, 5)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for path in sorted(folder.glob("acc_exp*_user*.txt")):
        experiment, user = (int(part[-2:]) for part in path.stem.split("_")[1:3])
        if (user in TEST_USERS) != (split == "test"):
            continue
        gyro = _numbers("hapt", find_file("hapt", folder, path.name.replace("acc_", "gyro_")))
        acc = _numbers("hapt", path)
        if acc.shape != gyro.shape or acc.ndim != 2 or acc.shape[1] != 3:
            raise DataError(
                f"hapt: {path.name} and its gyro file must both be [steps, 3], got {acc.shape} and {gyro.shape}."
            )
        x = torch.from_numpy(np.concatenate([acc, gyro], 1))
        y = torch.full((len(x),), -1, dtype=torch.int64)
        for e, u, activity, first, last in labels.tolist():
            if (e, u) == (experiment, user):
                y[first - 1 : last] = activity - 1
        for start in range(0, len(x) - length + 1, stride or length):
            inputs.append(x[start : start + length])
            targets.append(y[start : start + length])
    if not inputs:
        raise DataError(
            f"hapt: no window of {length} steps in {folder}; use a smaller length or unpack the data set again."
        )
    return Dataset(
        name=f"hapt {split}",
        inputs=torch.stack(inputs),
        targets=torch.stack(targets),
        classes=_activities(base),
        kind="sequence",
        shape=(6,),
        note="Steps without a label (-1) are left out of loss and accuracy.",
    )


def _numbers(who: str, path: Path) -> np.ndarray:
    """A text file of numbers in rows of equal length, as float32 [rows, columns]."""
    text = path.read_text()
    rows = text.count("\n") + (not text.endswith("\n"))
    try:
        values = np.array(text.split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{who}: {path} must hold numbers only ({error}); unpack it again.") from None
    if values.size == 0:
        raise DataError(f"{who}: {path} is empty; unpack it again.")
    if values.size % rows:
        raise DataError(f"{who}: {path} has {values.size} numbers in {rows} rows, which is uneven; it is truncated.")
    return values.reshape(rows, -1).astype(np.float32)


def _activities(folder: Path) -> list[str]:
    lines = find_file("har", folder, "activity_labels.txt").read_text().split("\n")
    return [line.split(maxsplit=1)[1].strip() for line in lines if line.strip()]
