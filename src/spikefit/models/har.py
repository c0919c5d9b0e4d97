"""Networks for sensor sequences, whose time axis is the time of the spiking network."""

from itertools import pairwise
from typing import Any

from torch import nn

from spikefit.errors import OptionError
from spikefit.layers import AveragePoolTime, Dropout, FlattenTime, Readout, SpikingConv1d, SpikingLinear
from spikefit.layers.shared import default_norm, shares_layers
from spikefit.models.checks import check_count, check_counts, check_input_shape
from spikefit.models.network import SpikingNetwork


def har_mlp(
    *,
    num_classes: int = 6,
    input_shape: tuple[int] = (9,),
    hidden: int = 128,
    layers: int = 4,
    norm: str | None = None,
    neuron: str | dict[str, Any] = "lif",
    share: str = "none",
    groups: int = 1,
    head_tau: float | None = None,
    chunk: int | None = None,
) -> SpikingNetwork:
    """Make a network of equal dense units that reads one sensor sample per time step.

    Args:
        num_classes: K.
        input_shape: (channels,) of the sensor.
        hidden: width of every layer; equal shapes let the layers share one membrane.
        layers: number of spiking layers.
        norm: as in `SpikingLinear`; None for "bn", or "step_bn" where layers share a membrane.
        neuron, chunk: as in `SpikingLinear`.
        share, groups: which layers and channels use one membrane, as in `SpikingNetwork`; the stages are the first
            layer and all others.
        head_tau: time constant of a leaky read-out; None reads the logits of every step directly.

    Returns:
        SpikingNetwork, [T, B, C] -> [T, B, K].

    Raises:
        OptionError: input_shape is not (channels,), or hidden, layers or num_classes is below 1.
    """
    (channels,) = check_input_shape("har_mlp", input_shape, ("channels",))
    check_count("har_mlp", "hidden", hidden)
    widths = [channels, *[hidden] * check_count("har_mlp", "layers", layers)]
    options: dict[str, Any] = {"norm": norm or default_norm(share), "neuron": neuron, "chunk": chunk}
    blocks: list[nn.Module] = [SpikingLinear(a, b, **options) for a, b in pairwise(widths)]
    stages = [(0, 0)] if layers == 1 else [(0, 0), (1, layers - 1)]
    stages = stages if shares_layers(share) else []
    blocks.append(Readout(hidden, num_classes, tau=head_tau))
    return SpikingNetwork(blocks, input_shape=(channels,), share=share, groups=groups, stages=stages)


def har_conv(
    *,
    num_classes: int = 6,
    input_shape: tuple[int] = (9,),
    timesteps: int = 128,
    widths: tuple[int, ...] | list[int] = (32, 64, 128),
    dropout: float = 0.35,
    norm: str | None = None,
    neuron: str | dict[str, Any] = "lif",
    share: str = "none",
    groups: int = 1,
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
        norm: as in `SpikingConv1d`; None for "bn".
        neuron: as in `SpikingConv1d`.
        share, groups: "channel" lets groups of channels use one membrane, as in `SpikingNetwork`; its layers differ in
            shape, so they cannot share one.

    Returns:
        SpikingNetwork, [T, B, C] -> [1, B, K]; 98,502 parameters with the defaults.

    Raises:
        OptionError: share other than "none" or "channel", input_shape is not (channels,), no width, or widths,
            timesteps or num_classes below 1.

    Source: layout of the public SNN_HAR release (Intelligent-Computing-Lab-Yale).
    """
    if shares_layers(share):
        raise OptionError(
            f"har_conv: its layers differ in shape and need whole sequences, so they cannot share a membrane, got "
            f"share={share!r}; use share='channel', or model har_mlp."
        )
    shape = check_input_shape("har_conv", input_shape, ("channels",))
    channels, length, blocks = shape[0], check_count("har_conv", "timesteps", timesteps), list[nn.Module]()
    for i, out in enumerate(check_counts("har_conv", "widths", widths)):
        blocks.append(SpikingConv1d(channels, out, 8, padding=4, over="time", norm=norm or "bn", neuron=neuron))
        blocks.append(AveragePoolTime(2, stride=2, padding=1))
        if i == 0:
            blocks.append(Dropout(dropout))
        channels, length = out, (length + 1 + 2 - 2) // 2 + 1
    blocks += [FlattenTime(), Readout(channels * length, num_classes)]
    return SpikingNetwork(blocks, input_shape=shape, timesteps=timesteps, share=share, groups=groups)
