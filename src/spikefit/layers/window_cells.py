"""What a block of windows does inside a window: weights that see all windows in one call, and neurons between them.

A weight maps [P, B, h, w, C] -> [P, B, h, w, C'] and never sees a membrane, so it runs once for all windows; only the
neurons go from window to window.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573); its supplement names the cells besides "cnn" and "lstm"
without their sizes, which are ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikefit.layers.norm import BatchNorm
from spikefit.neurons.window import WindowLIF, WindowReLU
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.window_scan import across, across_release, behind, in_turn

Neuron = WindowLIF | WindowReLU


class WindowConv(nn.Conv2d):
    """3x3 convolution of every window by itself, zeros beyond its border."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        # the variance of a sum of fan-in terms is that of one input
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def weigh(self, x_PBhwC: Tensor) -> Tensor:
        """Rows of all windows, channels last."""
        P, B = x_PBhwC.shape[:2]
        images = x_PBhwC.flatten(0, 1).permute(0, 3, 1, 2)
        return self(images).permute(0, 2, 3, 1).unflatten(0, (P, B))


class WindowLinear(nn.Linear):
    """A linear map of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def weigh(self, x_PBhwC: Tensor) -> Tensor:
        """The same for all windows."""
        P, B = x_PBhwC.shape[:2]
        return self(x_PBhwC.flatten(0, 1)).unflatten(0, (P, B))


class WindowRecurrent(nn.Module):
    """A recurrent layer over the pixels of a window in the order of its rows, from zero in every window.

    Args:
        channels: C, also the width of the hidden state.
        core: nn.LSTM, nn.GRU or nn.RNN.
        bidirectional: whether it also runs backwards; outputs are then 2 C wide.
    """

    def __init__(self, channels: int, core: Callable[..., nn.Module], *, bidirectional: bool) -> None:
        super().__init__()
        self.core = core(channels, channels, batch_first=True, bidirectional=bidirectional)

    def weigh(self, x_PBhwC: Tensor) -> Tensor:
        """[P, B, h, w, C] -> [P, B, h, w, C or 2 C]."""
        P, B, h, w, _ = x_PBhwC.shape
        tokens = x_PBhwC.reshape(P * B, h * w, -1)
        return self.core(tokens)[0].view(P, B, h, w, -1)


# Cell -> how its weights are made, their number, and how many times C its outputs are wide.
CELLS: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {
    "cnn": (WindowConv, 2, 1),
    "lstm": (lambda channels: WindowRecurrent(channels, nn.LSTM, bidirectional=True), 1, 2),
    "gru": (lambda channels: WindowRecurrent(channels, nn.GRU, bidirectional=False), 1, 1),
    "rnn": (lambda channels: WindowRecurrent(channels, nn.RNN, bidirectional=False), 1, 1),
    "birnn": (lambda channels: WindowRecurrent(channels, nn.RNN, bidirectional=True), 1, 2),
    "mlp": (WindowLinear, 1, 1),
}
# Cells with a state inside a window, for which large phi does not train.
RECURRENT = ("lstm", "gru", "rnn", "birnn")


class WindowCell(nn.Module):
    """Weights and neurons of a block: one layer of them, or two one behind the other ("cnn").

        carry "block"   layer 1: a_p = m1_{p-1}                          (a chain with one memory)
                        layer 2: a_p = m1_{p-1},  c_p = m2_{p-1}
        carry "layer"   layer 1: a_p = m1_{p-1},  c_p = M_p of the block before
                        layer 2: a_p = m2_{p-1},  c_p = m1_p             (p = 1: a = c, the second of the two)

    Args:
        cell: a key of `CELLS`.
        channels: C.
        neuron: makes the neuron of a layer, from its number.
        norm: makes a norm of so many channels, behind every weight; None for none.
        carry: "block" or "layer".
        pairs: "own", or "release" for the pairs (a, c) that the published code has with carry="layer".

    Shapes:
        spikes [P, B, h, w, C], memory [P, B, h, w, width] or None -> spikes and membranes [P, B, h, w, width].
    """

    def __init__(
        self,
        cell: str,
        channels: int,
        neuron: Callable[[int], Neuron],
        norm: Callable[[int], nn.Module] | None,
        *,
        carry: str,
        pairs: str,
    ) -> None:
        super().__init__()
        make, count, wide = CELLS[cell]
        self.width, self.carry, self.pairs = wide * channels, carry, pairs
        self.weights = nn.ModuleList(make(channels) for _ in range(count))
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm(self.width) for _ in range(count))
        self.neurons = nn.ModuleList(map(neuron, range(count)))

    def forward(self, coded: Tensor, memory: Tensor | None, *, in_order: bool = False) -> tuple[Tensor, Tensor | None]:
        """All windows; `in_order` runs one after the other, weights included, which gives the same."""
        return self._one_by_one(coded, memory) if in_order else self._all_at_once(coded, memory)

    def _all_at_once(self, coded: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spikes, membranes = coded, memory
        for i in range(len(self.weights)):
            spikes, membranes = self._chain(i, self._current(i, spikes), membranes)
        return spikes, membranes

    def _one_by_one(self, coded: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        P = coded.shape[0]
        currents: list[list[Tensor]] = [[] for _ in self.weights]
        for p in range(P):
            spikes, membranes, s = coded, memory, coded[p : p + 1]
            for i, known in enumerate(currents):
                known.append(self._current(i, s))
                # a window reads earlier ones alone, so that those to come may hold anything
                to_come = [torch.zeros_like(known[0])] * (P - p - 1)
                spikes, membranes = self._chain(i, torch.cat([*known, *to_come]), membranes)
                s = spikes[p : p + 1]
        return spikes, membranes

    def _chain(self, i: int, current: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The neurons of layer i; `given` are the membranes of the layer before it, in this block or the last."""
        P, neuron, last = current.shape[0], self.neurons[i], i == len(self.weights) - 1
        if self.carry == "layer":
            # membranes keep the compute dtype where currents are in half precision
            given = torch.zeros_like(current, dtype=compute_dtype(current.dtype)) if given is None else given
            return neuron(current, given, across_release() if self.pairs == "release" else across(P))
        if i == 0:
            return neuron(current, None, in_turn(P), fuse="a", want_membranes=not last)
        # a single window has nothing behind it
        return neuron(current, given if P > 1 else None, behind(P), want_membranes=not last)

    def _current(self, i: int, spikes: Tensor) -> Tensor:
        z, norm = self.weights[i].weigh(spikes), self.norms[i]  # type: ignore[operator]
        # norms have channels third
        return norm(z.movedim(-1, 2)).movedim(2, -1) if isinstance(norm, BatchNorm) else norm(z)
