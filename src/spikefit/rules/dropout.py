"""Dropout under a rule: one mask for the whole sequence."""

import torch
from torch import Tensor, nn


class Masks:
    """The masks of one sequence, each drawn where it is first used.

    A layer has one mask for every shape of a step, however many steps a call brings.
    """

    def __init__(self) -> None:
        self.drawn: dict[tuple[nn.Module, torch.Size], Tensor] = {}

    def drop(self, layer: nn.Module, x: Tensor, p: float) -> Tensor:
        """Steps [T, B, ...] without the same elements, each with probability `p`, and the rest times 1 / (1 - p)."""
        key = (layer, x.shape[1:])
        if key not in self.drawn:
            self.drawn[key] = nn.functional.dropout(torch.ones_like(x[:1]), p)
        return x * self.drawn[key].to(x.dtype)
