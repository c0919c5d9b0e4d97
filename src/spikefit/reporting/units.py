"""Numbers as people read them: MiB, ms, uJ, three significant digits."""

import math

MIB = 2**20


def significant(x: float | None, digits: int = 3) -> str:
    """`digits` significant digits: 1234.5 -> 1,234, 0.01234 -> 0.0123, 1e30 -> 1.00e+30; None -> a dash."""
    if x is None:
        return "–"
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if not 1e-6 <= abs(x) < 1e9:
        return f"{x:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(x)))
    return f"{x:,.{max(0, decimals)}f}"


def mib(count: float | None) -> str:
    """Bytes as MiB, without the unit."""
    return significant(None if count is None else count / MIB)


def milliseconds(seconds: float | None) -> str:
    """Seconds as ms, without the unit."""
    return significant(None if seconds is None else seconds * 1e3)


def microjoules(picojoules: float | None) -> str:
    """pJ as uJ, without the unit."""
    return significant(None if picojoules is None else picojoules * 1e-6)


def percent(share: float | None) -> str:
    """A share of 1 as percent with two decimals, without the unit."""
    return "–" if share is None else f"{100 * share:.2f}"


def ratio(x: float | None, base: float | None) -> str:
    """x / base as "0.42x", or nothing where either is unknown."""
    return "" if x is None or not base else f"{x / base:.2f}x"


def error(x: float | None) -> str:
    """A relative error: 0, or one digit and an exponent."""
    return "–" if x is None else "0" if x == 0 else f"{x:.1e}"
