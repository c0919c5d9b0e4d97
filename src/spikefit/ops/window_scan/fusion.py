"""How two membranes become the one that a window starts from.

Source: Yao, Wu, Chen, Zhang, ACML 2023, PMLR 222, pp. 1558-1573 (the projection `omega`, and the other forms as its
ablations). The bounds and closed forms here are derived.
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from spikefit.errors import OptionError, ShapeError
from spikefit.ops.lif.reference import Scalar
from spikefit.ops.values import has_values
from spikefit.ops.window_scan.sine import cosine, sine


def omega(a: Tensor, c: Tensor, phi: Scalar = 0.5) -> Tensor:
    """2 sin(phi pi a / 2) cos(phi pi c / 2), the projection of two membranes.

    omega(x, x) = sin(phi pi x), and |omega| <= 2. The slope at 0 is phi pi in a and 0 in c: c opens and closes the way
    of a, and is no summand.

    Args:
        a, c: membranes of one shape, in the unit of the threshold.
        phi: projection constant, 0 < phi < 1; number or 0-d tensor.

    Raises:
        OptionError: phi outside its range.
    """
    check_phi("omega", phi)
    return _omega(a, c, phi)


def over_activation(phi: float = 0.5, v_threshold: float = 0.5) -> tuple[float, float]:
    """(S, D): how strongly `omega` answers where both membranes are between one and two thresholds.

        S = integral of omega(a, c) over [theta, 2 theta]^2
          = 16 sin(3 phi pi theta/2) sin^2(phi pi theta/4) / (phi pi)^2
        D = S - 3 theta^3, the same minus the integral of a + c

    Args:
        phi: projection constant, 0 < phi < 1.
        v_threshold: theta, > 0.

    Raises:
        OptionError: an argument outside its range.
    """
    check_phi("over_activation", phi)
    check_threshold("over_activation", v_threshold)
    h = phi * math.pi / 2
    s = 4 * math.sin(3 * h * v_threshold) * math.sin(h * v_threshold / 2) ** 2 / h**2
    return s, s - 3 * v_threshold**3


def check_phi(who: str, phi: Scalar) -> None:
    """Raise OptionError unless 0 < phi < 1; a tensor is looked into only where that costs nothing."""
    value = _value(who, "phi", phi)
    if value is not None and not 0 < value < 1:
        raise OptionError(
            f"{who}: phi must lie in (0, 1), got {value}. The default is 0.5; fuse='none' carries nothing at all."
        )


def check_threshold(who: str, v_threshold: Scalar) -> None:
    """Raise OptionError unless v_threshold is finite and > 0, as `check_phi`."""
    value = _value(who, "v_threshold", v_threshold)
    if value is not None and not (math.isfinite(value) and value > 0):
        raise OptionError(f"{who}: v_threshold must be a finite number > 0, got {value}.")


def _value(who: str, name: str, scalar: Scalar) -> float | None:
    """The number behind a scalar; None where a tensor cannot be read, or a device would have to be waited for."""
    if isinstance(scalar, Tensor):
        if scalar.ndim != 0:
            raise ShapeError(f"{who}: {name} is a number or a 0-d tensor, got a tensor {tuple(scalar.shape)}.")
        return scalar.item() if has_values(scalar) and scalar.device.type == "cpu" else None
    if not isinstance(scalar, Real):
        raise OptionError(f"{who}: {name} must be a number or a 0-d tensor, got {scalar!r}.")
    return float(scalar)


def _omega(a: Tensor, c: Tensor, phi: Scalar) -> Tensor:
    h = phi * (math.pi / 2)
    return 2 * (sine(h * a) * cosine(h * c))


def _omega_release(a: Tensor, c: Tensor, phi: Scalar) -> Tensor:
    """2 sin((phi pi a / 2) cos(phi pi c / 2)): the published code closes a parenthesis elsewhere."""
    h = phi * (math.pi / 2)
    return 2 * sine(h * a * cosine(h * c))


FUSIONS: dict[str, Callable[[Tensor, Tensor, Scalar], Tensor]] = {
    "omega": _omega,
    "omega_release": _omega_release,
    "mean": lambda a, c, phi: 0.5 * (a + c),
    "a": lambda a, c, phi: a,
    "c": lambda a, c, phi: c,
    "sum": lambda a, c, phi: a + c,
    "relu": lambda a, c, phi: torch.relu(a + c),
    "tanh": lambda a, c, phi: torch.tanh(a + c),
    "sigmoid": lambda a, c, phi: torch.sigmoid(a + c),
    "none": lambda a, c, phi: torch.zeros_like(a),
}
# Fusions that the compiled kernels know, by their number there.
COMPILED: tuple[str, ...] = ("none", "a", "c", "sum", "mean", "relu", "omega")


def reads(fuse: str) -> tuple[bool, bool]:
    """Whether the fusion looks at A, and at C."""
    return fuse not in ("c", "none"), fuse not in ("a", "none")
