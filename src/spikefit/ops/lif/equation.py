"""The LIF equation as a value: what the three backends agree on."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from spikefit.errors import OptionError
from spikefit.ops.surrogate import Surrogate, parse_surrogate

Reset = Literal["none", "soft", "hard"]
RESETS: tuple[Reset, ...] = ("none", "soft", "hard")


@dataclass(frozen=True)
class Equation:
    """u = v_rest + leak (v - v_rest) + gain x;  s = [u >= theta];  v' = reset(u, s).

    Attributes:
        reset: "soft" (v' = u - theta s), "hard" (v' = u + s (v_reset - u)) or "none" (v' = u).
        v_reset: where a hard reset goes; 0 and unused otherwise.
        v_rest: where the membrane decays to.
        strict: fire on u > theta instead of u >= theta.
        detach_reset: no gradient through the s inside the reset.
        surrogate: slope of the step.
        frac_bits: the membrane lies on the grid of multiples of 2^-frac_bits, to which leak and input are rounded; None
            for plain floating point. The gradient goes straight through the rounding.
    """

    reset: Reset
    v_reset: float
    v_rest: float
    strict: bool
    detach_reset: bool
    surrogate: Surrogate
    frac_bits: int | None = None

    @classmethod
    def make(
        cls,
        *,
        v_reset: float | None,
        reset: bool,
        v_rest: float | None,
        strict: bool,
        detach_reset: bool,
        surrogate: Surrogate | str,
        frac_bits: int | None = None,
    ) -> "Equation":
        """Build from the options of the public door; see `spikefit.ops.lif.lif` for their meaning.

        Raises:
            OptionError: an option out of range, or reset=False beside a v_reset.
        """
        if not reset and v_reset is not None:
            raise OptionError(
                f"lif: reset=False never resets, so v_reset={v_reset} has no effect; drop one of the two."
            )
        for name, value in (("v_reset", v_reset), ("v_rest", v_rest)):
            check_level("lif", name, value)
        mode: Reset = "none" if not reset else "soft" if v_reset is None else "hard"
        if v_rest is None:
            v_rest = v_reset if v_reset is not None else 0.0
        if frac_bits is not None:
            check_grid(frac_bits, mode, v_rest)
        return cls(mode, v_reset or 0.0, v_rest, strict, detach_reset, parse_surrogate(surrogate), frac_bits)


def check_level(who: str, name: str, value: float | None) -> None:
    """Raise OptionError unless `value`, the level called `name`, is None or a finite number."""
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return
    hint = " For a soft reset, write v_reset=None." if name == "v_reset" else ""
    raise OptionError(f"{who}: {name} must be a finite number or None, got {value!r}.{hint}")


# Digits of a membrane on a grid: float32 holds 24, so that the same numbers are exact in every compute dtype.
GRID_DIGITS = 24


def check_grid(frac_bits: int, reset: Reset, v_rest: float) -> None:
    """Raise OptionError unless membranes of this equation can lie on a grid of 2^-frac_bits."""
    if isinstance(frac_bits, bool) or not isinstance(frac_bits, int) or not 1 <= frac_bits < GRID_DIGITS - 1:
        raise OptionError(
            f"lif: frac_bits must be a whole number from 1 to {GRID_DIGITS - 2}, or None for no grid, got "
            f"{frac_bits!r}."
        )
    if reset != "soft" or v_rest != 0:
        raise OptionError(
            f"lif: a membrane on a grid (frac_bits={frac_bits}) has a soft reset and rests at 0, got reset {reset!r} "
            f"and v_rest={v_rest:g}; leave out v_reset, reset and v_rest, or frac_bits."
        )


class GridLeak(NamedTuple):
    """A leak that whole numbers can run backwards: 2^-m, or 1 - 2^-m with m >= 2.

    Attributes:
        shift: m.
        ties: whether the leak is 1 - 2^-m, so that a call loses one tie bit; else it loses m digits.
    """

    shift: int
    ties: bool

    @property
    def digits(self) -> int:
        """Bits that a call loses per neuron."""
        return 1 if self.ties else self.shift


def grid_leak(leak: float) -> GridLeak | None:
    """The form of a leak of 2^-m, m >= 1, or 1 - 2^-m, 2 <= m < 23; None if it is none such."""
    ties = leak > 0.5
    mantissa, exponent = math.frexp(1 - leak if ties else leak)
    # digits beyond those of a membrane would all be one
    if mantissa != 0.5 or exponent > 0 or (ties and 1 - exponent >= GRID_DIGITS - 1):
        return None
    return GridLeak(1 - exponent, ties)


def check_on_grid(frac_bits: int, leak: float, v_threshold: float) -> None:
    """Raise OptionError unless leak is 2^-m or 1 - 2^-m and v_threshold lies on the grid of 2^-frac_bits."""
    if grid_leak(leak) is None:
        raise OptionError(
            f"lif: a membrane on a grid (frac_bits={frac_bits}) needs leak = 1/2, 1/4, 1/8, ... (tau = 2, 4/3, 8/7, "
            f"...) or leak = 3/4, 7/8, 15/16, ... (tau = 4, 8, 16, ...), got leak={leak}; change tau, or leave out "
            "frac_bits."
        )
    if not float(v_threshold * 2**frac_bits).is_integer():
        raise OptionError(
            f"lif: v_threshold must be a multiple of 2^-{frac_bits} where the membrane lies on that grid, got "
            f"{v_threshold}; take more frac_bits or another threshold."
        )


def check_coefficients(leak: float, gain: float, v_threshold: float) -> None:
    """Raise OptionError unless 0 <= leak <= 1, gain is finite and v_threshold > 0."""
    if not 0 <= leak <= 1:
        raise OptionError(f"lif: leak must lie in [0, 1] (leak = 1 - 1/tau, tau >= 1 step), got {leak}.")
    if not math.isfinite(gain):
        raise OptionError(f"lif: gain must be a finite number, got {gain}.")
    if not (math.isfinite(v_threshold) and v_threshold > 0):
        raise OptionError(f"lif: v_threshold must be a finite number > 0, got {v_threshold}.")
