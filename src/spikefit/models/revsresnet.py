"""RevSResNet: residual networks of two streams, which can be trained backwards in depth."""

from typing import Any

from torch import nn

from spikefit.errors import OptionError
from spikefit.layers import Chain, GlobalAveragePool, Pool2d, Readout, SpikingConv2d, TwoStreams
from spikefit.models.checks import check_counts, check_input_shape, check_width
from spikefit.models.network import SpikingNetwork
from spikefit.neurons.table import as_neuron

# Width of one stream in every stage.
WIDTHS = (64, 128, 256, 448)
BLOCKS: dict[str, tuple[int, ...]] = {"revsresnet21": (1, 1, 1, 1), "revsresnet37": (1, 2, 3, 2)}


def revsresnet(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    blocks: tuple[int, ...] | None = None,
    width: float = 1.0,
    order: str = "rev",
    stream_grid: int | None = 14,
    norm: str = "bn",
    neuron: str | dict[str, Any] = "lif",
) -> SpikingNetwork:
    """Make a RevSResNet: a stem, four stages of blocks of two streams, transitions between them, and a linear head.

        F, G = (neuron -> conv 3x3 -> norm) twice      transition = neuron -> average pool -> conv 1x1 -> norm

    Args:
        name: "revsresnet21" or "revsresnet37".
        num_classes: K.
        input_shape: (C, H, W).
        blocks: blocks of every stage; None for those of `name`. A network has (stages + 1) + 4 x blocks layers.
        width: factor on all widths.
        order: "rev" or "para", as in `TwoStreams`.
        stream_grid: digits of the streams behind the point, as in `TwoStreams`.
        norm: as in `SpikingConv2d`.
        neuron: a name, or {"name": ..., option: ...}.

    Returns:
        SpikingNetwork, [T, B, C, H, W] -> [T, B, K].

    Raises:
        OptionError: input_shape is not (C, H, W), width is not positive, or more than four stages.

    Source: Zhang and Zhang 2024, arXiv:2312.07922; `para` after arXiv:2508.01223.
    """
    counts = check_counts(name, "blocks", BLOCKS[name] if blocks is None else blocks)
    if len(counts) > len(WIDTHS):
        raise OptionError(f"{name}: blocks lists up to {len(WIDTHS)} stages, got {counts}.")
    shape = check_input_shape(name, input_shape, ("C", "H", "W"))
    factor = check_width(name, width)
    widths = [max(1, round(c * factor)) for c in WIDTHS[: len(counts)]]
    current: dict[str, Any] = {"norm": norm, "neuron": None}

    def half(channels: int) -> nn.Module:
        first = SpikingConv2d(channels, channels, norm=norm, neuron=neuron)
        return Chain(as_neuron(neuron), first, SpikingConv2d(channels, channels, **current))

    made: list[nn.Module] = [SpikingConv2d(shape[0], 2 * widths[0], **current)]
    for stage, (channels, count) in enumerate(zip(widths, counts, strict=True)):
        if stage:
            made += [as_neuron(neuron), Pool2d("avg"), SpikingConv2d(2 * widths[stage - 1], 2 * channels, 1, **current)]
        pairs = [(half(channels), half(channels)) for _ in range(count)]
        made.append(TwoStreams(pairs, order=order, stream_grid=stream_grid))
    made += [as_neuron(neuron), GlobalAveragePool(), Readout(2 * widths[-1], num_classes)]
    return SpikingNetwork(made, input_shape=shape)
