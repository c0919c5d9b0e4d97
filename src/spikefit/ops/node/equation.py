"""The two-group node as a value: what the backends agree on, and how far its steps can be run backwards.

The formulas are a reconstruction of ours from what is public about the node of Lei et al. 2023, arXiv:2308.08649, whose
constants are not public.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from spikefit.errors import OptionError
from spikefit.ops.lif.equation import Equation, Reset
from spikefit.ops.surrogate import Surrogate

# Largest growth of rounding, rho^K eps, at which running K steps backwards counts as safe.
SAFE_GROWTH = 1e-3
# Least and largest |beta|. In y = s + beta x the digits of x below eps / beta are lost beside a spike; at 1e-3 that is
# 6e-5 in float32, the rounding of four steps undone at the defaults. And y drives the other group, so its membranes and
# their rounding grow with beta: at 10, four steps undone come to 6e-4, which `SAFE_GROWTH` still allows.
BETA_RANGE = (1e-3, 10.0)
# Distances beyond this many steps are as good as none.
LONGEST = 1 << 20


@dataclass(frozen=True)
class TwoGroups:
    """The node without tensors.

    Attributes:
        alpha: share of the other group's membrane that is carried along.
        beta: share of the other group's input in the output.
        kappa: factor on the input; the membrane keeps 1 - kappa per step.
        v_threshold: firing level.
        equation: reset, surrogate, and whether the reset carries a gradient.
    """

    alpha: float
    beta: float
    kappa: float
    v_threshold: float
    equation: Equation

    @property
    def leak(self) -> float:
        """lam = 1 - kappa."""
        return 1 - self.kappa

    @property
    def who(self) -> str:
        """The numbers that decide how far the node runs backwards, for messages."""
        return f"alpha={self.alpha:g}, kappa={self.kappa:g}"

    @classmethod
    def make(
        cls,
        *,
        alpha: float,
        beta: float,
        kappa: float,
        v_threshold: float,
        v_reset: float | None,
        detach_reset: bool,
        surrogate: Surrogate | str,
    ) -> "TwoGroups":
        """Build from the options of the public door; see `spikefit.ops.node.two_group` for their meaning.

        Raises:
            OptionError: an option out of range.
        """
        check_mixing(alpha, beta, kappa)
        if not (math.isfinite(v_threshold) and v_threshold > 0):
            raise OptionError(f"two_group: v_threshold must be a finite number > 0, got {v_threshold}.")
        equation = Equation.make(
            v_reset=v_reset, reset=True, v_rest=0.0, strict=False, detach_reset=detach_reset, surrogate=surrogate
        )
        return cls(float(alpha), float(beta), float(kappa), float(v_threshold), equation)

    def flat(self) -> tuple[list[float], str, bool, str]:
        """The node as arguments a custom op can take; `unflat` reads them."""
        e = self.equation
        numbers = [self.alpha, self.beta, self.kappa, self.v_threshold, e.v_reset, e.surrogate.parameter]
        return numbers, e.reset, e.detach_reset, e.surrogate.name

    @classmethod
    def unflat(cls, numbers: Sequence[float], reset: str, detach_reset: bool, surrogate: str) -> "TwoGroups":
        """The node from what `flat` returned."""
        alpha, beta, kappa, v_threshold, v_reset, parameter = numbers
        equation = Equation(cast(Reset, reset), v_reset, 0.0, False, detach_reset, Surrogate(surrogate, parameter))
        return cls(alpha, beta, kappa, v_threshold, equation)


def check_mixing(alpha: float, beta: float, kappa: float) -> None:
    """Raise OptionError unless 0 < kappa <= 1, 0 < alpha <= kappa and |beta| lies in `BETA_RANGE`."""
    for name, value in (("alpha", alpha), ("beta", beta), ("kappa", kappa)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(f"two_group: {name} must be a finite number, got {value!r}.")
    if not 0 < kappa <= 1:
        raise OptionError(f"two_group: kappa must lie in (0, 1] (it leaves 1 - kappa of the membrane), got {kappa}.")
    if beta == 0:
        raise OptionError(
            "two_group: beta must not be 0, as backward divides by it to get the input back; take beta=0.5."
        )
    least, most = BETA_RANGE
    if not least <= abs(beta) <= most:
        lost = "the spike hides the input" if abs(beta) < least else "the input hides the spike"
        raise OptionError(
            f"two_group: |beta| must lie in [{least:g}, {most:g}], got {beta:g}: outputs are s + beta x, and "
            f"in rounding {lost}; take beta=0.5."
        )
    if alpha <= 0:
        raise OptionError(
            f"two_group: alpha must lie in (0, kappa], as backward divides by it to get the membrane back, got {alpha};"
            f" take at most kappa={kappa:g}."
        )
    if alpha > kappa:
        raise OptionError(
            f"two_group: alpha must be at most kappa, here {kappa:g}, got {alpha:g}: without spikes the membranes "
            f"would grow by {forward_multiplier(alpha, kappa):.3g} per step. Lower alpha to {kappa:g}, or raise kappa."
        )


def forward_multiplier(alpha: float, kappa: float) -> float:
    """The factor by which membranes grow per step without spikes: 1 at alpha = kappa, less below.

    The larger root of z^2 - lam (1 + alpha) z - alpha^2 with lam = 1 - kappa.
    """
    half = (1 - kappa) * (1 + alpha) / 2
    return half + math.hypot(half, alpha)


def reverse_multiplier(alpha: float, kappa: float) -> float:
    """rho, the factor by which rounding grows per step run backwards (without spikes).

    rho = 2 / (sqrt(lam^2 (1 + alpha)^2 + 4 alpha^2) - lam (1 + alpha)),   lam = 1 - kappa
    """
    # the product of the roots is -alpha^2, which avoids a difference of two large numbers
    return forward_multiplier(alpha, kappa) / alpha**2


def reverse_growth(steps: int, node: TwoGroups, dtype: torch.dtype) -> float:
    """rho^steps eps: how large rounding may have become after so many steps run backwards.

    Args:
        steps: steps undone since the last state that was kept.
        node: the node.
        dtype: of the membranes; eps = 2^-24 for float32, 2^-53 for float64.
    """
    exponent = steps * math.log(reverse_multiplier(node.alpha, node.kappa)) + math.log(torch.finfo(dtype).eps / 2)
    return math.exp(exponent) if exponent < 700 else math.inf


def safe_steps(node: TwoGroups, dtype: torch.dtype) -> int:
    """The largest number of steps whose growth of rounding stays within `SAFE_GROWTH`; 0 if not even one does."""
    per_step = math.log(reverse_multiplier(node.alpha, node.kappa))
    room = math.log(SAFE_GROWTH) - math.log(torch.finfo(dtype).eps / 2)
    # alpha = kappa = 1 carries membranes over as they are
    return LONGEST if per_step * LONGEST <= room else max(0, math.floor(room / per_step + 1e-9))
