"""Blocks of one-step networks: windows of a map, coded as spikes, that start from each other's membranes.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573), and its release, which differs from it in several places; the
options name both.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.layers.norm import create_norm
from spikefit.layers.repeat import repeated
from spikefit.layers.window_cells import CELLS, RECURRENT, Neuron, WindowCell
from spikefit.layers.window_coding import check_coding, decode, encode, encode_packed
from spikefit.layers.windows import CONDENSES, OR_GRADIENTS, Windows, check_windows, cut, recompose, windows_of
from spikefit.neurons.window import STABLE_PHI, WindowLIF, WindowReLU

CARRIES: tuple[str, ...] = ("block", "layer")
ORDERS: tuple[str, ...] = ("batched", "sequential")
PAIRS: tuple[str, ...] = ("own", "release")
MLPS: tuple[str, ...] = ("gelu", "spiking")
NORMS: tuple[str, ...] = ("none", "bn", "step_bn", "rms")


class Stream(NamedTuple):
    """What blocks of windows hand each other: a map, and membranes that are carried from block to block.

    Attributes:
        x: [1, B, C, H, W].
        memory: [B, width, H, W], the width of a cell; None for none yet.
    """

    x: Tensor
    memory: Tensor | None = None


class WindowSpike(nn.Module):
    """A block of one time step: coding, a cell over windows, and a channel MLP, both added to the stream.

        e_p = coding(x_p)                      of every window p = 1..P
        o_p, m_p = cell(e_p)                   neurons that fire on u_p = leak omega(...) + W e_p > v_threshold
        x <- x + FC(recompose(o))              one linear map per pixel
        x <- x + MLP(x)                        C -> 3 C -> C per pixel

    Nothing is kept between calls. Weights run once for all windows; only the neurons go from window to window.

    Args:
        channels: C.
        cell: "cnn" (two 3x3 convolutions), "lstm" (bidirectional), "gru", "rnn", "birnn" or "mlp".
        kind: "tile" or "dilated", see `windows_of`.
        windows: 1, 2 or 4.
        fuse: how two membranes become one, a key of `FUSIONS`; default "omega" as in the paper, "omega_release" as in
            the published code. With carry="block" a cell of one layer has one membrane, which is carried as it is.
        phi, leak, v_threshold: constants of the neurons; `phi` below 0.6 where the cell is recurrent.
        reset: of the membrane between windows: "none" as in the published code, "soft" or "hard".
        surrogate: slope of the step; default rect(1), as in the published code.
        coding: "bernoulli_sg" as in the published code, which sends no gradient to earlier blocks through the spikes,
            "bernoulli_ste", "heaviside", or "analog" for no spikes; see `encode`. Draws are new in every call, in
            training and in evaluation.
        condense: "or" as in the paper, or "mean", which hands on analog values.
        or_grad: gradient of "or", "ste" (that of the mean) or "release".
        carry: membranes go from window to window within the block ("block"), or also from block to block ("layer");
            None for "layer" where the cell is recurrent, else "block", as in the published code.
        pairs: which membranes meet with carry="layer": "own", or "release" as in the published code (one layer, four
            windows).
        order: "batched", or "sequential", one window after the other; both give the same.
        norm: behind every weight of the cell: "none", "bn" (over all windows), "step_bn" (per window) or "rms".
        mlp: "gelu", which is analog, or "spiking": spikes in front of both of its maps.
        dropout: share dropped inside the MLP.
        learn_phi, learn_threshold: train these constants, one per layer of neurons.
        allow_unstable: take phi of 0.6 and more for a recurrent cell.
        analog: the analog twin: ReLU for the neurons, no coding, nothing carried, the mean of windows.
        hands_on: whether membranes go to a next block; False for the last one with carry="layer".

    Attributes:
        keep: what is kept for backward: "all", or "spikes" for bits of the coded spikes and the stream; set by
            `spikefit.use_strategy`.

    Shapes:
        [1, B, C, H, W], or a `Stream` of it -> the same; H and W divisible by 2 (tile) or 4 (dilated). No state.

    Raises:
        OptionError: an unknown option, or one that does not fit the cell.
        ShapeError: more than one time step, sides that do not divide, or another number of channels.
        StateError: membranes of another shape or batch.

    Example:
        block = WindowSpike(48, kind="dilated")
        y, _ = block(torch.rand(1, 8, 48, 16, 16))
    """

    consumes_time = False
    parts_of_a_step = True

    def __init__(
        self,
        channels: int,
        cell: str = "cnn",
        *,
        kind: str = "tile",
        windows: int = 4,
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
        dropout: float = 0.0,
        learn_phi: bool = False,
        learn_threshold: bool = False,
        allow_unstable: bool = False,
        analog: bool = False,
        hands_on: bool = True,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_windows(who, kind, windows)
        check_coding(who, coding)
        choices = (
            ("cell", cell, tuple(CELLS)),
            ("condense", condense, CONDENSES),
            ("or_grad", or_grad, OR_GRADIENTS),
            ("pairs", pairs, PAIRS),
            ("order", order, ORDERS),
            ("norm", norm, NORMS),
            ("mlp", mlp, MLPS),
        )
        for name, value, known in choices:
            _check_choice(who, name, value, known)
        if carry is None:
            carry = "layer" if cell in RECURRENT else "block"
        _check_choice(who, "carry", carry, CARRIES)
        if analog:
            coding, condense, carry = "analog", "mean", "block"
        if pairs == "release" and (carry != "layer" or CELLS[cell][1] != 1 or windows != 4):
            raise OptionError(
                f"{who}: pairs='release' is for membranes carried from block to block (carry='layer') in four windows "
                f"of a cell with one layer of neurons, got carry={carry!r}, windows={windows} and cell={cell!r}; leave "
                "pairs out."
            )
        if order == "sequential" and norm == "bn":
            raise OptionError(
                f"{who}: norm='bn' has statistics of all windows together, which order='sequential' does not; use "
                "norm='step_bn', or leave order out."
            )
        if cell in RECURRENT and phi >= STABLE_PHI and not allow_unstable:
            raise OptionError(
                f"{who}: phi must be below {STABLE_PHI} for a recurrent cell, got phi={phi} with cell={cell!r}: larger "
                "ones are reported to collapse. Take phi=0.5, or allow_unstable=True to see for yourself."
            )
        self.channels, self.kind, self.windows = channels, kind, windows
        self.coding, self.condense, self.or_grad, self.order = coding, condense, or_grad, order
        self.carry, self.hands_on, self.keep = carry, hands_on, "all"
        constants: dict[str, Any] = {"v_threshold": v_threshold, "surrogate": surrogate}
        neuron = WindowReLU if analog else partial(
            WindowLIF, fuse=fuse, phi=phi, leak=leak, reset=reset, learn_phi=learn_phi, learn_threshold=learn_threshold,
            **({"phi_limit": STABLE_PHI} if cell in RECURRENT else {}), **constants,
        )  # fmt: skip
        made_norm = None if norm == "none" else nn.RMSNorm if norm == "rms" else partial(create_norm, norm)
        self.cell = WindowCell(cell, channels, neuron, made_norm, carry=carry, pairs=pairs)
        self.fc = dense(self.cell.width, channels)
        fires = mlp == "spiking" and not analog
        self.mlp = ChannelMLP(channels, dropout, partial(WindowLIF, fuse="none", **constants) if fires else None)

    def forward(
        self, x: "Tensor | Stream", state: Any = None, *, generator: torch.Generator | None = None
    ) -> "tuple[Tensor | Stream, tuple[()]]":
        """Run the block.

        Args:
            x: [1, B, C, H, W], or a `Stream` with the membranes of the block before.
            state: none; there is no second time step.
            generator: of the draws; None for torch's global one.

        Returns:
            (the stream behind the block: with carry="layer" a `Stream` with its membranes, else the map; no state).
        """
        stream = x if isinstance(x, Stream) else Stream(x)
        windows = self._checked(stream)
        pixels = stream.x[0].permute(0, 2, 3, 1).contiguous()
        memory = None if stream.memory is None else stream.memory.permute(0, 2, 3, 1)
        lean = self.keep != "all" and torch.is_grad_enabled()
        if not lean or self.coding == "analog":
            out, membranes = self._branch(encode(pixels, windows, self.coding, generator), memory, windows)
        else:
            packed = encode_packed(pixels, windows, self.coding, generator)
            out, membranes = repeated([self.cell, self.fc], self._packed_branch, *packed, memory, windows)
        pixels = pixels + out
        pixels = pixels + (repeated([self.mlp], self.mlp, pixels) if lean else self.mlp(pixels))
        y = pixels.permute(0, 3, 1, 2).unsqueeze(0)
        return (y if membranes is None else Stream(y, membranes.permute(0, 3, 1, 2))), ()

    def _packed_branch(
        self, carrier: Tensor, bits: Tensor, memory: Tensor | None, windows: Windows
    ) -> tuple[Tensor, Tensor | None]:
        return self._branch(decode(carrier, bits), memory, windows)

    def _branch(self, coded: Tensor, memory: Tensor | None, windows: Windows) -> tuple[Tensor, Tensor | None]:
        """From coded windows and the old map of membranes [B, H, W, width] to what is added, and the next map."""
        old = None if memory is None else cut(memory, windows)
        spikes, membranes = self.cell(coded, old, in_order=self.order == "sequential")
        out = self.fc(recompose(spikes, windows, self.condense, or_grad=self.or_grad))
        if torch.is_anomaly_enabled():
            _check_finite(out if membranes is None else membranes)
        handed_on = membranes is not None and self.hands_on
        return out, recompose(membranes, windows, "mean") if handed_on else None

    def _checked(self, stream: Stream) -> Windows:
        x, memory = stream
        if x.ndim != 5 or x.shape[0] != 1 or x.shape[2] != self.channels:
            hint = (
                f"It works in one step; got T={x.shape[0]}, show the image once (timesteps=1)."
                if x.ndim == 5 and x.shape[0] != 1
                else "A batch of images needs a time axis: x.unsqueeze(0)."
            )
            raise ShapeError(
                f"{type(self).__name__}: expected x as [1, B, {self.channels}, H, W], got {tuple(x.shape)}. {hint}"
            )
        if memory is not None:
            wanted = (x.shape[1], self.cell.width, *x.shape[3:])
            if self.carry != "layer":
                raise StateError(
                    f"{type(self).__name__}: carry='block' takes no membranes of the block before, got "
                    f"{tuple(memory.shape)}; pass the map alone, or use carry='layer'."
                )
            if memory.shape != wanted or memory.device != x.device:
                raise StateError(
                    f"{type(self).__name__}: expected membranes {wanted} on {x.device} beside x of shape "
                    f"{tuple(x.shape)}, got {tuple(memory.shape)} on {memory.device}. Pass those that came with this "
                    "batch, or None."
                )
        return windows_of(self.kind, self.windows, (x.shape[3], x.shape[4]))

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        """(no state, shape of one output sample)."""
        if len(shape) != 3 or shape[0] != self.channels:
            raise ShapeError(
                f"{type(self).__name__}: expected samples ({self.channels}, H, W), got {tuple(shape)}. Create it with "
                f"channels={shape[0]}."
            )
        windows_of(self.kind, self.windows, (shape[1], shape[2]))
        return (), tuple(shape)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.windows} {self.kind} windows, coding={self.coding}, condense={self.condense}, "
            f"carry={self.carry}"
        )


class ChannelMLP(nn.Module):
    """Two linear maps of every pixel, C -> 3 C -> C: analog with GELU between, or with spikes in front of both.

    Args:
        channels: C.
        dropout: share dropped, of the hidden values with GELU and of the output with spikes, which it would scale.
        neuron: makes the neurons; None for GELU.

    Shapes:
        [B, H, W, C] -> the same.
    """

    def __init__(self, channels: int, dropout: float, neuron: "partial[Neuron] | None") -> None:
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

    def forward(self, x: "Tensor | Stream", state: Any = None) -> "tuple[Tensor | Stream, tuple[()]]":
        """Map, or map and membranes -> the same at half the side."""
        if not isinstance(x, Stream):
            return _merged(self.reduce, x[0]).unsqueeze(0), ()
        if x.memory is None or self.reduce_memory is None:
            raise StateError(
                "PatchMerging: expected membranes beside the map exactly where it was made for them (memory=width), got "
                f"{'none' if x.memory is None else tuple(x.memory.shape)}; make it with memory={self.channels} or None."
            )
        return Stream(_merged(self.reduce, x.x[0]).unsqueeze(0), _merged(self.reduce_memory, x.memory)), ()

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


def _check_choice(who: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{who}: {name} must be one of {', '.join(known)}, got {value!r}.")


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(
            "WindowSpike: expected finite membranes, got inf or nan; lower the learning rate or clip gradients."
        )
