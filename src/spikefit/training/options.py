"""Options of named things, checked against the signature of what will take them."""

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spikefit.errors import OptionError
from spikefit.models import MODELS
from spikefit.models.table import Preset, model_options, preset_of


def near(word: str, known: Iterable[str]) -> str:
    """A hint "Did you mean a or b?" behind a sentence, or nothing where no known word comes near."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One sentence about a key nobody knows."""
    known = list(known)
    return f"unknown key {key!r}." + (near(key, known) or f" Known: {', '.join(known)}.")


def describe(value: Any) -> str:
    """A value and its type, as error messages show them."""
    return f"{value!r} ({type(value).__name__})"


def annotations(make: Callable[..., Any]) -> dict[str, Any]:
    """Name -> annotation of the options `make` takes, without its positional input."""
    function = make.func if isinstance(make, partial) else make
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target)
    taken = {"x", "events", "generator"}
    parameters = inspect.signature(make).parameters.values()
    plain = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in taken]
    return {p.name: hints.get(p.name, Any) for p in plain}


def takes_none(annotation: Any) -> bool:
    """Whether an option can be None and no text, so that the text "none" can only mean None."""
    kinds = set(typing.get_args(annotation))
    return type(None) in kinds and not any(k is str or typing.get_origin(k) is typing.Literal for k in kinds)


def fixed_parts(model: str) -> list[str]:
    """Those of the sections neuron and norm that the model of the zoo has no option for, as its own have one form."""
    return [part for part in ("neuron", "norm") if model in MODELS and part not in model_options(model)]


def preset_for(model: str, preset: str) -> Preset:
    """The preset called `preset`.

    Raises:
        OptionError: there is none, or `model` has no place for a neuron or norm.
    """
    chosen, fixed = preset_of(preset), fixed_parts(model)
    if fixed:
        raise OptionError(
            f"model {model}: preset {preset!r} sets neuron and norm, and this model takes no {' and no '.join(fixed)}; "
            "leave the preset out."
        )
    return chosen


def check_options(
    who: str, make: Callable[..., Any], options: Mapping[str, Any], *, reserved: Iterable[str] = ()
) -> None:
    """Check names and types of `options` against the signature of `make`.

    Args:
        who: names the thing in messages, "model vgg6".
        reserved: parameters that another section decides.

    Raises:
        OptionError: unknown option, with near ones, a wrong type, or nan.
    """
    check_types(who, {k: v for k, v in annotations(make).items() if k not in set(reserved)}, options)


def check_types(who: str, known: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """As `check_options`, for `known` names and their types."""
    for key, value in options.items():
        if key not in known:
            raise OptionError(f"{who}: unknown option {key!r}; known: {', '.join(known) or 'none'}.{near(key, known)}")
        if any(isinstance(v, float) and math.isnan(v) for v in (value if isinstance(value, list) else [value])):
            raise OptionError(f"{who}: {key}: expected a number, got {value}.")
        try:
            # TOML has lists where Python has tuples
            TypeAdapter(known[key]).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
        except ValidationError as error:
            plain = known[key] in (int, float, str, bool)
            wanted = error.errors()[-1]["msg"].removeprefix("Input should be ") if plain else str(known[key])
            raise OptionError(f"{who}: {key}: expected {wanted}, got {describe(value)}.") from None
