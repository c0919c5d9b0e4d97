"""Leaky integrate-and-fire neurons. The equation and its options stand in `spikefit.ops.lif.lif`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError
from spikefit.ops.dispatch import Backend, check_backend
from spikefit.ops.lif import lif
from spikefit.ops.lif.equation import Equation, check_level, check_on_grid
from spikefit.ops.surrogate import Surrogate, parse_surrogate


class SpikingNeuron(nn.Module):
    """Base of the neurons that fire: options of the equation, and `leak` and `gain` from the subclass.

    Args:
        v_threshold: firing level, > 0.
        v_reset: None for a soft reset (v - v_threshold), else the level of a hard reset.
        detach_reset: no gradient through the spike inside the reset.
        surrogate: a `Surrogate` or its text, "atan(2)".
        v_rest: level the membrane decays to; None means `v_reset` for a hard reset, else 0.
        reset: False for no reset at all.
        strict: fire on u > v_threshold instead of u >= v_threshold.
        frac_bits: keep the membrane on the grid of 2^-frac_bits, for leaks 2^-m and 1 - 2^-m; see `spikefit.lif`.
        groups: number of channel groups that use one membrane in turn; see `forward`.
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        OptionError: an option out of range, or reset=False beside a v_reset.

    Attributes:
        takes_turns: whether layers or groups of channels may use one membrane in turn.
    """

    takes_turns = True

    def __init__(
        self,
        *,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = True,
        surrogate: Surrogate | str = "atan(2)",
        v_rest: float | None = None,
        reset: bool = True,
        strict: bool = False,
        frac_bits: int | None = None,
        groups: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if not (math.isfinite(v_threshold) and v_threshold > 0):
            raise OptionError(f"{type(self).__name__}: v_threshold must be a finite number > 0, got {v_threshold}.")
        for name, value in (("v_reset", v_reset), ("v_rest", v_rest)):
            check_level(type(self).__name__, name, value)
        if not reset and v_reset is not None:
            raise OptionError(f"{type(self).__name__}: reset=False and v_reset={v_reset} exclude each other; drop one.")
        self.v_threshold, self.v_reset, self.detach_reset = v_threshold, v_reset, detach_reset
        self.surrogate = parse_surrogate(surrogate)
        self.v_rest, self.reset, self.strict, self.frac_bits = v_rest, reset, strict, frac_bits
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise OptionError(f"{type(self).__name__}: groups must be a whole number of at least 1, got {groups!r}.")
        self.groups = groups
        self.equation()  # complains about a grid that it does not allow
        check_backend(backend)
        self.backend: Backend = backend

    def coefficients(self) -> tuple[float | Tensor, float | Tensor]:
        """(leak, gain): the share of the membrane kept per step, and the factor on the input."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The keyword options of `spikefit.lif` that this neuron stands for."""
        leak, gain = self.coefficients()
        return {
            "leak": leak,
            "gain": gain,
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "reset": self.reset,
            "v_rest": self.v_rest,
            "strict": self.strict,
            "detach_reset": self.detach_reset,
            "surrogate": self.surrogate,
            "frac_bits": self.frac_bits,
            "backend": self.backend,
        }

    def _check_grid(self) -> None:
        """Raise OptionError unless the coefficients allow the grid that was asked for."""
        if self.frac_bits is None:
            return
        leak, _ = self.coefficients()
        if isinstance(leak, Tensor):
            raise OptionError(
                f"{type(self).__name__}: a membrane on a grid (frac_bits={self.frac_bits}) needs a fixed leak, "
                "2^-m or 1 - 2^-m, and this neuron learns it; use LIF with tau = 2, 4, 8, ..., or leave out frac_bits."
            )
        check_on_grid(self.frac_bits, leak, self.v_threshold)

    def equation(self) -> Equation:
        """The equation without its coefficients."""
        return Equation.make(
            v_reset=self.v_reset,
            reset=self.reset,
            v_rest=self.v_rest,
            strict=self.strict,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            frac_bits=self.frac_bits,
        )

    def in_turn(self, x: Tensor) -> Tensor:
        """[T, B, C, ...] as the T n calls [T n, B, C/n, ...] of a membrane that n groups of channels use in turn."""
        if self.groups == 1:
            return x
        if x.ndim < 3 or x.shape[2] % self.groups:
            raise ShapeError(
                f"{type(self).__name__}: expected [T, B, C, ...] with C a multiple of groups={self.groups}, got "
                f"{tuple(x.shape)}. Take a divisor of C."
            )
        return x.unflatten(2, (self.groups, -1)).movedim(2, 1).flatten(0, 1)

    def side_by_side(self, s: Tensor) -> Tensor:
        """The inverse of `in_turn`."""
        return s if self.groups == 1 else s.unflatten(0, (-1, self.groups)).movedim(1, 2).flatten(2, 3)

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the membrane of one sample, for a current of `shape` = (C, ...)."""
        return (shape[0] // self.groups, *shape[1:])

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(zero membrane [B, ...], shape of one output sample), for currents of `shape`: a neuron alone is a block."""
        return torch.zeros((batch_size, *self.state_shape(shape)), device=device, dtype=dtype), tuple(shape)

    def forward(self, x: Tensor, v_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Current [T, B, ...] and membrane [B, ...] (None for zeros) -> (spikes [T, B, ...], membrane [B, ...]).

        With n groups the channels are n slices of C/n, which charge one membrane [B, C/n, ...] one after the other in
        every step (Kim et al. 2023, arXiv:2305.18360).
        """
        spikes, v_T = lif(self.in_turn(x), v_0, **self.options())
        return self.side_by_side(spikes), v_T

    def extra_repr(self) -> str:
        reset = "none" if not self.reset else "soft" if self.v_reset is None else f"hard to {self.v_reset:g}"
        detached = ", detached" if self.detach_reset and self.reset else ""
        grid = "" if self.frac_bits is None else f", frac_bits={self.frac_bits}"
        shared = "" if self.groups == 1 else f", groups={self.groups}"
        return f"v_threshold={self.v_threshold:g}, reset {reset}{detached}, {self.surrogate}{grid}{shared}"


class LIF(SpikingNeuron):
    """Leaky integrate-and-fire layer over a sequence.

        u_t = leak v_{t-1} + gain x_t,   s_t = [u_t >= v_threshold],   v_t = u_t - v_threshold s_t (soft reset)
        leak = 1 - 1/tau,   gain = 1/tau if decay_input else 1

    Args:
        tau: membrane time constant in steps, >= 1.
        decay_input: whether the input decays with the membrane.
        **options: those of `SpikingNeuron`.

    Shapes:
        current [T, B, ...], membrane [B, ...] or None -> spikes [T, B, ...], membrane [B, ...].

    Raises:
        OptionError: tau below 1, or an option of `SpikingNeuron` out of range.

    Source: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948.
    """

    def __init__(self, *, tau: float = 2.0, decay_input: bool = False, **options) -> None:
        super().__init__(**options)
        if not (math.isfinite(tau) and tau >= 1):
            raise OptionError(f"LIF: tau must be at least 1 step (leak = 1 - 1/tau), got {tau}. To keep all, use IF().")
        self.tau, self.decay_input = tau, decay_input
        self._check_grid()

    def coefficients(self) -> tuple[float, float]:
        leak = 1 - 1 / self.tau
        if self.frac_bits is not None and leak > 0:
            # 1 - 1/tau misses a power of two by rounding, as at tau = 8/7
            power = 2.0 ** round(math.log2(leak))
            leak = power if math.isclose(leak, power, rel_tol=1e-9) else leak
        return leak, 1 / self.tau if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, decay_input={self.decay_input}, {super().extra_repr()}"


class IF(SpikingNeuron):
    """Integrate-and-fire layer: LIF without leak, u_t = v_{t-1} + x_t.

    Args:
        **options: those of `SpikingNeuron`.

    Shapes:
        current [T, B, ...], membrane [B, ...] or None -> spikes [T, B, ...], membrane [B, ...].

    Raises:
        OptionError: an option of `SpikingNeuron` out of range.

    Source: Abbott 1999, doi:10.1016/S0361-9230(99)00161-6 (Lapicque's model, without leak).
    """

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._check_grid()

    def coefficients(self) -> tuple[float, float]:
        return 1.0, 1.0


class ParametricLIF(SpikingNeuron):
    """LIF with one learnable time constant per layer.

        1/tau = sigmoid(w),   w_0 = -ln(tau - 1),   leak = 1 - 1/tau,   gain = 1/tau if decay_input else 1

    Args:
        tau: initial time constant in steps, > 1.
        decay_input: whether the input decays with the membrane.
        **options: those of `SpikingNeuron`.

    Shapes:
        current [T, B, ...], membrane [B, ...] or None -> spikes [T, B, ...], membrane [B, ...].

    Raises:
        OptionError: tau not above 1, or an option of `SpikingNeuron` out of range.

    Source: Fang et al. 2021, arXiv:2007.05785.
    """

    def __init__(self, *, tau: float = 2.0, decay_input: bool = False, **options) -> None:
        super().__init__(**options)
        if not (math.isfinite(tau) and tau > 1):
            raise OptionError(f"ParametricLIF: the initial tau must be above 1 step (w = -ln(tau - 1)), got {tau}.")
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)))
        self._check_grid()

    @property
    def tau(self) -> float:
        """The time constant learnt so far, in steps."""
        return 1 / float(torch.sigmoid(self.w.detach()))

    def coefficients(self) -> tuple[Tensor, float | Tensor]:
        rate = torch.sigmoid(self.w)
        return 1 - rate, rate if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"tau={self.tau:g} (learnable), decay_input={self.decay_input}, {super().extra_repr()}"
