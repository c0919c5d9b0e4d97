"""Networks for sensor sequences, whose time axis is the time of the spiking network."""

from itertools import pairwise
from typing import Any

from torch import nn

from spikefit.layers import AveragePoolTime, Dropout, FlattenTime, Readout, SpikingConv1d, SpikingLinear
from spikefit.models.checks import check_count, check_counts, check_input_shape
from spikefit.models.network import SpikingNetwork


def har_mlp(
    *,
    num_classes: int = 6,
    input_shape: tuple[int] = (9,),
    hidden: int = 128,
    layers: int = 4,
    norm: str = "bn",
    neuron: str | dict[str, Any] = "lif",
    head_tau: float | None = None,
    chunk: int | None = None,
) -> SpikingNetwork:
    """Make a network of equal dense units that reads one sensor sample per time step.

    Args:
        num_classes: K.
        input_shape: (channels,) of the sensor.
        hidden: width of every layer; equal shapes let the layers share one membrane.
        layers: number of spiking layers.
        norm, neuron, chunk: as in `SpikingLinear`.
        head_tau: time constant of a leaky read-out; None reads the logits of every step directly.

    Returns:
        SpikingNetwork, [T, B, C] -> [T, B, K].

    Raises:
        OptionError: input_shape is not (channels,), or hidden, layers or num_classes is below 1.
    """
    (channels,) = check_input_shape("har_mlp", input_shape, ("channels",))
    check_count("har_mlp", "hidden", hidden)
    widths = [channels, *[hidden] * check_count("har_mlp", "layers", layers)]
    blocks: list[nn.Module] = [SpikingLinear(a, b, norm=norm, neuron=neuron, chunk=chunk) for a, b in pairwise(widths)]
    return SpikingNetwork([*blocks, Readout(hidden, num_classes, tau=head_tau)], input_shape=(channels,))


def har_conv(
    *,
    num_classes: int = 6,
    input_shape: tuple[int] = (9,),
    timesteps: int = 128,
    widths: tuple[int, ...] | list[int] = (32, 64, 128),
    dropout: float = 0.35,
    norm: str = "bn",
    neuron: str | dict[str, Any] = "lif",
) -> SpikingNetwork:
    """Make a network that convolves over time: three times [convolution of 8 steps, norm, neuron, mean of 2 steps].

    The convolutions reach over time, so the network needs a whole window of `timesteps` samples and returns the logits
    of one step, [1, B, K]. `step` keeps the last window as its state.

    Args:
        num_classes: K.
        input_shape: (channels,) of the sensor.
        timesteps: length of the window.
        widths: channels of the convolutions.
        dropout: probability behind the first pool.
        norm, neuron: as in `SpikingConv1d`.

    Returns:
        SpikingNetwork, [T, B, C] -> [1, B, K]; 98,502 parameters with the defaults.

    Raises:
        OptionError: input_shape is not (channels,), no width, or widths, timesteps or num_classes below 1.

    Source: layout of the public SNN_HAR release (Intelligent-Computing-Lab-Yale).
    """
    shape = check_input_shape("har_conv", input_shape, ("channels",))
    channels, length, blocks = shape[0], check_count("har_conv", "timesteps", timesteps), list[nn.Module]()
    for i, out in enumerate(check_counts("har_conv", "widths", widths)):
        blocks.append(SpikingConv1d(channels, out, 8, padding=4, over="time", norm=norm, neuron=neuron))
        blocks.append(AveragePoolTime(2, stride=2, padding=1))
        if i == 0:
            blocks.append(Dropout(dropout))
        channels, length = out, (length + 1 + 2 - 2) // 2 + 1
    blocks += [FlattenTime(), Readout(channels * length, num_classes)]
    return SpikingNetwork(blocks, input_shape=shape, timesteps=timesteps)
