"""What stands around the cells of window blocks: the stream between blocks, the channel MLP and patch merging.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573), and its release; the MLP with spikes is ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError, StateError


class Stream(NamedTuple):
    """What blocks of windows hand each other: a map, and membranes that are carried from block to block.

    Attributes:
        x: [1, B, C, H, W].
        memory: [B, width, H, W], the width of a cell; None for none yet.
    """

    x: Tensor
    memory: Tensor | None = None


class ChannelMLP(nn.Module):
    """Two linear maps of every pixel, C -> 3 C -> C: analog with GELU between, or with spikes in front of both.

    Args:
        channels: C.
        dropout: share dropped, of the hidden values with GELU and of the output with spikes, which it would scale.
        neuron: makes the neurons; None for GELU.

    Shapes:
        [B, H, W, C] -> the same.
    """

    def __init__(self, channels: int, dropout: float, neuron: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise OptionError(f"ChannelMLP: dropout must lie in [0, 1), got {dropout}.")
        self.up, self.down, self.dropout = dense(channels, 3 * channels), dense(3 * channels, channels), dropout
        for layer in (self.up, self.down):
            nn.init.normal_(layer.bias, std=1e-6)
        self.fires = None if neuron is None else nn.ModuleList([neuron(), neuron()])

    def forward(self, x: Tensor) -> Tensor:
        """Every pixel by itself."""
        if self.fires is None:
            return self.down(F.dropout(F.gelu(self.up(x)), self.dropout, self.training))
        for fire, layer in zip(self.fires, (self.up, self.down), strict=True):
            x = layer(fire(x.unsqueeze(0), want_membranes=False)[0].squeeze(0))
        return F.dropout(x, self.dropout, self.training)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels; membranes beside it have a map of their own.

        y = W [x(0,0), x(1,0), x(0,1), x(1,1)]      of every 2x2 square, (row, column)

    Args:
        channels: C.
        memory: width of the membranes that come with the map; None for none.

    Shapes:
        [1, B, C, H, W] -> [1, B, 2 C, H/2, W/2]; membranes [B, width, H, W] -> [B, 2 width, H/2, W/2].
    """

    consumes_time = False

    def __init__(self, channels: int, memory: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.reduce = dense(4 * channels, 2 * channels, bias=False)
        self.reduce_memory = None if memory is None else dense(4 * memory, 2 * memory, bias=False)

    def forward(self, x: Tensor | Stream, state: Any = None) -> tuple[Tensor | Stream, tuple[()]]:
        """Map, or map and membranes -> the same at half the side."""
        if not isinstance(x, Stream):
            return _merged(self.reduce, x[0]).unsqueeze(0), ()
        if x.memory is None or self.reduce_memory is None:
            raise StateError(
                "PatchMerging: expected membranes beside the map exactly where it was made for them (memory=width), "
                f"got {'none' if x.memory is None else tuple(x.memory.shape)}; make it with memory=width of the cell, "
                "or None."
            )
        # membranes keep their dtype, in a network of half precision and under autocast
        memory = _merged(self.reduce_memory, x.memory.to(self.reduce_memory.weight.dtype)).to(x.memory.dtype)
        return Stream(_merged(self.reduce, x.x[0]).unsqueeze(0), memory), ()

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        """(no state, shape of one output sample)."""
        if len(shape) != 3 or shape[0] != self.channels or shape[1] % 2 or shape[2] % 2:
            raise ShapeError(
                f"PatchMerging: expected maps ({self.channels}, H, W) with even sides, got {tuple(shape)}. Pad or "
                "resize the images."
            )
        return (), (2 * shape[0], shape[1] // 2, shape[2] // 2)


def _merged(linear: nn.Module, x_BCHW: Tensor) -> Tensor:
    corners = [x_BCHW[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return linear(torch.cat(corners, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dense(channels: int, out: int, *, bias: bool = True) -> nn.Linear:
    """A linear map with Xavier-uniform weights and no offset at first."""
    made = nn.Linear(channels, out, bias=bias)
    nn.init.xavier_uniform_(made.weight)
    if bias:
        nn.init.zeros_(made.bias)
    return made
