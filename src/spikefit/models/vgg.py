"""Spiking VGG networks: 3x3 convolution units, pooling of spikes, and a read-out at every step."""

from typing import Any

from torch import nn

from spikefit.errors import OptionError
from spikefit.layers import Flatten, GlobalAveragePool, Readout, SpikingConv2d, SpikingLinear
from spikefit.layers.shared import default_norm, shares_layers
from spikefit.models.checks import check_input_shape, check_width
from spikefit.models.network import SpikingNetwork

# Widths of the convolutions; "pool" follows the unit before it. `hidden` are spiking dense units behind them.
PLANS: dict[str, tuple[tuple[int | str, ...], tuple[int, ...]]] = {
    "vgg6": ((64, 64, "pool", 128, 128, "pool", 256, 256, "pool"), ()),
    "vgg9": ((64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool"), (1024,)),
    "vgg11": ((64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"), ()),
    "vgg16": ((128, 128, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512), ()),
    "vgg16:base": (
        (128, 128, "pool", 256, 256, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512),
        (),
    ),
}


def vgg(
    plan: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    widths: str | None = None,
    width: float = 1.0,
    norm: str | None = None,
    neuron: str | dict[str, Any] = "lif",
    share: str = "none",
    groups: int = 1,
    merge_first: bool = False,
    pool: str = "max",
    head_tau: float | None = None,
    chunk: int | None = None,
) -> SpikingNetwork:
    """Make a spiking VGG.

    Args:
        plan: a key of `PLANS`.
        num_classes: K.
        input_shape: (C, H, W).
        widths: another set of widths; vgg16 has "base", that of the unshared baseline of EfficientLIF-Net.
        width: factor on all widths.
        norm: as in `SpikingConv2d`; None for "bn", or "step_bn" where layers share a membrane.
        neuron, chunk: as in `SpikingConv2d`.
        share, groups: which layers and channels use one membrane, as in `SpikingNetwork`; the stages are the first
            unit, and then the units between two pools, cut where the width changes.
        merge_first: let the first unit share with those behind it too.
        pool: "max" or "avg".
        head_tau: time constant of a leaky read-out; None reads the logits of every step directly.

    Returns:
        SpikingNetwork, [T, B, C, H, W] -> [T, B, K]. Without dense units the head averages over space, so that other
        image sides work too.

    Raises:
        OptionError: unknown width set, input_shape is not (C, H, W), too small for the pools, or width is not positive.

    Source: Simonyan, Zisserman 2015, arXiv:1409.1556; widths of vgg16 as in Kim et al. 2023, arXiv:2305.18360.
    """
    key = plan if widths is None else f"{plan}:{widths}"
    if key not in PLANS:
        sets = [name.partition(":")[2] for name in PLANS if name.startswith(f"{plan}:")]
        raise OptionError(f"{plan}: widths must be one of {', '.join(sets) or 'none'}, or left out, got {widths!r}.")
    convolutions, hidden = PLANS[key]
    check_width(plan, width)
    channels, height, side = shape = check_input_shape(plan, input_shape, ("C", "H", "W"))
    pools = convolutions.count("pool")
    if min(height, side) < 2**pools:
        raise OptionError(
            f"{plan}: {pools} pools need images of at least {2**pools} pixels a side, got {height}x{side}."
        )
    if merge_first and not shares_layers(share):
        raise OptionError(f"{plan}: merge_first joins stages of share='layer' or 'layer_channel', got share={share!r}.")
    options: dict[str, Any] = {"norm": norm or default_norm(share), "neuron": neuron, "chunk": chunk}
    blocks: list[nn.Module] = []
    stages: list[tuple[int, int]] = []
    for i, entry in enumerate(convolutions):
        if entry == "pool":
            continue
        out = max(1, round(int(entry) * width))
        pooled = convolutions[i + 1 : i + 2] == ("pool",)
        alone = i == 0 or convolutions[i - 1] == "pool" or out != channels or (i == 1 and not merge_first)
        stages = [*stages, (len(blocks), len(blocks))] if alone else [*stages[:-1], (stages[-1][0], len(blocks))]
        blocks.append(SpikingConv2d(channels, out, pool=pool if pooled else None, **options))
        channels = out
    if hidden:
        blocks.append(Flatten())
        channels *= (height // 2**pools) * (side // 2**pools)
        for entry in hidden:
            out = max(1, round(entry * width))
            stages.append((len(blocks), len(blocks)))
            blocks.append(SpikingLinear(channels, out, **options))
            channels = out
    else:
        blocks.append(GlobalAveragePool())
    blocks.append(Readout(channels, num_classes, tau=head_tau))
    stages = stages if shares_layers(share) else []
    return _initialised(SpikingNetwork(blocks, input_shape=shape, share=share, groups=groups, stages=stages))


def _initialised(network: SpikingNetwork) -> SpikingNetwork:
    """Convolutions Kaiming-normal over fan-out, as for deep VGGs without a pre-trained start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
