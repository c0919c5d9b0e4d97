"""Files that are whole or absent: written under a temporary name, then renamed into place."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from spikefit.errors import OptionError


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 so that a reader, or a crash, never meets half a file; folders are made.

    Raises:
        OptionError: the place cannot be written.
    """
    path = Path(path)
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        share(name)
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise OptionError(
                f"cannot write {path} ({error.strerror}); choose a folder you may write to with --out."
            ) from error
        raise
    return path


def check_folder(folder: str | Path) -> None:
    """Make sure, before long work begins, that files can be written into `folder`; it leaves no new folder there.

    Raises:
        OptionError: they cannot.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if made:
            folder.rmdir()
    except OSError as error:
        raise OptionError(
            f"cannot write into {folder} ({error.strerror}); choose a folder you may write to with --out."
        ) from error


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as JSON, as `write_text` does.

    Raises:
        OptionError: the place cannot be written.
        ValueError: a number is not finite, which JSON has no word for.
    """
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def share(path: str | Path) -> None:
    """Give a file that was made as a private one the rights an ordinary new file has."""
    # the only way to read the mask is to set it
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
