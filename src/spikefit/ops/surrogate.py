"""Surrogate slopes: the derivative used in place of that of the step function, and its smooth primitive.

With d = u - v_threshold the forward pass is a step, s = [d >= 0]; backward uses `slope(d)`. Each slope is the
derivative of a smooth function, its `primitive`, so that a network in which the primitive replaces the step (the smooth
twin) can be checked by finite differences.

Sources: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948 (method); Fang et al. 2021, arXiv:2007.05785 (atan);
Zenke, Ganguli 2018, arXiv:1705.11146 (fast sigmoid); Esser et al. 2016, arXiv:1603.08270 (triangle).
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from spikefit.errors import OptionError


@dataclass(frozen=True)
class Surrogate:
    """A surrogate by name and width parameter; make one with `atan`, `triangle`, `rect`, `sigmoid`, `fast_sigmoid`.

    Attributes:
        name: a key of `FORMS`.
        parameter: alpha, width or k of the form; > 0.

    Raises:
        OptionError: an unknown name, or a parameter that is no positive number.
    """

    name: str
    parameter: float

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise OptionError(f"surrogate: unknown name {self.name!r}; known: {', '.join(FORMS)}.")
        if not (isinstance(self.parameter, Real) and math.isfinite(self.parameter) and self.parameter > 0):
            raise OptionError(f"surrogate {self.name}: the parameter must be finite and > 0, got {self.parameter!r}.")

    def slope(self, d: Tensor) -> Tensor:
        """ds/du at d = u - v_threshold, elementwise; shape and dtype of `d`."""
        return FORMS[self.name].slope(d, self.parameter)

    def primitive(self, d: Tensor) -> Tensor:
        """A smooth step whose derivative is `slope`; 1/2 at d = 0."""
        return FORMS[self.name].primitive(d, self.parameter)

    def __str__(self) -> str:
        if self.name == "rect_closed":
            return f"rect({self.parameter:g}, closed=True)"
        return f"{self.name}({self.parameter:g})"


@dataclass(frozen=True)
class Form:
    """One family of surrogates: `slope(d, parameter)` and its `primitive(d, parameter)`.

    `kernel` is the number under which the compiled kernels know it; None means that only the reference runs it.
    """

    slope: Callable[[Tensor, float], Tensor]
    primitive: Callable[[Tensor, float], Tensor]
    kernel: int | None = None


def _triangle_primitive(d: Tensor, width: float) -> Tensor:
    e = (d / width).clamp(-1, 1)
    return 0.5 + e - e * e.abs() / 2


def _sigmoid_slope(d: Tensor, alpha: float) -> Tensor:
    p = torch.sigmoid(alpha * d)
    return alpha * p * (1 - p)


FORMS: dict[str, Form] = {
    "atan": Form(
        lambda d, alpha: (alpha / 2) / (1 + (math.pi / 2 * alpha * d) ** 2),
        lambda d, alpha: 0.5 + torch.atan(math.pi / 2 * alpha * d) / math.pi,
        kernel=0,
    ),
    "triangle": Form(lambda d, width: (1 - d.abs() / width).clamp(min=0) / width, _triangle_primitive, kernel=1),
    "rect": Form(
        lambda d, width: (d.abs() < width / 2).to(d.dtype) / width,
        lambda d, width: (d / width + 0.5).clamp(0, 1),
        kernel=2,
    ),
    "rect_closed": Form(
        lambda d, width: (d.abs() <= width / 2).to(d.dtype) / width,
        lambda d, width: (d / width + 0.5).clamp(0, 1),
        kernel=3,
    ),
    "sigmoid": Form(_sigmoid_slope, lambda d, alpha: torch.sigmoid(alpha * d), kernel=4),
    "fast_sigmoid": Form(
        lambda d, k: 1 / (1 + k * d.abs()) ** 2,
        lambda d, k: 0.5 + d / (1 + k * d.abs()),
        kernel=5,
    ),
}


def atan(alpha: float = 2.0) -> Surrogate:
    """ds/du = (alpha/2) / (1 + (pi/2 * alpha * d)^2).

    Args:
        alpha: sharpness, in 1 / unit of `v_threshold`; > 0.

    Raises:
        OptionError: alpha is not a positive number.

    Source: Fang et al. 2021, arXiv:2007.05785.
    """
    return Surrogate("atan", alpha)


def triangle(width: float = 1.0) -> Surrogate:
    """ds/du = max(0, 1 - |d| / width) / width.

    Args:
        width: half-width of the triangle, in the unit of `v_threshold`; > 0.

    Raises:
        OptionError: width is not a positive number.

    Source: Esser et al. 2016, arXiv:1603.08270.
    """
    return Surrogate("triangle", width)


def rect(width: float = 1.0, *, closed: bool = False) -> Surrogate:
    """ds/du = 1 / width for |d| < width / 2, else 0; with `closed` also at |d| = width / 2.

    Args:
        width: full width of the window, in the unit of `v_threshold`; > 0.
        closed: whether the two edges belong to the window.

    Raises:
        OptionError: width is not a positive number.

    Source: Wu et al. 2018, arXiv:1706.02609.
    """
    return Surrogate("rect_closed" if closed else "rect", width)


def sigmoid(alpha: float = 4.0) -> Surrogate:
    """ds/du = alpha p (1 - p), p = 1 / (1 + exp(-alpha d)).

    Args:
        alpha: sharpness, in 1 / unit of `v_threshold`; > 0.

    Raises:
        OptionError: alpha is not a positive number.

    Source: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948.
    """
    return Surrogate("sigmoid", alpha)


def fast_sigmoid(k: float = 25.0) -> Surrogate:
    """ds/du = 1 / (1 + k |d|)^2.

    Args:
        k: sharpness, in 1 / unit of `v_threshold`; > 0.

    Raises:
        OptionError: k is not a positive number.

    Source: Zenke, Ganguli 2018, arXiv:1705.11146.
    """
    return Surrogate("fast_sigmoid", k)


MAKERS: dict[str, Callable[..., Surrogate]] = {
    "atan": atan,
    "triangle": triangle,
    "rect": rect,
    "sigmoid": sigmoid,
    "fast_sigmoid": fast_sigmoid,
}


def parse_surrogate(text: "str | Surrogate") -> Surrogate:
    """Read a surrogate as recipes write it: "atan", "atan(2)", "rect(1, closed=True)".

    Args:
        text: the name, with or without its arguments; a `Surrogate` is returned as it is.

    Raises:
        OptionError: unknown name or unreadable arguments; near names are listed.
    """
    if isinstance(text, Surrogate):
        return text
    if not isinstance(text, str):
        raise OptionError(f"surrogate: expected text such as 'atan(2)', or a Surrogate, got {text!r}.")
    name = text.partition("(")[0].strip()
    if name not in MAKERS:
        near = difflib.get_close_matches(name, MAKERS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise OptionError(f"surrogate: expected one of {', '.join(MAKERS)}, for example 'atan(2)', got {text!r}{hint}")
    match = re.fullmatch(r"\s*\w+\s*(?:\(\s*([^\s,()=]+)?\s*(?:,?\s*closed\s*=\s*(\w+))?\s*\))?\s*", text)
    if match is None:
        form = "rect(1) or rect(1, closed=True)" if name == "rect" else f"{name}({MAKERS[name]().parameter:g})"
        raise OptionError(f"surrogate: cannot read {text!r}; write it as {form}.")
    parameter, closed = match[1], match[2]
    options: dict[str, bool] = {}
    if closed is not None:
        if name != "rect" or closed.lower() not in ("true", "false"):
            raise OptionError(f"surrogate: only rect takes closed = true | false, got {text!r}.")
        options["closed"] = closed.lower() == "true"
    try:
        numbers = [float(parameter)] if parameter else []
    except ValueError:
        raise OptionError(
            f"surrogate: cannot read the number in {text!r}: expected one > 0, got {parameter!r}."
        ) from None
    return MAKERS[name](*numbers, **options)
