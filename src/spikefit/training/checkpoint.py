"""Checkpoints: one directory per checkpoint, complete or absent, tensors in safetensors and the rest in JSON.

A directory is written under a temporary name, flushed to disk and renamed into place; the newest is the one with the
highest number. So a process killed at any moment leaves the checkpoints before it, and a temporary directory that the
next writer removes. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spikefit.errors import CheckpointError
from spikefit.training.files import share

FORMAT = 1
KEEP = 2
_NAME = re.compile(r"checkpoint-(\d{8,})")
_TEMPORARY = ".checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: its directory.
        state: the JSON part: recipe, position in the run, history.
        tensors: group ("model", "optimizer", "ema") -> name -> tensor on the CPU.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: str | Path, number: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Write `folder`/checkpoint-<number> as a whole, then drop all but the newest two.

    Args:
        folder: where the checkpoints of one run lie; made if missing.
        number: updates made so far; higher is newer.
        state: JSON-able values.
        tensors: group -> name -> tensor, any device and memory order.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    final = folder / f"checkpoint-{number:08d}"
    part = folder / f"{_TEMPORARY}{number:08d}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean_up(folder)
        part.mkdir()
        digests = {}
        for group, content in tensors.items():
            file = part / f"{group}.safetensors"
            # a copy, because safetensors refuses shared memory and any order but row-major
            plain = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in content.items()}
            save_file(plain, file)
            share(file)
            _flush(file)
            digests[group] = _digest(file)
        body = {"format": FORMAT, "files": digests, **state}
        text = json.dumps({**body, "digest": _body_digest(body)}, indent=1)
        (part / "state.json").write_text(text, encoding="utf-8")
        _flush(part / "state.json")
        _flush(part)
        if final.exists():
            _discard(final)
        part.rename(final)
        _flush(folder)
        for path in checkpoints(folder)[:-KEEP]:
            _discard(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"checkpoint: cannot write {final} ({error.strerror or error}); choose a writable folder with room."
        ) from error
    return final


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(checkpoints(folder)), None)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint and check every file against its digest.

    Args:
        path: a checkpoint, or the folder of a run, which means its newest.

    Raises:
        CheckpointError: nothing there, a file missing or damaged, or another format.
    """
    path = Path(path)
    if not _NAME.fullmatch(path.name) and not (path / "state.json").is_file():
        newest = latest(path)
        if newest is None:
            raise CheckpointError(
                f"checkpoint {path}: expected a checkpoint-* directory or a folder with some, found none; "
                "train with out=FOLDER (--out FOLDER) writes them."
            )
        path = newest
    with _as_damage(path):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digest = state.pop("digest")
        if digest != _body_digest(state):
            raise ValueError("state.json does not match its digest")
        if state["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path}: expected format {FORMAT}, got {state['format']}.")
        tensors = {}
        for group, expected in state["files"].items():
            file = path / f"{group}.safetensors"
            if _digest(file) != expected:
                raise ValueError(f"{file.name} does not match its digest")
            tensors[group] = load_file(file)
    return Checkpoint(path, state, tensors)


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy `tensors` into the parameters and buffers of `model`.

    Raises:
        CheckpointError: they are those of another model; the first differing names or shapes are told.
    """
    own = model.state_dict()
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    other = {k: tuple(t.shape) for k, t in own.items() if shapes.get(k, tuple(t.shape)) != tuple(t.shape)}
    differing = [f"{k} {shapes[k]} instead of {shape}" for k, shape in other.items()]
    missing = [f"{k} missing" for k in own if k not in tensors]
    surplus = [f"{k} unknown to it" for k in tensors if k not in own]
    wrong = missing + differing + surplus
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path}: it belongs to another model than {type(model).__name__} here: "
            f"{', '.join(wrong[:3])}{more}. Use the recipe it was trained with."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimiser as "entry/parameter name" -> tensor."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{entry}/{names[id(parameter)]}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
        if isinstance(value, Tensor)
    }


def fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    """Give the optimiser the state that `optimizer_tensors` took.

    Raises:
        CheckpointError: a parameter is unknown, or a shape differs.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise CheckpointError(f"checkpoint {path}: optimiser state {key} {tuple(tensor.shape)} fits nothing here.")
        if tensor.shape == parameter.shape and tensor.ndim:
            # in the memory order of the parameter, as the optimiser itself makes it
            value = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        else:
            value = tensor.clone()
        optimizer.state[parameter][entry] = value


def clean_up(folder: str | Path) -> None:
    """Remove what a killed writer left behind."""
    for path in Path(folder).glob(f"{_TEMPORARY}*.part"):
        shutil.rmtree(path, ignore_errors=True)


def _discard(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that no half of it keeps the name."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name.removeprefix('checkpoint-')}.old.part")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make the disk hold what was written to a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path}: it is damaged or incomplete ({error}); use an older one, or train again."
        ) from error
