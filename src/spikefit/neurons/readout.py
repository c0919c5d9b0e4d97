"""The leaky read-out: a membrane that never fires."""

import math

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.ops.dtype import compute_dtype


class LeakyReadout(nn.Module):
    """Leaky integrator whose membrane is the output of the network at every step.

        v_t = leak v_{t-1} + gain x_t,   leak = 1 - 1/tau,   gain = 1/tau if decay_input else 1

    Args:
        tau: time constant in steps, >= 1; math.inf adds up all inputs.
        decay_input: whether the input decays with the membrane (an exponential mean).

    Shapes:
        input [T, B, K], membrane [B, K] or None -> membrane of every step [T, B, K], last membrane [B, K].

    Raises:
        OptionError: tau below 1.
        ShapeError: no time axis.
        StateError: a membrane of another shape.

    Source: Bellec et al. 2018, arXiv:1803.09574 (read-out neurons).
    """

    def __init__(self, *, tau: float = 2.0, decay_input: bool = False) -> None:
        super().__init__()
        if not tau >= 1:
            raise OptionError(f"LeakyReadout: tau must be at least 1 step, got {tau}.")
        self.tau, self.decay_input = tau, decay_input
        self.leak, self.gain = 1 - 1 / tau, 1 / tau if decay_input and math.isfinite(tau) else 1.0

    def forward(self, x: Tensor, v_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input [T, B, K] and membrane [B, K] (None for zeros) -> (membranes [T, B, K], last membrane [B, K]).

        Raises:
            ShapeError: no time axis.
            StateError: a membrane of another shape.
        """
        if x.ndim < 2 or x.shape[0] == 0:
            raise ShapeError(f"LeakyReadout: expected x as [T, B, K] with T >= 1, got {tuple(x.shape)}.")
        compute = compute_dtype(x.dtype)
        if v_0 is not None and v_0.shape != x.shape[1:]:
            raise StateError(
                f"LeakyReadout: expected a membrane {tuple(x.shape[1:])}, got {tuple(v_0.shape)}. "
                "Pass the state of this batch, or None to start from zero."
            )
        v = torch.zeros_like(x[0], dtype=compute) if v_0 is None else v_0
        membranes = []
        for x_t in x.unbind(0):
            v = self.leak * v + self.gain * x_t.to(compute)
            membranes.append(v)
        return torch.stack(membranes), v

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, decay_input={self.decay_input}"
