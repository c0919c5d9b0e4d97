"""Neurons of one time step, whose membrane goes from window to window and from layer to layer instead.

The equation stands in `spikefit.ops.window_scan`.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573). Learned constants and their bounds are ours.
"""

import math

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, check_choice
from spikefit.ops.dispatch import Backend, check_backend
from spikefit.ops.lif.equation import RESETS
from spikefit.ops.surrogate import Surrogate, parse_surrogate
from spikefit.ops.window_scan import FUSIONS, Links, apart, check_phi, check_threshold, window_scan

# Fusions that read phi.
PROJECTIONS = ("omega", "omega_release")
# A learned phi stays below the first, of neurons behind recurrent weights below the second; and phi times threshold
# below the third.
PHI_LIMIT, STABLE_PHI, PHI_THRESHOLD = 0.65, 0.6, 0.25
LEAST_THRESHOLD = 1e-3


class WindowLIF(nn.Module):
    """Neurons that start every window from what other windows and layers left.

        u_p = leak fuse(a_p, c_p) + x_p,   s_p = 1 if u_p > v_threshold else 0,   m_p = u_p (or behind a reset)

    Which membranes a_p and c_p are is up to the caller, see `Links`.

    Args:
        fuse: a key of `FUSIONS`; "omega" is 2 sin(phi pi a / 2) cos(phi pi c / 2). "none" starts every window at 0.
        phi: projection constant, 0 < phi < 1.
        leak: share kept of what is carried, 0 <= leak <= 1.
        v_threshold: firing level, > 0.
        reset: "none", "soft" (m = u - v_threshold s) or "hard" (m = u (1 - s)); no gradient through the s inside.
        surrogate: a `Surrogate` or its text.
        learn_phi: train phi, as phi_limit sigmoid(w).
        learn_threshold: train the threshold, which stays in (0, 1/4 / phi]; at an end, gradients that lead back pass.
        phi_limit: upper bound of a learned phi.
        backend: "auto", "reference", "numba" or "triton"; learned constants run on the reference.

    Shapes:
        x [P, B, ...], given [P, B, ...] or None -> spikes, membranes [P, B, ...].

    Raises:
        OptionError: an option out of range, or one without effect.
    """

    def __init__(
        self,
        *,
        fuse: str = "omega",
        phi: float = 0.5,
        leak: float = 0.4,
        v_threshold: float = 0.5,
        reset: str = "none",
        surrogate: Surrogate | str = "rect(1)",
        learn_phi: bool = False,
        learn_threshold: bool = False,
        phi_limit: float = PHI_LIMIT,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_choice(who, "fuse", fuse, FUSIONS)
        check_choice(who, "reset", reset, RESETS)
        if not 0 <= leak <= 1:
            raise OptionError(f"{who}: leak must lie in [0, 1], got {leak}.")
        check_threshold(who, v_threshold)
        check_phi(who, phi)
        check_backend(backend)
        self.fuse, self.leak, self.reset, self.backend = fuse, leak, reset, backend
        self.surrogate, self.phi_limit = parse_surrogate(surrogate), phi_limit
        self._phi, self._threshold = phi, v_threshold
        if learn_phi:
            if fuse not in PROJECTIONS:
                raise OptionError(f"{who}: fuse={fuse!r} does not read phi, so there is nothing to learn.")
            if not phi < phi_limit:
                raise OptionError(f"{who}: a learned phi starts below {phi_limit}, got {phi}.")
            self.w_phi = nn.Parameter(torch.tensor(math.log(phi / (phi_limit - phi))))
        if learn_threshold:
            if phi * v_threshold > PHI_THRESHOLD:
                raise OptionError(
                    f"{who}: with a learned threshold phi * v_threshold stays at most {PHI_THRESHOLD}, got "
                    f"{phi * v_threshold:g}; start lower."
                )
            self.w_threshold = nn.Parameter(torch.tensor(float(v_threshold)))

    @property
    def phi(self) -> float | Tensor:
        """The projection constant; 0-d if it is learned."""
        return self.phi_limit * torch.sigmoid(self.w_phi) if hasattr(self, "w_phi") else self._phi

    @property
    def v_threshold(self) -> float | Tensor:
        """The firing level; 0-d if it is learned."""
        if not hasattr(self, "w_threshold"):
            return self._threshold
        highest = PHI_THRESHOLD / self.phi
        if not isinstance(highest, Tensor):
            highest = self.w_threshold.new_full((), highest)
        return _Held.apply(self.w_threshold, highest)

    def forward(
        self,
        x: Tensor,
        given: Tensor | None = None,
        links: Links | None = None,
        *,
        fuse: str | None = None,
        want_membranes: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Currents of all windows -> (spikes, membranes behind the reset; None where nobody wants them).

        Args:
            x: current [P, B, ...].
            given: membranes [P, B, ...] that `links` refers to.
            links: where windows start from; None for zero.
            fuse: another fusion than that of the module, for a chain with one memory.
            want_membranes: whether they are read.
        """
        fuse = self.fuse if fuse is None or self.fuse == "none" else fuse
        if links is None or fuse == "none":
            links, given, fuse = apart(x.shape[0]), None, "none"
        return window_scan(
            x,
            given,
            links=links,
            fuse=fuse,
            phi=self.phi,
            leak=self.leak,
            v_threshold=self.v_threshold,
            reset=self.reset,
            surrogate=self.surrogate,
            backend=self.backend,
            want_membranes=want_membranes,
        )

    def extra_repr(self) -> str:
        return (
            f"fuse={self.fuse}, phi={_number(self.phi):g}, leak={self.leak:g}, "
            f"v_threshold={_number(self.v_threshold):g}, reset {self.reset}, {self.surrogate}"
        )


class _Held(torch.autograd.Function):
    """w, not below `LEAST_THRESHOLD` and not above `highest`; a gradient that leads back to where it is free passes."""

    @staticmethod
    def forward(ctx, w: Tensor, highest: Tensor) -> Tensor:
        ctx.save_for_backward(w, highest)
        return torch.minimum(w.clamp(min=LEAST_THRESHOLD), highest)

    @staticmethod
    def backward(ctx, g: Tensor):
        w, highest = ctx.saved_tensors
        # a step goes against the gradient
        outwards = ((w > highest) & (g < 0)) | ((w < LEAST_THRESHOLD) & (g > 0))
        return g.masked_fill(outwards, 0), g.masked_fill(w <= highest, 0)


class WindowReLU(nn.Module):
    """The neuron of the analog twin: max(x, 0), with nothing carried.

    Shapes:
        x [P, B, ...] -> the same, and no membranes; further arguments of `WindowLIF` are taken and have no effect.
    """

    def forward(self, x: Tensor, *carried: object, **options: object) -> tuple[Tensor, None]:
        """(max(x, 0), None)."""
        return torch.relu(x), None


def _number(scalar: float | Tensor) -> float:
    return float(scalar.detach()) if isinstance(scalar, Tensor) else scalar
