"""Blocks of two residual streams, which can be run backwards in depth.

    "rev"    y1 = x1 + F(x2),   y2 = x2 + G(y1)      x2 = y2 - G(y1),   x1 = y1 - F(x2)
    "para"   y1 = x2 + F(x1),   y2 = x1 + G(y1)      x1 = y2 - G(y1),   x2 = y1 - F(x1)

x1 and x2 are the halves of the channels; F and G are sub-networks of neurons that see whole sequences, so backwards in
depth is still forwards in time. Streams lie on the grid of 2^-g, where sums and differences are exact: the input of
every block comes back to the bit. `reversible_function.py` has the backward that keeps the last streams alone.

Source: "rev" Zhang and Zhang 2024, arXiv:2312.07922; "para" arXiv:2508.01223. The grid is ours.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError
from spikefit.layers.chain import State, entries
from spikefit.layers.coupling import check_range, check_stream_grid, couple, on_grid, uncouple

# Runs a sub-network: (number, stream, state) -> (what is added to the other stream, state).
Run = Callable[[int, Tensor, Any], tuple[Tensor, Any]]
ORDERS: tuple[str, ...] = ("rev", "para")


class TwoStreams(nn.Module):
    """A run of blocks of two streams; plain autograd keeps all of it, strategy `reversible` the last streams.

    Args:
        pairs: (F, G) of every block, modules (sequence, state) -> (sequence, state) that keep the shape of a stream.
        order: "rev" or "para".
        stream_grid: g, digits of the streams behind the point; None leaves the streams as they are, which allows no
            exact way back.

    Shapes:
        [T, B, 2C, ...] -> the same; state: one entry per sub-network, F and G of the first block first. Streams are
        float32, or float64 for float64 input.

    Raises:
        OptionError: unknown order, a grid out of range, or no block.

    Example:
        half = lambda: Chain(LIF(), SpikingConv2d(32, 32), SpikingConv2d(32, 32, neuron=None))
        TwoStreams([(half(), half()) for _ in range(8)])
    """

    def __init__(
        self, pairs: Iterable[tuple[nn.Module, nn.Module]], *, order: str = "rev", stream_grid: int | None = 14
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise OptionError(f"TwoStreams: order must be one of {', '.join(ORDERS)}, got {order!r}.")
        check_stream_grid("TwoStreams", stream_grid)
        self.order, self.stream_grid = order, stream_grid
        self.nets = nn.ModuleList(net for pair in pairs for net in pair)
        if not len(self.nets):
            raise OptionError("TwoStreams: expected at least one pair of sub-networks, got none.")

    @property
    def consumes_time(self) -> bool:
        """Whether a sub-network needs all time steps at once."""
        return any(getattr(net, "consumes_time", False) for net in self.nets)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Streams side by side [T, B, 2C, ...] and state (None for zeros) -> (streams, state), by plain autograd.

        Raises:
            ShapeError: an odd number of channels, or a sub-network that changes the shape.
            RangeError: a stream too large for its grid.
        """
        before = entries("TwoStreams", state, len(self.nets))
        first, second = self.entered(x)
        after: list[Any] = []
        for i in range(0, len(self.nets), 2):
            first, second, s = self.block(i, first, second, before[i : i + 2])
            after.extend(s)
        return side_by_side(first, second), tuple(after)

    def entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams that the first block gets."""
        if x.ndim < 3 or x.shape[2] % 2:
            raise ShapeError(
                f"TwoStreams: expected [T, B, C, ...] with an even number of channels, half of them for each stream, "
                f"got {tuple(x.shape)}."
            )
        weight = next((p for p in self.parameters() if p.is_floating_point()), x)
        if weight.dtype in (torch.float16, torch.bfloat16) and weight is not x:
            raise ShapeError(
                f"TwoStreams: its sub-networks are in {weight.dtype}, and streams are float32, which half precision "
                "cannot add to the bit; keep the model in float32 and use torch.autocast."
            )
        # what is exact in half precision is exact here, and sums stay so
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return halves(on_grid(wide, self.stream_grid))

    def block(
        self, i: int, first: Tensor, second: Tensor, state: State, run: Run | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """(y1, y2, state) of the block whose F is sub-network `i`; `run` stands for the method of that name."""
        run = run or self.run
        kept, changed = (first, second) if self.order == "rev" else (second, first)
        f, v_f = run(i, changed, state[0])
        y1 = couple(kept, f, grid=self.stream_grid)
        g, v_g = run(i + 1, y1, state[1])
        y2 = couple(changed, g, grid=self.stream_grid)
        for stream in (y1, y2):
            check_range(f"TwoStreams block {i // 2}", stream, self.stream_grid)
        return y1, y2, (v_f, v_g)

    def run(self, i: int, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Sub-network `i`."""
        f, after = self.nets[i](x, state)
        return self.checked(i, x, f), after

    def checked(self, i: int, x: Tensor, f: Tensor) -> Tensor:
        """`f` if sub-network `i` has kept the shape of its stream `x`."""
        if f.shape != x.shape:
            raise ShapeError(
                f"TwoStreams: {'FG'[i % 2]} of block {i // 2} must return the shape of its stream, expected "
                f"{tuple(x.shape)}, got {tuple(f.shape)}. Give it equal widths and no stride or pool."
            )
        return f

    def undone(self, y: Tensor, f: Tensor) -> Tensor:
        """The stream to which `f` was added to give `y`."""
        return uncouple(y, f, grid=self.stream_grid)

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[State, tuple[int, ...]]:
        """(state of every sub-network, shape of one output sample)."""
        if shape[0] % 2:
            self.entered(torch.empty((1, 1, *shape), device="meta"))
        half, made = (shape[0] // 2, *shape[1:]), []
        for i, net in enumerate(self.nets):
            state, out = net.init_state(batch_size, half, device=device, dtype=dtype)  # type: ignore[operator]
            stream = torch.empty((1, 1, *half), device="meta")
            self.checked(i, stream, torch.empty((1, 1, *out), device="meta"))
            made.append(state)
        return tuple(made), tuple(shape)

    def extra_repr(self) -> str:
        return f"order={self.order}, stream_grid={self.stream_grid}"


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Two streams [T, B, C, ...] as one sequence [T, B, 2C, ...], channels last in memory."""
    return torch.cat([first.movedim(2, -1), second.movedim(2, -1)], -1).movedim(-1, 2)


def halves(streams: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `side_by_side`; each half lies channels last in memory.

    Forward and backward have to read streams that lie alike: a convolution rounds by where its input lies.
    """
    first, second = (half.contiguous().movedim(-1, 2) for half in streams.movedim(2, -1).chunk(2, -1))
    return first, second
