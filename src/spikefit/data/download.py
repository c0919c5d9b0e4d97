"""Fetching through torchvision, where it is installed."""

from importlib import import_module
from pathlib import Path

from spikefit.data.files import data_root
from spikefit.errors import DataError


def torchvision_download(name: str, root: str | Path | None) -> None:
    """Let torchvision fetch and check data set `name` into the data folder.

    Raises:
        DataError: torchvision is missing, or it could not fetch the files.
    """
    try:
        datasets = import_module("torchvision.datasets")
    except ImportError:
        raise DataError(
            f"{name}: download=true fetches through torchvision, which is not installed; pip install torchvision, "
            "or put the files there yourself."
        ) from None
    try:
        getattr(datasets, name)(root=str(data_root(root)), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name}: torchvision could not fetch the files ({error}); put them there yourself.") from error
