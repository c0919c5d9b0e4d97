"""Residual blocks made of units."""

from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import StateError
from spikefit.layers.packed import Spikes
from spikefit.layers.unit import Layer, SpikingConv2d, SpikingUnit


class ResidualBlock(nn.Module):
    """Two 3x3 units with a shortcut added to the current of the second.

        y = neuron(norm(conv(x, stride)))      out = neuron(norm(conv(y)) + short(x))

    The shortcut is the identity, or norm(conv1x1(x, stride)) when stride or width change.

    Args:
        in_channels, out_channels: widths.
        stride: of the first convolution and the shortcut.
        norm, chunk: as in `SpikingConv2d`.
        neuron: a name, or {"name": ..., option: ...}; both neurons are made from it.

    Shapes:
        [T, B, C_in, H, W] -> [T, B, C_out, H/stride, W/stride]; state: two membranes [B, C_out, H', W'].

    Source: He et al. 2016, arXiv:1512.03385; as a spiking block Zheng et al. 2021, arXiv:2011.05280.
    """

    consumes_time = False
    takes_packed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str = "bn",
        neuron: str | dict[str, Any] = "lif",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"norm": norm, "neuron": neuron, "chunk": chunk}
        self.first = SpikingConv2d(in_channels, out_channels, stride=stride, **options)
        self.second = SpikingConv2d(out_channels, out_channels, **options)
        self.short: SpikingUnit | None = None
        if stride != 1 or in_channels != out_channels:
            self.short = SpikingConv2d(in_channels, out_channels, 1, stride=stride, norm=norm, neuron=None, chunk=chunk)

    def forward(
        self, x: Spikes, state: tuple[Tensor | None, Tensor | None] | None = None, *, packed: bool = False
    ) -> tuple[Any, Any]:
        """Sequence and two membranes (None for zeros) -> (spikes, two membranes); `packed` as in `SpikingUnit`."""
        if state is not None and (not isinstance(state, tuple) or len(state) != 2):
            got = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
            raise StateError(
                f"ResidualBlock: expected a state of two membranes, got {got}. Pass what the last call returned, "
                "or None to start from zero."
            )
        v_first, v_second = (None, None) if state is None else state
        y, v_first = self.first(x, v_first, packed=packed)
        shortcut = x if self.short is None else self.short.later(x)
        out, v_second = self.second(y, v_second, shortcut=shortcut, packed=packed)
        return out, (v_first, v_second)

    def spiking_layers(self) -> list[Layer]:
        """The two layers of neurons."""
        return [Layer(self.first, 0), Layer(self.second, 1, shortcut=0, short=self.short)]

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, tuple[int, ...]]:
        """(two zero membranes, shape of one output sample)."""
        first, middle = self.first.init_state(batch_size, shape, device=device, dtype=dtype)
        second, out = self.second.init_state(batch_size, middle, device=device, dtype=dtype)
        return (first, second), out
