"""The scan of windows as a value: what the three backends agree on."""

import difflib
from dataclasses import dataclass
from numbers import Real

from spikefit.errors import OptionError
from spikefit.ops.lif.equation import RESETS, Reset
from spikefit.ops.surrogate import Surrogate, parse_surrogate
from spikefit.ops.window_scan.fusion import FUSIONS, reads
from spikefit.ops.window_scan.links import Links


@dataclass(frozen=True)
class Equation:
    """u_p = leak fuse(A_p, C_p) + x_p;  s_p = [u_p > theta];  m_p = reset(u_p, s_p).

    Attributes:
        links: A_p and C_p of every window; zeros where the fusion does not look.
        fuse: a key of `FUSIONS`.
        leak: share of the fused membrane that a window starts from.
        reset: "none" (m = u), "soft" (m = u - theta s) or "hard" (m = u (1 - s)); s carries no gradient there.
        strict: fire on u > theta instead of u >= theta.
        surrogate: slope of the step.
    """

    links: Links
    fuse: str
    leak: float
    reset: Reset
    strict: bool
    surrogate: Surrogate

    @classmethod
    def make(
        cls, *, links: Links, fuse: str, leak: float, reset: str, strict: bool, surrogate: Surrogate | str
    ) -> "Equation":
        """Build from the options of the public door; see `window_scan` for their meaning.

        Raises:
            OptionError: an option out of range.
        """
        if not isinstance(links, Links):
            raise OptionError(f"window_scan: links must be a Links, for example in_turn(4), got {links!r}.")
        if fuse not in FUSIONS:
            near = difflib.get_close_matches(str(fuse), FUSIONS, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"window_scan: fuse must be one of {', '.join(FUSIONS)}, got {fuse!r}.{hint}")
        if reset not in RESETS:
            raise OptionError(f"window_scan: reset must be one of {', '.join(RESETS)}, got {reset!r}.")
        if not (isinstance(leak, Real) and 0 <= leak <= 1):
            raise OptionError(f"window_scan: leak must be a number in [0, 1], got {leak!r}.")
        return cls(links.only(*reads(fuse)), fuse, float(leak), reset, strict, parse_surrogate(surrogate))
