"""A small network with auxiliary heads, as losses, training and planning expect them; recipes call it "headed:make"."""

import torch
from torch import Tensor, nn

from spikefit.layers import Flatten, SpikingLinear
from spikefit.models import SpikingNetwork

FEATURES = 16


class Headed(SpikingNetwork):
    """Two spiking layers; auxiliary heads read their spikes at step T/(n+1), 2T/(n+1), ..., the final head at step T.

    x [T, B, *input_shape] -> logits [1, B, K]; with `auxiliary=True` (logits [1, B, K], auxiliary logits [n, B, K]).
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], heads: int, norm: str, features: int) -> None:
        inputs = torch.Size(input_shape).numel()
        layers = [SpikingLinear(inputs, features, norm=norm), SpikingLinear(features, features, norm=norm)]
        super().__init__([Flatten(), *layers], input_shape=input_shape)
        self.auxiliary_heads = heads
        self.early = nn.ModuleList(nn.Linear(features, num_classes) for _ in range(heads))
        self.final = nn.Linear(features, num_classes)

    def forward(self, x: Tensor, *, auxiliary: bool = False):
        spikes = super().forward(x)
        logits = self.final(spikes[-1:])
        if not auxiliary:
            return logits
        T, n = x.shape[0], self.auxiliary_heads
        read = [spikes[i * T // (n + 1) - 1] for i in range(1, n + 1)]
        return logits, torch.stack([head(s) for head, s in zip(self.early, read, strict=True)])


def make(num_classes=10, input_shape=(1, 8, 8), auxiliary=True, heads=3, norm="bn", features=FEATURES) -> Headed:
    """A network for any number of steps T that heads + 1 divides; without auxiliary heads for auxiliary=False."""
    options = {"num_classes": num_classes, "input_shape": tuple(input_shape), "features": features}
    return Headed(**options, heads=heads if auxiliary else 0, norm=norm or "bn")


def fixed_form(*, num_classes: int = 10, input_shape: tuple[int, ...] = (1, 8, 8), timesteps: int = 4, auxiliary=True):
    """The same for one T, without a choice of neuron or norm, as a row of the table of models."""
    model = make(num_classes, input_shape, auxiliary)
    model.timesteps = timesteps
    return model
