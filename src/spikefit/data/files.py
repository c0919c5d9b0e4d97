"""Finding and reading files, with one sentence when something is missing."""

import gzip
import os
import zlib
from pathlib import Path

from spikefit.errors import DataError


def data_root(root: str | Path | None) -> Path:
    """The folder with the data: `root`, else $SPIKEFIT_DATA, else ./data."""
    return Path(root if root is not None else os.environ.get("SPIKEFIT_DATA", "data")).expanduser()


def find_folder(who: str, root: str | Path | None, candidates: tuple[str, ...], how: str) -> Path:
    """The first of `candidates` that exists below the data folder.

    Raises:
        DataError: none of them exists.
    """
    base = data_root(root)
    for candidate in candidates:
        if (base / candidate).is_dir():
            return base / candidate
    wanted = " or ".join(repr(c) for c in candidates)
    raise DataError(f"{who}: expected a folder {wanted} in {base}, found none. {how} Set root=... or SPIKEFIT_DATA.")


def find_file(who: str, folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`.

    Raises:
        DataError: none of them exists.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{who}: expected the file {' or '.join(names)} in {folder}, found none; unpack the data set again."
    )


def read_bytes(who: str, path: Path) -> bytes:
    """The content of `path`, unzipped if it ends in .gz.

    Raises:
        DataError: it cannot be read, or is no complete gzip file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{who}: {path} cannot be read ({error}); check that you may read it.") from None
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{who}: {path} is no complete gzip file ({error}); fetch it again.") from None


def read_text(who: str, path: Path) -> str:
    """The content of `path` as text in UTF-8.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        return read_bytes(who, path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{who}: {path} must be a text file, got other bytes ({error}); unpack it again.") from None
