"""RevSFormer: spiking transformers of two streams, which can be trained backwards in depth."""

from typing import Any

from torch import nn

from spikefit.layers import (
    Chain,
    GlobalAveragePool,
    Pool2d,
    Readout,
    SpikingAttention,
    SpikingConv2d,
    Twice,
    TwoStreams,
)
from spikefit.models.checks import check_count, check_input_shape
from spikefit.models.network import SpikingNetwork
from spikefit.neurons.table import as_neuron

# (blocks, channels of a stream)
SIZES: dict[str, tuple[int, int]] = {"revsformer_2_384": (2, 384), "revsformer_4_384": (4, 384)}


def revsformer(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    blocks: int | None = None,
    channels: int | None = None,
    heads: int = 12,
    order: str = "rev",
    stream_grid: int | None = 14,
    norm: str = "bn",
    neuron: str | dict[str, Any] = "lif",
) -> SpikingNetwork:
    """Make a RevSFormer: convolutions that make tokens, blocks of two streams, and a linear head over both.

        tokens: conv C -> D/8, then neuron [-> max pool] -> conv for D/8 -> D/4 -> D/2 -> D -> D, each with its norm;
                pools in front of the last two convolutions, so a token stands for 4x4 pixels
        F = attention      G = (neuron -> conv 1x1 -> norm) twice, D -> 4D -> D

    Args:
        name: "revsformer_2_384" or "revsformer_4_384".
        num_classes: K.
        input_shape: (C, H, W).
        blocks, channels: number of blocks and D, a multiple of 8; None for those of `name`.
        heads: of the attention, a divisor of D; published are 12 for CIFAR-10 and 8 for CIFAR-100.
        order, stream_grid: as in `TwoStreams`.
        norm: as in `SpikingConv2d`.
        neuron: a name, or {"name": ..., option: ...}.

    Returns:
        SpikingNetwork, [T, B, C, H, W] -> [T, B, K].

    Raises:
        OptionError: input_shape is not (C, H, W), or heads is no divisor of the channels.

    Source: Zhang and Zhang 2024, arXiv:2312.07922; attention: Zhou et al. 2023, arXiv:2209.15425.
    """
    shape = check_input_shape(name, input_shape, ("C", "H", "W"))
    count = check_count(name, "blocks", SIZES[name][0] if blocks is None else blocks)
    D = check_count(name, "channels", SIZES[name][1] if channels is None else channels)
    widths = [max(1, D // 8), max(1, D // 4), max(1, D // 2), D, D]
    made: list[nn.Module] = []
    for i, out in enumerate(widths):
        last = i == len(widths) - 1
        made.append(SpikingConv2d(([shape[0], *widths])[i], out, norm=norm, neuron=None if last else neuron))
        if i in (2, 3):
            made.append(Pool2d("max"))

    def mixing() -> nn.Module:
        wide = SpikingConv2d(D, 4 * D, 1, norm=norm, neuron=neuron, bias=True)
        return Chain(as_neuron(neuron), wide, SpikingConv2d(4 * D, D, 1, norm=norm, neuron=None, bias=True))

    pairs = [(SpikingAttention(D, heads=heads, norm=norm, neuron=neuron), mixing()) for _ in range(count)]
    made += [Twice(), TwoStreams(pairs, order=order, stream_grid=stream_grid)]
    made += [GlobalAveragePool(), Readout(2 * D, num_classes)]
    return SpikingNetwork(made, input_shape=shape)
