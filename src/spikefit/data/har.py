"""Human activity from a phone's sensors: UCI HAR windows, and the continuous HAPT recordings.

Source: Anguita et al. 2013, "A public domain dataset for human activity recognition using smartphones" (ESANN);
Reyes-Ortiz et al. 2016, doi:10.1016/j.neucom.2015.07.085.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikefit.data.dataset import Dataset
from spikefit.data.files import find_file, find_folder, read_text
from spikefit.errors import DataError, OptionError

CHANNELS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
# Subjects of the official UCI HAR test split; the same people recorded HAPT.
TEST_USERS = frozenset((2, 4, 9, 10, 12, 13, 18, 20, 24))
UCI_FOLDERS = ("UCI HAR Dataset", "UCI_HAR_Dataset")
HAPT_FOLDERS = ("HAPT Data Set", "HAPT")


def load_uci_har(root: str | Path | None, split: str) -> Dataset:
    """Windows of 128 samples at 50 Hz, 9 channels (g and rad/s), 6 activities, official split by subject.

    Raises:
        DataError: a file is missing, truncated or malformed.

    Source: Anguita et al. 2013, "A public domain dataset for human activity recognition using smartphones" (ESANN).
    """
    folder = find_folder("uci_har", root, UCI_FOLDERS, "It holds train/ and test/.")
    signals = folder / split / "Inertial Signals"
    if not signals.is_dir():
        raise DataError(f"uci_har: expected the folder {signals}; unpack the data set again.")
    columns = [_numbers("uci_har", find_file("uci_har", signals, f"{c}_{split}.txt")) for c in CHANNELS]
    shapes = {c.shape for c in columns}
    if len(shapes) != 1:
        raise DataError(f"uci_har: the nine files in {signals} differ in size, {sorted(shapes)}; one is truncated.")
    classes = _activities("uci_har", folder)
    labels = _whole_numbers("uci_har", find_file("uci_har", folder / split, f"y_{split}.txt"), 1)[:, 0]
    return Dataset(
        name=f"uci_har {split}",
        inputs=torch.from_numpy(np.stack(columns, -1)),
        targets=torch.from_numpy(labels - 1),
        classes=classes,
        kind="sequence",
        shape=(len(CHANNELS),),
    )


def load_hapt(root: str | Path | None, split: str, *, length: int = 2000, stride: int | None = None) -> Dataset:
    """Windows of `length` steps of the HAPT recordings at 50 Hz, 6 channels, one label per step (-1: none).

    The split is by user, with the test users of UCI HAR. A window starts every `stride` steps (default: `length`).

    Raises:
        OptionError: length or stride below 1 step.
        DataError: a file is missing, truncated or malformed, or no recording is as long as a window.

    Source: Reyes-Ortiz et al. 2016, doi:10.1016/j.neucom.2015.07.085.
    """
    if length < 1 or (stride is not None and stride < 1):
        raise OptionError(f"hapt: length and stride must be at least 1 step, got {length} and {stride}.")
    base = find_folder("hapt", root, HAPT_FOLDERS, "It holds RawData/.")
    folder = base / "RawData"
    if not folder.is_dir():
        raise DataError(f"hapt: expected the folder {folder}; unpack the data set again.")
    classes, labels = _activities("hapt", base), _hapt_labels(find_file("hapt", folder, "labels.txt"))
    if labels[:, 2].max() > len(classes):
        raise DataError(
            f"hapt: {folder / 'labels.txt'} must hold activities 1..{len(classes)} (activity_labels.txt), got "
            f"{labels[:, 2].max()}; unpack the data set again."
        )
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for path in sorted(folder.glob("acc_exp*_user*.txt")):
        found = re.fullmatch(r"acc_exp(\d+)_user(\d+)", path.stem)
        if found is None:
            raise DataError(f"hapt: expected files acc_exp<number>_user<number>.txt, got {path}; unpack it again.")
        experiment, user = int(found[1]), int(found[2])
        if (user in TEST_USERS) != (split == "test"):
            continue
        gyro = _numbers("hapt", find_file("hapt", folder, path.name.replace("acc_", "gyro_")))
        acc = _numbers("hapt", path)
        if acc.shape != gyro.shape or acc.ndim != 2 or acc.shape[1] != 3:
            raise DataError(
                f"hapt: {path} and its gyro file must both be [steps, 3], got {acc.shape} and {gyro.shape}; "
                "unpack the data set again."
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
        classes=classes,
        kind="sequence",
        shape=(6,),
        note="Steps without a label (-1) are left out of loss and accuracy.",
    )


def _numbers(who: str, path: Path) -> np.ndarray:
    """A text file of numbers in rows of equal length, as float32 [rows, columns]."""
    text = read_text(who, path)
    rows = text.count("\n") + (not text.endswith("\n"))
    try:
        values = np.array(text.split(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{who}: {path} must hold numbers only ({error}); unpack it again.") from None
    if values.size == 0:
        raise DataError(f"{who}: {path} is empty; unpack it again.")
    if values.size % rows:
        raise DataError(f"{who}: {path} has {values.size} numbers in {rows} rows, which is uneven; it is truncated.")
    if not np.isfinite(values).all():
        raise DataError(f"{who}: {path} must hold finite numbers, got nan or inf; unpack it again.")
    return values.reshape(rows, -1).astype(np.float32)


def _whole_numbers(who: str, path: Path, columns: int) -> np.ndarray:
    """A text file of whole numbers >= 1, as int64 [rows, columns]."""
    values = _numbers(who, path)
    if values.shape[1] != columns:
        raise DataError(f"{who}: {path} must hold rows of {columns}, got rows of {values.shape[1]}; unpack it again.")
    if (values != values.round()).any() or values.min() < 1:
        raise DataError(f"{who}: {path} must hold whole numbers from 1 on, got {values.min():g}; unpack it again.")
    return values.astype(np.int64)


def _hapt_labels(path: Path) -> np.ndarray:
    """Rows (experiment, user, activity, first step, last step), counted from 1."""
    labels = _whole_numbers("hapt", path, 5)
    if (labels[:, 3] > labels[:, 4]).any():
        raise DataError(f"hapt: {path} must hold first and last step of an activity in this order; unpack it again.")
    return labels


def _activities(who: str, folder: Path) -> list[str]:
    """The names in activity_labels.txt: rows "<number> <name>", numbered from 1 without gaps."""
    path = find_file(who, folder, "activity_labels.txt")
    rows = [line.split(maxsplit=1) for line in read_text(who, path).split("\n") if line.strip()]
    if not rows or [row[0] for row in rows] != [str(i + 1) for i in range(len(rows))] or min(map(len, rows)) < 2:
        raise DataError(
            f"{who}: {path} must hold rows '<number> <name>', numbered from 1, got "
            f"{' / '.join(' '.join(row) for row in rows)[:60] or 'nothing'!r}; unpack it again."
        )
    return [name.strip() for _, name in rows]
