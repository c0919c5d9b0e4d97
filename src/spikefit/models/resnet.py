"""Spiking ResNet19."""

from typing import Any

from torch import nn

from spikefit.errors import OptionError
from spikefit.layers import GlobalAveragePool, Readout, ResidualBlock, SpikingConv2d
from spikefit.layers.shared import default_norm, shares_layers
from spikefit.models.checks import check_input_shape, check_width
from spikefit.models.network import SpikingNetwork

# Width of each stage. The release of arXiv:2305.18360 has both: "wide" in the networks that share membranes, and
# "narrow" in the baseline they are compared with.
WIDTHS: dict[str, tuple[int, int, int]] = {"wide": (256, 512, 512), "narrow": (128, 256, 512)}
BLOCKS = (3, 3, 2)


def resnet19(
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    widths: str = "wide",
    width: float = 1.0,
    norm: str | None = None,
    neuron: str | dict[str, Any] = "lif",
    share: str = "none",
    groups: int = 1,
    head_tau: float | None = None,
    chunk: int | None = None,
) -> SpikingNetwork:
    """Make a spiking ResNet19: stem, three stages of 3, 3 and 2 blocks that each halve the side, and a linear head.

    Args:
        num_classes: K.
        input_shape: (C, H, W).
        widths: "wide" (256, 512, 512; 26,108,042 parameters at 10 classes) or "narrow" (128, 256, 512; 12,585,866).
        width: factor on all widths.
        norm: as in `SpikingConv2d`; None for "bn", or "step_bn" where layers share a membrane.
        neuron, chunk: as in `SpikingConv2d`.
        share, groups: which layers and channels use one membrane, as in `SpikingNetwork`; the stages are the stem and
            the three stages of blocks.
        head_tau: time constant of a leaky read-out; None reads the logits of every step directly.

    Returns:
        SpikingNetwork, [T, B, C, H, W] -> [T, B, K].

    Raises:
        OptionError: unknown width set, input_shape is not (C, H, W), or width is not positive.

    Source: Zheng et al. 2021, arXiv:2011.05280; widths of Kim et al. 2023, arXiv:2305.18360.
    """
    if widths not in WIDTHS:
        raise OptionError(f"resnet19: widths must be one of {', '.join(WIDTHS)}, got {widths!r}.")
    check_width("resnet19", width)
    shape = check_input_shape("resnet19", input_shape, ("C", "H", "W"))
    options: dict[str, Any] = {"norm": norm or default_norm(share), "neuron": neuron, "chunk": chunk}
    channels = max(1, round(128 * width))
    blocks: list[nn.Module] = [SpikingConv2d(shape[0], channels, **options)]
    stages = [(0, 0)]
    for stage, count in zip(WIDTHS[widths], BLOCKS, strict=True):
        out = max(1, round(stage * width))
        stages.append((len(blocks), len(blocks) + count - 1))
        for i in range(count):
            blocks.append(ResidualBlock(channels, out, stride=2 if i == 0 else 1, **options))
            channels = out
    stages = stages if shares_layers(share) else []
    blocks += [GlobalAveragePool(), Readout(channels, num_classes, tau=head_tau)]
    return SpikingNetwork(blocks, input_shape=shape, share=share, groups=groups, stages=stages)
