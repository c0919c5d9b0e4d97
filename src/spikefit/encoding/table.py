"""Encodings by name, as recipes write them."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikefit.encoding.events import check_frame, event_frames
from spikefit.encoding.static import check_timesteps, latency, rate, repeat, sequence
from spikefit.errors import OptionError

ENCODINGS: dict[str, Callable[..., Tensor]] = {
    "repeat": repeat,
    "rate": rate,
    "latency": latency,
    "event_frames": event_frames,
    "sequence": sequence,
}
# Other words for them.
ALIASES = {"none": "sequence"}
# Options without a default, and what to give.
REQUIRED = {
    "timesteps": "the number of time steps, such as 8",
    "height": "the height of the sensor in pixels, 34 for N-MNIST",
    "width": "the width of the sensor in pixels, 34 for N-MNIST",
}


@dataclass(frozen=True)
class Encoding:
    """A named encoding with its options: `encoding(inputs, generator)` -> sequence [T, B, ...].

    Attributes:
        name: a key of `ENCODINGS`.
        options: keyword options of that function, `timesteps` among them where it takes any.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def timesteps(self) -> int | None:
        """T, or None where the data decide."""
        return self.options.get("timesteps")

    def __call__(self, inputs: Any, generator: torch.Generator | None = None) -> Tensor:
        """Encode a batch; only "rate" draws from `generator`."""
        drawn = {"generator": generator} if self.name == "rate" else {}
        return ENCODINGS[self.name](inputs, **self.options, **drawn)


def create_encoding(name: str, **options: Any) -> Encoding:
    """Make an encoding by name.

    Args:
        name: "repeat", "rate", "latency" (static samples), "event_frames" (event recordings) or "sequence", also called
            "none" (data with a time axis).
        **options: those of the function; `timesteps` for all but "sequence", `height` and `width` for "event_frames".

    Raises:
        OptionError: unknown name or option, or one that is missing or out of range.
    """
    name = ALIASES.get(name, name)
    if name not in ENCODINGS:
        near = difflib.get_close_matches(name, ENCODINGS, n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {name!r}.{hint}")
    parameters = inspect.signature(ENCODINGS[name]).parameters.values()
    known = [p.name for p in parameters if p.name not in ("x", "events", "generator")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        hint = " The time axis is that of the data." if name == "sequence" else ""
        raise OptionError(f"encoding {name}: unknown option {unknown[0]!r}; known: {', '.join(known) or 'none'}.{hint}")
    for key, hint in REQUIRED.items():
        if key in known and key not in options:
            raise OptionError(f"encoding {name}: {key} is missing; give {hint}.")
    if "timesteps" in known:
        check_timesteps(f"encoding {name}", options["timesteps"])
    if name == "event_frames":
        check_frame(f"encoding {name}", **{k: options[k] for k in ("height", "width", "by", "pad_to") if k in options})
    return Encoding(name, dict(options))
