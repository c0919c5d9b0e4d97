"""Fully connected spiking networks."""

import math
from typing import Any

from torch import nn

from spikefit.layers import Flatten, Readout, SpikingLinear
from spikefit.models.checks import check_counts, check_input_shape
from spikefit.models.network import SpikingNetwork


def mlp(
    *,
    num_classes: int = 10,
    input_shape: tuple[int, ...] = (1, 28, 28),
    hidden: tuple[int, ...] | list[int] = (256, 256, 256),
    norm: str = "bn",
    neuron: str | dict[str, Any] = "lif",
    head_tau: float | None = None,
    chunk: int | None = None,
) -> SpikingNetwork:
    """Make a multi-layer perceptron of spiking dense units.

    Args:
        num_classes: K.
        input_shape: shape of one sample; it is flattened.
        hidden: widths of the spiking layers.
        norm, neuron, chunk: as in `SpikingLinear`.
        head_tau: time constant of a leaky read-out; None reads the logits of every step directly.

    Returns:
        SpikingNetwork, [T, B, *input_shape] -> [T, B, K].

    Raises:
        OptionError: no hidden layer, or a width or a size of the input below 1.
    """
    shape = check_input_shape("mlp", input_shape)
    features = math.prod(shape)
    blocks: list[nn.Module] = [Flatten()] if len(shape) > 1 else []
    for out in check_counts("mlp", "hidden", hidden):
        blocks.append(SpikingLinear(features, out, norm=norm, neuron=neuron, chunk=chunk))
        features = out
    blocks.append(Readout(features, num_classes, tau=head_tau))
    return SpikingNetwork(blocks, input_shape=shape)
