"""Checks that the makers of models share: sizes and shapes, before torch fails at them in words of its own."""

import math
from numbers import Real

from spikefit.errors import OptionError
from spikefit.layers.shape import is_count


def check_input_shape(who: str, shape: tuple[int, ...] | list[int], axes: tuple[str, ...] = ()) -> tuple[int, ...]:
    """`shape` as a tuple, if it has one whole number of at least 1 for each of `axes`; any rank from 1 without `axes`.

    Raises:
        OptionError: another rank, or a size below 1.
    """
    wanted = f"({', '.join(axes)}{',' * (len(axes) == 1)})" if axes else "the shape of one sample, (C, ...)"
    given = shape if isinstance(shape, tuple | list) else ()
    rank_fits = len(given) == len(axes) if axes else len(given) > 0
    if not rank_fits or not all(is_count(side) for side in given):
        raise OptionError(
            f"{who}: expected input_shape as {wanted}, each a whole number of at least 1, got {shape!r}. "
            "Time and batch are no part of it."
        )
    return tuple(given)


def check_count(who: str, name: str, value: int) -> int:
    """`value` if it is a whole number of at least 1, else OptionError."""
    if not is_count(value):
        raise OptionError(f"{who}: {name} must be a whole number of at least 1, got {value!r}.")
    return value


def check_counts(who: str, name: str, values: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """`values` as a tuple, if they are at least one whole number, each of at least 1, else OptionError."""
    if not isinstance(values, tuple | list) or not values or not all(is_count(v) for v in values):
        raise OptionError(
            f"{who}: {name} must list at least one width, each a whole number of at least 1, got {values!r}."
        )
    return tuple(values)


def check_width(who: str, width: float) -> float:
    """`width`, a factor on all widths, if it is finite and > 0, else OptionError."""
    if not (isinstance(width, Real) and math.isfinite(width) and width > 0):
        raise OptionError(f"{who}: width must be > 0 and finite, a factor on all widths such as 0.5, got {width!r}.")
    return width
