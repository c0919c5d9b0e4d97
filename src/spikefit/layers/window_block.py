"""Blocks of one-step networks: windows of a map, coded as spikes, that start from each other's membranes.

Source: Yao et al., ACML 2023 (PMLR 222, pp. 1558-1573), and its release, which differs from it in several places; the
options name both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError, StateError, check_choice
from spikefit.layers.norm import BatchNorm, StepBatchNorm
from spikefit.layers.repeat import repeated
from spikefit.layers.window_cells import CELLS, RECURRENT, Neuron, WindowCell
from spikefit.layers.window_coding import CODINGS, decode, encode, encode_packed
from spikefit.layers.window_parts import ChannelMLP, Stream, dense
from spikefit.layers.windows import CONDENSES, OR_GRADIENTS, Windows, check_windows, cut, recompose, windows_of
from spikefit.neurons.window import PHI_LIMIT, STABLE_PHI, WindowLIF, WindowReLU

CARRIES: tuple[str, ...] = ("block", "layer")
PHI = 0.5
ORDERS: tuple[str, ...] = ("batched", "sequential")
PAIRS: tuple[str, ...] = ("own", "release")
MLPS: tuple[str, ...] = ("gelu", "spiking")
NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "bn": BatchNorm,
    "step_bn": StepBatchNorm,
    "rms": nn.RMSNorm,
}


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
            the published code; "none" carries nothing, whatever `carry` is. With carry="block" a cell of one layer has
            one membrane, which is carried as it is, and other values of `fuse` and `phi` are refused there.
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
        learn_phi, learn_threshold: train these constants, one per layer of neurons; phi where two membranes meet, which
            the first layer of a cell has with carry="layer" alone.
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
        phi: float = PHI,
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
        check_choice(who, "coding", coding, CODINGS)
        check_choice(who, "cell", cell, CELLS)
        check_choice(who, "condense", condense, CONDENSES)
        check_choice(who, "or_grad", or_grad, OR_GRADIENTS)
        check_choice(who, "mlp", mlp, MLPS)
        carry = ("layer" if cell in RECURRENT else "block") if carry is None else carry
        _check_order(who, order, norm)
        _check_carry(who, carry, pairs, cell, windows)
        if carry == "block" and CELLS[cell][1] == 1 and not analog:
            _check_one_memory(who, cell, fuse, phi)
        _check_phi(who, phi, cell, allow_unstable)
        if analog:
            coding, condense, carry = "analog", "mean", "block"
        # a map of membranes that nobody reads, and weights that merge it, would be in vain
        carry = "block" if fuse == "none" else carry
        if learn_phi and not analog:
            _check_learned(who, carry, cell, windows)
        self.channels, self.kind, self.windows = channels, kind, windows
        self.coding, self.condense, self.or_grad, self.order = coding, condense, or_grad, order
        self.carry, self.hands_on, self.keep = carry, hands_on, "all"

        def neuron(layer: int) -> Neuron:
            if analog:
                return WindowReLU()
            return WindowLIF(
                fuse=fuse,
                phi=phi,
                leak=leak,
                v_threshold=v_threshold,
                reset=reset,
                surrogate=surrogate,
                learn_phi=learn_phi and _reads_phi(carry, layer, windows),
                learn_threshold=learn_threshold,
                phi_limit=STABLE_PHI if cell in RECURRENT else PHI_LIMIT,
            )

        self.cell = WindowCell(cell, channels, neuron, NORMS[norm], carry=carry, pairs=pairs)
        self.fc = dense(self.cell.width, channels)
        alone = partial(WindowLIF, fuse="none", v_threshold=v_threshold, surrogate=surrogate)
        self.mlp = ChannelMLP(channels, dropout, alone if mlp == "spiking" and not analog else None)

    def forward(
        self, x: Tensor | Stream, state: Any = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor | Stream, tuple[()]]:
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
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
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


def _check_order(who: str, order: str, norm: str) -> None:
    check_choice(who, "order", order, ORDERS)
    check_choice(who, "norm", norm, NORMS)
    if order == "sequential" and norm == "bn":
        raise OptionError(
            f"{who}: norm='bn' has statistics of all windows together, which order='sequential' does not; use "
            "norm='step_bn', or leave order out."
        )


def _check_carry(who: str, carry: str, pairs: str, cell: str, windows: int) -> None:
    check_choice(who, "carry", carry, CARRIES)
    check_choice(who, "pairs", pairs, PAIRS)
    if pairs == "release" and (carry != "layer" or CELLS[cell][1] != 1 or windows != 4):
        raise OptionError(
            f"{who}: pairs='release' is for membranes carried from block to block (carry='layer') in four windows of "
            f"a cell with one layer of neurons, got carry={carry!r}, windows={windows} and cell={cell!r}; leave pairs "
            "out."
        )


def _check_one_memory(who: str, cell: str, fuse: str, phi: float) -> None:
    if fuse not in ("omega", "none") or phi != PHI:
        raise OptionError(
            f"{who}: with carry='block' a cell of one layer has one membrane, which is carried as it is, so fuse and "
            f"phi have no effect, got fuse={fuse!r} and phi={phi} with cell={cell!r}; use carry='layer', or leave them "
            "out (fuse='none' carries nothing)."
        )


def _reads_phi(carry: str, layer: int, windows: int) -> bool:
    """Whether two membranes meet in that layer of a cell."""
    return carry == "layer" or (layer > 0 and windows > 1)


def _check_learned(who: str, carry: str, cell: str, windows: int) -> None:
    if not any(_reads_phi(carry, layer, windows) for layer in range(CELLS[cell][1])):
        raise OptionError(
            f"{who}: learn_phi needs two membranes that meet, and with carry={carry!r}, windows={windows} and "
            f"cell={cell!r} there are none; use carry='layer' with another fuse than 'none', or leave learn_phi out."
        )


def _check_phi(who: str, phi: float, cell: str, allow_unstable: bool) -> None:
    if cell in RECURRENT and phi >= STABLE_PHI and not allow_unstable:
        raise OptionError(
            f"{who}: phi must be below {STABLE_PHI} for a recurrent cell, got phi={phi} with cell={cell!r}: larger "
            "ones are reported to collapse. Take phi=0.5, or allow_unstable=True to see for yourself."
        )


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(
            "WindowSpike: expected finite membranes, got inf or nan; lower the learning rate or clip gradients."
        )
