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
        # mkstemp makes the file private; give it the rights an ordinary new file has
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise OptionError(
                f"reporting: cannot write {path} ({error.strerror}); choose a folder you may write to with --out."
            ) from error
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as JSON, as `write_text` does.

    Raises:
        OptionError: the place cannot be written.
        ValueError: a number is not finite, which JSON has no word for.
    """
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    # the only way to read it is to set it
    mask = os.umask(0)
    os.umask(mask)
    return mask
