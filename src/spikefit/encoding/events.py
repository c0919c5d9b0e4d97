"""Frames from event-camera recordings."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spikefit.encoding.static import check_timesteps
from spikefit.errors import OptionError, ShapeError


def event_frames(
    events: Sequence[np.ndarray],
    timesteps: int,
    *,
    height: int,
    width: int,
    by: str = "time",
    binary: bool = False,
    pad_to: int | None = None,
) -> Tensor:
    """Count events in T frames of two polarities.

        frame[t, p, y, x] = number of events of polarity p at (x, y) in slice t

    Args:
        events: one structured array per sample with fields t (microseconds, ascending), x, y, p.
        timesteps: T >= 1.
        height, width: size of the sensor in pixels.
        by: "time" cuts the recording into slices of equal duration, "count" into slices of equally many events.
        binary: 1 where anything happened, instead of counts.
        pad_to: side of a square frame; the sensor is centred in it, zeros around.

    Returns:
        [T, B, 2, H, W] float32.

    Raises:
        OptionError: timesteps, height or width below 1, unknown `by`, or pad_to smaller than the sensor.
        ShapeError: no event arrays, an event outside the sensor, of another polarity or out of order.

    Source: Fang et al. 2021, arXiv:2007.05785 (slices of equally many events).
    """
    check_timesteps("encoding.event_frames", timesteps)
    check_frame("encoding.event_frames", height=height, width=width, by=by, pad_to=pad_to)
    if isinstance(events, Tensor):
        raise ShapeError(
            f"encoding.event_frames: expected a list of event arrays, got a tensor {tuple(events.shape)}; images need "
            "encoding.repeat, sequences encoding.sequence."
        )
    side = (height, width) if pad_to is None else (pad_to, pad_to)
    top, left = (side[0] - height) // 2, (side[1] - width) // 2
    frames = np.zeros((timesteps, len(events), 2, *side), np.float32)
    for b, sample in enumerate(events):
        if not isinstance(sample, np.ndarray) or not {"t", "x", "y", "p"} <= set(sample.dtype.names or ()):
            came = f"an array of {sample.dtype}" if isinstance(sample, np.ndarray) else type(sample).__name__
            raise ShapeError(
                "encoding.event_frames: expected an array with fields t, x, y, p for every sample of the batch, got "
                f"{came}."
            )
        if len(sample) == 0:
            continue
        x, y = sample["x"].astype(np.int64), sample["y"].astype(np.int64)
        if x.max() >= width or y.max() >= height or min(x.min(), y.min()) < 0:
            raise ShapeError(
                f"encoding.event_frames: expected events inside {height}x{width}, got x up to {x.max()} and y up to "
                f"{y.max()}; give the height and width of the sensor."
            )
        if not np.isin(sample["p"], (0, 1)).all() or (np.diff(sample["t"].astype(np.int64)) < 0).any():
            raise ShapeError(
                "encoding.event_frames: expected polarities p of 0 and 1 and times t in ascending order; correct "
                f"sample {b} of the batch."
            )
        place = (_slices(sample, timesteps, by), sample["p"].astype(np.int64), y + top, x + left)
        flat = np.ravel_multi_index(place, (timesteps, 2, *side))
        frames[:, b] = np.bincount(flat, minlength=timesteps * 2 * side[0] * side[1]).reshape(timesteps, 2, *side)
    return torch.from_numpy(frames.clip(max=1) if binary else frames)


def check_frame(who: str, *, height: int, width: int, by: str = "time", pad_to: int | None = None) -> None:
    """Check the options of `event_frames`.

    Raises:
        OptionError: height or width below 1, unknown `by`, or pad_to smaller than the sensor.
    """
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{who}: {name} must be a whole number of at least 1 pixel, got {value!r}.")
    if by not in ("time", "count"):
        raise OptionError(f"{who}: by must be 'time' or 'count', got {by!r}.")
    if pad_to is not None and pad_to < max(height, width):
        raise OptionError(f"{who}: pad_to={pad_to} is smaller than the sensor, {height}x{width}.")


def _slices(sample: np.ndarray, timesteps: int, by: str) -> np.ndarray:
    """The frame of every event."""
    if by == "count":
        return np.arange(len(sample)) * timesteps // len(sample)
    t = sample["t"].astype(np.int64)
    return (t - t[0]) * timesteps // max(1, int(t[-1] - t[0]) + 1)
