"""The two-group neuron, whose steps can be run backwards. The equation stands in `spikefit.ops.node.two_group`."""

from torch import Tensor

from spikefit.errors import OptionError, ShapeError
from spikefit.neurons.lif import SpikingNeuron
from spikefit.ops.dispatch import Backend
from spikefit.ops.node.equation import TwoGroups, check_mixing
from spikefit.ops.node.op import check_check, two_group
from spikefit.ops.node.reversal import active_reversal
from spikefit.ops.surrogate import Surrogate


class TwoGroupNode(SpikingNeuron):
    """Two groups of neurons that drive each other, with real-valued outputs from which a step can be run backwards.

        phi(x, v):   u = (1 - kappa) v + kappa x,   s = [u >= v_threshold],   r = u + s (v_reset - u)
                     r = u - v_threshold s for a soft reset

        (s1, r1, u1) = phi(x1, v1)      y1 = s1 + beta x2      w1 = r1 + alpha v2
        (s2, r2, u2) = phi(y1, w1)      y2 = s2 + beta x1      w2 = r2 + alpha v1

    The groups are the two halves of the channels. Under plain autograd it keeps what any neuron keeps; inside
    `spikefit.neurons.reversing(...)`, or in a network under strategy `streamlined` or `generic`, it keeps states alone
    and backward runs the steps backwards.

    Args:
        alpha: share of the other group's membrane that is carried along, 0 < alpha <= kappa.
        beta: share of the other group's input in the output, 0.001 <= |beta| <= 10.
        kappa: factor on the input, 0 < kappa <= 1; the membrane keeps 1 - kappa per step.
        v_threshold: firing level, > 0.
        v_reset: the level a hard reset goes to; None or "soft" for a soft reset (v - v_threshold).
        detach_reset: no gradient through the spike inside the reset.
        surrogate: a `Surrogate` or its text, "atan(2)".
        check: "spikes" compares the spikes of a backward that runs steps backwards with those of forward, by their
            number per step and group, and raises ReconstructionError where they differ; "off" does not, and a membrane
            at the threshold, as inputs on a coarse grid make them, then gets a wrong gradient without a word.
        backend: "auto", "reference", "numba" or "triton".

    Shapes:
        current [T, B, C, ...] with C even, state [B, C, ...] or None -> outputs [T, B, C, ...], state [B, C, ...].

    Raises:
        OptionError: an option out of range; alpha above kappa, where membranes grow without bound.

    Source: a reconstruction of ours of what is public about Lei et al. 2023, arXiv:2308.08649; the constants of the
    paper are not public, and these formulas and defaults are not theirs.
    """

    takes_turns = False

    def __init__(
        self,
        *,
        alpha: float = 0.4,
        beta: float = 0.5,
        kappa: float = 0.5,
        v_threshold: float = 1.0,
        v_reset: float | str | None = 0.0,
        detach_reset: bool = False,
        surrogate: Surrogate | str = "atan(2)",
        check: str = "spikes",
        backend: Backend = "auto",
    ) -> None:
        check_mixing(alpha, beta, kappa)
        check_check(check)
        if isinstance(v_reset, str) and v_reset != "soft":
            raise OptionError(f"TwoGroupNode: v_reset must be a number, None or 'soft', got {v_reset!r}.")
        super().__init__(
            v_threshold=v_threshold,
            v_reset=None if isinstance(v_reset, str) else v_reset,
            detach_reset=detach_reset,
            surrogate=surrogate,
            v_rest=0.0,
            backend=backend,
        )
        self.alpha, self.beta, self.kappa, self.check = alpha, beta, kappa, check

    def coefficients(self) -> tuple[float, float]:
        return 1 - self.kappa, self.kappa

    def node(self) -> TwoGroups:
        """The equation as a value; `spikefit.ops.node.equation` says how far it runs backwards."""
        return TwoGroups(self.alpha, self.beta, self.kappa, self.v_threshold, self.equation())

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] % 2:
            raise ShapeError(
                f"TwoGroupNode: expected an even number of channels, one half for each group, got {shape[0]}; take a "
                "layer with one channel more or less."
            )
        return tuple(shape)

    def forward(self, x: Tensor, v_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Current [T, B, C, ...], state [B, C, ...] (None for zeros) -> (outputs [T, B, C, ...], state [B, C, ...])."""
        return two_group(
            x,
            v_0,
            alpha=self.alpha,
            beta=self.beta,
            kappa=self.kappa,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            check=self.check,
            reversal=active_reversal(),
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        check = "" if self.check == "spikes" else f", check={self.check}"
        return f"alpha={self.alpha:g}, beta={self.beta:g}, kappa={self.kappa:g}, {super().extra_repr()}{check}"
