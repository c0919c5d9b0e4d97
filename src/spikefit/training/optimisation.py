"""What happens around the optimiser: the learning rate of every update, and averaged weights."""

import copy
import math

import torch
from torch import Tensor, nn

from spikefit.training.recipe import TrainSection


def learning_rate(section: TrainSection, update: int, updates_per_epoch: int) -> float:
    """Learning rate of update number `update`, counted from 0.

        warm-up, u < w:     lr (u + 1) / (w + 1)
        constant, u >= w:   lr
        cosine, u >= w:     lr (1 + cos(pi (u - w) / (n - w))) / 2

    w: updates of the warm-up, n: updates of the whole run.

    Source: Loshchilov, Hutter 2017, arXiv:1608.03983 (cosine); Goyal et al. 2017, arXiv:1706.02677 (warm-up).
    """
    total = section.epochs * updates_per_epoch
    warmup = round(section.warmup_epochs * updates_per_epoch)
    if update < warmup:
        return section.lr * (update + 1) / (warmup + 1)
    if section.schedule == "constant":
        return section.lr
    return section.lr * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


class AveragedWeights:
    """Exponential moving average of parameters and float buffers; whole-number buffers are copied.

        a <- d_u a + (1 - d_u) w,   d_u = min(decay, (1 + u) / (10 + u))

    The decay grows with the number u of updates, so that the initial weights are forgotten in short runs too.

    Args:
        model: the model to follow; it is copied.
        decay: largest share of the average kept per update, in [0, 1).

    Source: Polyak, Juditsky 1992, doi:10.1137/0330046 (averaging).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move the average towards `model` after update number `updates`, counted from 0."""
        share = 1 - min(self.decay, (1 + updates) / (10 + updates))
        fresh: dict[str, Tensor] = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(fresh[name], share)
            else:
                average.copy_(fresh[name])
