"""Gains: the share of an analog state that each stage hands to the next time step.

    free      a = p                                  starts at 1/2
    bounded   a = a_min + (1 - a_min) sigmoid(p)     starts at 3/4, a_min = 1/2
    one       a = 1                                  nothing to learn

Source: Hu et al. 2024, arXiv:2405.16466 (free, in the release); the other two are ours.
"""

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError

# Kind of gain -> the smallest |a| by which backward may divide.
MINIMUM = {"free": 1e-3, "bounded": 0.5, "one": 1.0}


class Gains(nn.Module):
    """Gains of every stage, time step and channel.

    Args:
        widths: channels C_l of the stages.
        timesteps: T.
        kind: "free", "bounded" or "one".
        learn: whether they are trained; without, they stay where they start.

    Raises:
        OptionError: unknown kind, or gains of one that are to be learned.

    Those of the first step multiply nothing, as states start at zero; they are kept so that all steps are alike.
    """

    def __init__(self, widths: tuple[int, ...], timesteps: int, *, kind: str = "bounded", learn: bool = True) -> None:
        super().__init__()
        if kind not in MINIMUM:
            raise OptionError(f"gain: expected one of {', '.join(MINIMUM)}, got {kind!r}.")
        self.kind, self.widths, self.timesteps = kind, tuple(widths), timesteps
        start = 0.5 if kind == "free" else 0.0
        # one axis: weight decay, which would draw gains away from where the way back is safe, leaves such parameters
        self.raw = nn.ParameterList(
            nn.Parameter(torch.full((timesteps * c,), start), requires_grad=learn)
            for c in (self.widths if kind != "one" else ())
        )

    def forward(self) -> list[list[Tensor | None]]:
        """a by [step][stage], each [C]; None for 1."""
        if self.kind == "one":
            return [[None] * len(self.widths) for _ in range(self.timesteps)]
        least = MINIMUM["bounded"]
        stages = [p if self.kind == "free" else least + (1 - least) * torch.sigmoid(p) for p in self.raw]
        rows = [a.view(self.timesteps, -1).unbind() for a in stages]
        return [[stage[t] for stage in rows] for t in range(self.timesteps)]

    def extra_repr(self) -> str:
        return f"{self.kind}, widths={self.widths}, timesteps={self.timesteps}"
