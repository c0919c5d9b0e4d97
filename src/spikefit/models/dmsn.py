"""DMSN: networks of one time step, whose neurons go from window to window and from layer to layer instead of in time.

Stem, four stages of window blocks with patch merging between them, mean over pixels, linear head. The blocks are in
`spikefit.layers.window_block`.

Source: Yao, Wu, Chen, Zhang, "Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency",
ACML 2023 (PMLR 222, pp. 1558-1573), and its partial release (iverss1/ACML_SNN); options that neither has are ours.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError
from spikefit.layers import GlobalAveragePool, Readout
from spikefit.layers.window_block import WindowSpike
from spikefit.layers.window_parts import PatchMerging
from spikefit.models.checks import check_count, check_counts, check_input_shape, check_width
from spikefit.models.network import SpikingNetwork

DEPTHS, WIDTHS = (2, 2, 6, 2), (48, 96, 192, 384)


@dataclass(frozen=True)
class Size:
    """Cell of a network, and whether it is the analog twin."""

    cell: str
    analog: bool = False


SIZES: dict[str, Size] = {
    "dmsn_cnn12": Size("cnn"),
    "dmsn_lstm12": Size("lstm"),
    "dmsn_cnn12_ann": Size("cnn", analog=True),
    "dmsn_lstm12_ann": Size("lstm", analog=True),
}


def dmsn(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    cell: str | None = None,
    width: float = 1.0,
    widths: tuple[int, ...] = WIDTHS,
    depths: tuple[int, ...] = DEPTHS,
    windows: int = 4,
    dilated: bool = True,
    fuse: str = "omega",
    phi: float = 0.5,
    leak: float = 0.4,
    v_threshold: float = 0.5,
    reset: str = "none",
    surrogate: str = "rect(1)",
    coding: str = "bernoulli_sg",
    condense: str = "or",
    or_grad: str = "ste",
    carry: str | None = None,
    pairs: str = "own",
    order: str = "batched",
    norm: str = "none",
    mlp: str = "gelu",
    dropout: float = 0.1,
    learn_phi: bool = False,
    learn_threshold: bool = False,
    allow_unstable: bool = False,
) -> "OneStepNetwork":
    """Make a one-step window network.

    Args:
        name: "dmsn_cnn12" or "dmsn_lstm12"; `dmsn_ann` makes their analog twins.
        num_classes: K.
        input_shape: (C, H, W); sides are multiples of 2^(stages + 1), such as 32.
        cell: another cell than that of the name: "cnn", "lstm", "gru", "rnn", "birnn" or "mlp".
        width: factor on all widths; that of the first stage is rounded.
        widths, depths: channels and blocks of the stages.
        windows: 1, 2 or 4 windows of a map.
        dilated: whether odd blocks of a stage, the last stage apart, have overlapping windows.
        fuse, phi, leak, v_threshold, reset, surrogate, coding, condense, or_grad, carry, pairs, order, norm, mlp,
            dropout, learn_phi, learn_threshold, allow_unstable: as in `WindowSpike`.

    Returns:
        OneStepNetwork, [1, B, C, H, W] -> logits [1, B, K].

    Raises:
        OptionError: an option out of range, or one that does not fit the cell.
        ShapeError: an image whose maps do not divide into windows.
    """
    size = SIZES[name]
    options = {
        "windows": windows, "fuse": fuse, "phi": phi, "leak": leak, "v_threshold": v_threshold, "reset": reset,
        "surrogate": surrogate, "coding": coding, "condense": condense, "or_grad": or_grad, "carry": carry,
        "pairs": pairs, "order": order, "norm": norm, "mlp": mlp, "dropout": dropout, "learn_phi": learn_phi,
        "learn_threshold": learn_threshold, "allow_unstable": allow_unstable,
    }  # fmt: skip
    return _network(name, num_classes, input_shape, cell or size.cell, width, widths, depths, dilated, options)


def dmsn_ann(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    cell: str | None = None,
    width: float = 1.0,
    widths: tuple[int, ...] = WIDTHS,
    depths: tuple[int, ...] = DEPTHS,
    windows: int = 4,
    dilated: bool = True,
    norm: str = "none",
    dropout: float = 0.1,
) -> "OneStepNetwork":
    """Make the analog twin of a one-step window network: same windows and weights, no spikes.

    Neurons are max(u, 0), nothing is coded or carried, and maps are the mean of windows.

    Args:
        name: "dmsn_cnn12_ann" or "dmsn_lstm12_ann".
        num_classes, input_shape, cell, width, widths, depths, windows, dilated, norm, dropout: as in `dmsn`.

    Returns:
        OneStepNetwork, [1, B, C, H, W] -> logits [1, B, K].

    Raises:
        OptionError, ShapeError: as `dmsn`.
    """
    options = {"windows": windows, "norm": norm, "dropout": dropout, "analog": True}
    return _network(name, num_classes, input_shape, cell or SIZES[name].cell, width, widths, depths, dilated, options)


def _network(
    name: str,
    classes: int,
    input_shape: tuple[int, ...],
    cell: str,
    width: float,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    dilated: bool,
    options: dict[str, Any],
) -> "OneStepNetwork":
    shape = check_input_shape(name, input_shape, ("C", "H", "W"))
    check_width(name, width)
    given, counts = check_counts(name, "widths", widths), check_counts(name, "depths", depths)
    if len(given) != len(counts):
        raise OptionError(
            f"{name}: widths and depths list the same stages, got {widths} and {depths}; give both as many numbers."
        )
    if any(after != 2 * before for before, after in itertools.pairwise(given)):
        doubled = tuple(given[0] * 2**stage for stage in range(len(given)))
        raise OptionError(
            f"{name}: merging doubles the channels from stage to stage, got widths {tuple(given)}; take {doubled}, say."
        )
    # only the first is rounded, so that the others are its multiples
    channels = [max(1, round(given[0] * width)) * 2**stage for stage in range(len(given))]
    blocks: list[nn.Module] = [OneStepStem(shape[0], channels[0])]
    for stage, (c, count) in enumerate(zip(channels, counts, strict=True)):
        last = stage == len(channels) - 1
        for block in range(count):
            kind = "dilated" if dilated and block % 2 and not last else "tile"
            hands_on = not (last and block == count - 1)
            blocks.append(WindowSpike(c, cell, kind=kind, hands_on=hands_on, **options))
        if not last:
            body = blocks[-1]
            assert isinstance(body, WindowSpike)
            blocks.append(PatchMerging(c, body.cell.width if body.carry == "layer" else None))
    head = Readout(channels[-1], check_count(name, "num_classes", classes))
    nn.init.zeros_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    return OneStepNetwork([*blocks, GlobalAveragePool(), head], input_shape=shape)


class OneStepStem(nn.Module):
    """A 2x2 convolution of stride 2.

    Shapes:
        [1, B, C, H, W] -> [1, B, width, H/2, W/2]. No state.
    """

    consumes_time = False

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 2, stride=2)
        nn.init.normal_(self.conv.weight, std=self.conv.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[()]]:
        """The map of an image."""
        return self.conv(x[0]).unsqueeze(0), ()

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        """(no state, shape of one output sample)."""
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ShapeError(
                f"stem: expected images (C, H, W) with even sides, got {tuple(shape)}. Pad or resize them."
            )
        return (), (self.conv.out_channels, shape[1] // 2, shape[2] // 2)


class OneStepNetwork(SpikingNetwork):
    """A network of one time step, see `dmsn`; there is no state, and every call draws its spikes anew.

    The draws come from torch's global generator: torch.manual_seed(0) in front of a call repeats it.
    """

    def __init__(self, blocks: list[nn.Module], *, input_shape: tuple[int, ...]) -> None:
        super().__init__(blocks, input_shape=input_shape)
        self.timesteps = 1
        # complains about sides that do not fit
        self.init_state(1, device="meta")

    def _does_not_pass(self, sample: tuple[int, ...], where: str, fact: str) -> str:
        multiple = 4 * 2 ** sum(isinstance(block, PatchMerging) for block in self.blocks)
        if len(sample) == 3 and all(side % multiple == 0 for side in sample[1:]):
            return super()._does_not_pass(sample, where, fact)
        return (
            f"expected images (C, H, W) with sides that are multiples of {multiple}, which fit all windows, got "
            f"{sample}, which do not pass {where} ({fact.partition('; ')[0]}). Pad or resize them."
        )

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x.shape[0] != 1:
            raise ShapeError(
                f"{type(self).__name__}: DMSN works in one step; got T={x.shape[0]} in {tuple(x.shape)}. Show the "
                "image once, encoding.repeat(x, timesteps=1), in a recipe encoding.timesteps=1."
            )
