"""T-RevSNN: networks with a sub-network of their own for every time step, which are reversible in time.

Four stages of analog states, v_l[t] = F_lt + a_l[t] v_l[t-1]; everything else is spikes without a memory. F is in
`trevsnn_parts.py`, the coupling in `spikefit.layers.coupled_steps`.

Source: Hu et al. 2024, arXiv:2405.16466, and its release (BICLab/T-RevSNN); `trevsnn_mini`, the bounded gains and the
layout of feature groups are ours.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError, ShapeError
from spikefit.layers import StandardizedLinear
from spikefit.layers.chain import State
from spikefit.layers.coupled_steps import CoupledSteps, Head
from spikefit.layers.gains import Gains
from spikefit.models.checks import check_count, check_counts, check_input_shape
from spikefit.models.network import SpikingNetwork
from spikefit.models.trevsnn_parts import STAGES, Closing, StageStep, Stem, dense, entry_of, initialise

ENCODES: tuple[str, ...] = ("repeat", "frames", "group")


@dataclass(frozen=True)
class Size:
    """Widths, steps, kernel, stem (its stride), classes and usual input of a network."""

    widths: tuple[int, int, int, int]
    timesteps: int
    kernel: int
    stem: int
    classes: int
    input_shape: tuple[int, int, int]
    encode: str = "repeat"


SIZES: dict[str, Size] = {
    "trevsnn_tiny": Size((64, 128, 256, 384), 4, 5, 4, 1000, (3, 224, 224)),
    "trevsnn_small": Size((96, 192, 384, 512), 4, 5, 4, 1000, (3, 224, 224)),
    "trevsnn_dvs": Size((32, 64, 128, 256), 8, 5, 1, 10, (2, 128, 128), "frames"),
    "trevsnn_mini": Size((16, 24, 32, 40), 4, 3, 1, 10, (3, 32, 32)),
}


def trevsnn(
    name: str,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    timesteps: int | None = None,
    widths: tuple[int, ...] | None = None,
    kernel: int | None = None,
    fusion: str = "adjacent",
    encode: str | None = None,
    stem_channels: int | None = None,
    gain: str = "bounded",
    learn_gain: bool = True,
    state_grid: int | None = None,
    auxiliary: bool | None = None,
    auxiliary_steps: tuple[int, ...] | None = None,
) -> "TRevSNN":
    """Make a T-RevSNN.

    Args:
        name: "trevsnn_tiny", "trevsnn_small", "trevsnn_dvs" or "trevsnn_mini"; None below means what it has.
        num_classes: K.
        input_shape: (C, H, W); sides are multiples of 16, or of 4 without the strided stem.
        timesteps: T; every step keeps a sub-network of its own, so cost and parameters grow with it.
        widths: channels of the four stages.
        kernel: k, odd.
        fusion: "adjacent" reads the spikes of the next deeper stage, "all_deeper" the analog states of all of them.
        encode: "repeat" shows every step the same image, "frames" gives each its frame and a stem of its own, "group"
            its group of the channels that the last convolution of the stem makes of the image.
        stem_channels: for "group", channels of that convolution, T C_1; they set C_1, so that its cost stays as T
            grows.
        gain: "bounded" (1/2 < a < 1), "free", or "one", see `spikefit.layers.gains`.
        learn_gain: whether gains are trained.
        state_grid: digits of the states behind the point, for gain="one": the way back is then exact to the bit.
        auxiliary: whether three more heads read the state on the way, for loss ce_heads; None for yes where the
            network reads images.
        auxiliary_steps: the steps of those heads; None for T/4, T/2 and 3T/4.

    Returns:
        TRevSNN, [T, B, C, H, W] -> [1, B, K], with frames [T, B, K].

    Raises:
        OptionError: an unknown name, a size out of range, or an option without effect.
    """
    if name not in SIZES:
        raise OptionError(f"trevsnn: expected one of {', '.join(SIZES)}, got {name!r}.")
    size = SIZES[name]
    T = check_count(name, "timesteps", size.timesteps if timesteps is None else timesteps)
    encode = size.encode if encode is None else encode
    if encode not in ENCODES:
        raise OptionError(f"{name}: encode must be one of {', '.join(ENCODES)}, got {encode!r}.")
    shape = check_input_shape(name, _usual_shape(size, encode) if input_shape is None else input_shape, ("C", "H", "W"))
    k = check_count(name, "kernel", size.kernel if kernel is None else kernel)
    if k % 2 == 0:
        raise OptionError(f"{name}: kernel must be odd, so that a depthwise convolution keeps its side, got {k}.")
    channels = _widths(name, size.widths if widths is None else widths, widths is None, encode, stem_channels, T)
    if auxiliary_steps is not None and (auxiliary is False or encode == "frames"):
        raise OptionError(
            f"{name}: auxiliary_steps={auxiliary_steps} are steps of auxiliary heads, and there are none "
            f"(auxiliary={auxiliary}, encode={encode!r}); leave it out."
        )
    if encode == "frames" and auxiliary:
        raise OptionError(f"{name}: with encode='frames' every step has the final head; leave auxiliary out.")
    wanted = encode != "frames" and auxiliary is not False
    steps = _auxiliary_steps(name, T, auxiliary_steps) if wanted else ()
    classes = check_count(name, "num_classes", size.classes if num_classes is None else num_classes)
    if gain == "one" and not learn_gain:
        raise OptionError(f"{name}: gain='one' has nothing to learn; leave learn_gain out.")
    body = CoupledSteps(
        [
            [
                StageStep(channels, i, t, k, fusion, entry_of(size.stem, encode, shape[0], channels[0]))
                for i in range(STAGES)
            ]
            for t in range(T)
        ],
        Gains(channels, T, kind=gain, learn=learn_gain),
        shared=[Closing(c, k) for c in channels],
        heads=_heads(channels[-1], classes, steps),
        head_of=dict.fromkeys(range(1, T + 1), "final") if encode == "frames" else _places(steps, T),
        classes=classes,
        fusion=fusion,
        state_grid=state_grid,
    )
    network = TRevSNN(Stem(size.stem, encode, shape[0], channels[0]), body, input_shape=shape)
    initialise(network)
    return network


def _usual_shape(size: Size, encode: str) -> tuple[int, int, int]:
    """The usual input, of two channels for frames and three for images."""
    same = (encode == "frames") == (size.encode == "frames")
    return size.input_shape if same else (2 if encode == "frames" else 3, *size.input_shape[1:])


def _widths(name: str, widths: Any, usual: bool, encode: str, stem_channels: int | None, T: int) -> tuple[int, ...]:
    """Channels of the stages; those of the first follow from `stem_channels` if it is given."""
    channels = check_counts(name, "widths", widths)
    if len(channels) != STAGES:
        raise OptionError(f"{name}: widths lists the channels of {STAGES} stages, got {channels}.")
    if stem_channels is None:
        return channels
    if encode != "group":
        raise OptionError(
            f"{name}: stem_channels={stem_channels} are split over the T = {T} steps with encode='group' only, got "
            f"encode={encode!r}; leave it out, and give widths."
        )
    check_count(name, "stem_channels", stem_channels)
    if stem_channels % T:
        raise OptionError(
            f"{name}: encode='group' splits the channels of the stem over the steps, expected a multiple of T = {T}, "
            f"got stem_channels={stem_channels}; use {max(1, stem_channels // T) * T}."
        )
    if not usual and channels[0] != stem_channels // T:
        raise OptionError(
            f"{name}: stem_channels={stem_channels} at T = {T} make a first stage of {stem_channels // T} channels, "
            f"got widths={channels}; leave one of them out."
        )
    return (stem_channels // T, *channels[1:])


def _auxiliary_steps(name: str, T: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
    """Steps of the auxiliary heads."""
    if given is not None:
        steps = check_counts(name, "auxiliary_steps", given)
        if list(steps) != sorted(set(steps)) or steps[-1] >= T:
            raise OptionError(f"{name}: auxiliary_steps rise and end before step T = {T}, got {steps}.")
        return steps
    if T % 4:
        raise OptionError(
            f"{name}: auxiliary heads stand behind T/4, T/2 and 3T/4, which needs a multiple of 4, got timesteps={T}; "
            "use such a T, name the steps (auxiliary_steps=(1, 2)), or take the final head alone (auxiliary=False)."
        )
    return (T // 4, T // 2, 3 * T // 4)


def _places(steps: tuple[int, ...], T: int) -> dict[int, str]:
    return {step: f"after_{step}" for step in steps} | {T: "final"}


def _heads(channels: int, classes: int, steps: tuple[int, ...]) -> dict[str, Head]:
    made = {f"after_{step}": Head("state", dense(channels, classes)) for step in steps}
    final = nn.Sequential(dense(channels, classes), dense(classes, classes))
    return made | {"final": Head("spikes", final)}


class TRevSNN(SpikingNetwork):
    """A T-RevSNN, see `trevsnn`: a stem, and the steps behind it.

    The logits of `forward` are those of the final head: [1, B, K] behind the last step, with frames [T, B, K].
    """

    def __init__(self, stem: "Stem", body: CoupledSteps, *, input_shape: tuple[int, ...]) -> None:
        super().__init__([stem, body], input_shape=input_shape)
        self.timesteps = body.timesteps
        # complains about sides that do not fit
        self.init_state(1, device="meta")

    @property
    def body(self) -> CoupledSteps:
        """The steps."""
        return cast(CoupledSteps, self.blocks[1])

    @property
    def reads_out_every_step(self) -> bool:
        """Whether `step` returns logits behind every step."""
        return all(self.body.head_of.get(t) == "final" for t in range(1, self.body.timesteps + 1))

    @property
    def auxiliary_heads(self) -> int:
        """Number of heads on the way."""
        return len(self.body.heads) - 1

    def forward(self, x: Tensor, *, auxiliary: bool = False) -> Any:
        """Logits of the final head, from zero state.

        Args:
            x: [T, B, C, H, W]; an image as `encoding.repeat` shows it, or a frame per step.
            auxiliary: whether to return those of the heads on the way too.

        Returns:
            logits [1, B, K], with frames [T, B, K]; or (logits, auxiliary [heads, B, K]), in the order of their steps.

        Raises:
            OptionError: auxiliary logits of a network that has no such heads.
            ShapeError: another number of steps or channels, or sides that do not fit.
        """
        count = self.auxiliary_heads
        if auxiliary and not count:
            raise OptionError(
                f"{type(self).__name__}: it has no auxiliary heads to read; create it with auxiliary=True (images "
                "only), or call it without auxiliary=True."
            )
        rows = super().forward(x)
        return (rows[count:], rows[:count]) if auxiliary else rows[count:]

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As `forward`, but from `state`, for some of the steps: logits of the final head where it stands behind them.

        Raises:
            StateError: a state of another network or batch.
            ShapeError: wrong shape, or more steps than are left.
        """
        rows, after = super().run(x, state)
        names = [self.body.head_of.get(after[1][0] - i) for i in range(x.shape[0])]
        # the final head stands behind all others
        return rows[len(rows) - names.count("final") :], after

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor | None, State]:  # type: ignore[override]
        """One time step: what the network sees at this step [B, C, H, W], and state -> (logits, state).

        Logits are [B, K] where the final head stands behind the step, else None. Steps fed one by one give those of
        `forward` bit for bit in evaluation.

        Raises:
            StateError: a state of another network or batch.
            ShapeError: wrong shape, or all steps have run.
        """
        rows, state = self.run(x_t.unsqueeze(0), state)
        return (rows[0] if len(rows) else None), state

    def features(self, x: Tensor) -> Tensor:
        """What the steps read of a sequence [T, B, C, H, W]: [T, B, C_1, H', W'], with encode="group" a group each."""
        self.check_input(x)
        self._check_length(x)
        seen = self.body.inputs(self.blocks[0](x)[0])
        return torch.stack([self._first(t).entered(one) for t, one in enumerate(seen)])

    def step_features(self, feature: Tensor, state: State) -> tuple[Tensor | None, State]:
        """As `step`, from what `features` gave for this step, so that the stem of an image runs once.

        Raises:
            StateError: a state of another network or batch.
            ShapeError: no features [B, C_1, H', W'], or all steps have run.
        """
        self._check_state(state)
        body = self.body
        if feature.ndim != 4 or feature.shape[1] != body.gains.widths[0]:
            raise ShapeError(
                f"{type(self).__name__}: expected what features gave for one step, [B, {body.gains.widths[0]}, H, W], "
                f"got {tuple(feature.shape)}; step takes images and frames."
            )
        t, v = body.entered(feature.unsqueeze(0), state[1])
        stages = cast(Any, body.branches[t])

        def run(stage: int, below: Tensor, *deeper: Tensor) -> Tensor:
            return stages[stage].behind(cast(Any, body.shared)[stage], below, *deeper)

        fired = body.fired(v, feature)
        v, fired = body.advance(t, body.inputs(feature.unsqueeze(0))[0], v, fired, body.gains()[t], run)
        final = body.head_of.get(t + 1) == "final"
        return body.read(t + 1, v[-1], fired[-1]) if final else None, (state[0], (t + 1, *v))

    def deployed(self) -> "TRevSNN":
        """A copy for inference: without auxiliary heads, and with one linear map for the two of the final head.

        Nothing stands between the two, so that they fuse but for rounding.
        """
        made = copy.deepcopy(self)
        body = made.body
        first, second = self._final_maps()
        fused = nn.Linear(first.in_features, second.out_features, device=first.weight.device, dtype=first.weight.dtype)
        with torch.no_grad():
            inner, outer = first.standardized(), second.standardized()
            fused.weight.copy_(outer @ inner)
            fused.bias.copy_(outer @ first.bias + second.bias)
        body.heads = nn.ModuleDict({"final": Head("spikes", fused)})
        body.head_of = {step: name for step, name in body.head_of.items() if name == "final"}
        return made

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters: all; without auxiliary heads; and also without the second map of the final head.

        The last is what is published: gains of standardised weights count, though they can be folded.
        """
        total = sum(p.numel() for p in self.parameters() if p.requires_grad)
        heads = [h for name, h in self.body.heads.items() if name != "final"]
        rest = total - sum(p.numel() for head in heads for p in head.parameters())
        net = cast(Head, self.body.heads["final"]).net
        second = net[1] if isinstance(net, nn.Sequential) else nn.Module()
        closing = sum(p.numel() for p in second.parameters())
        return {"trainable": total, "without_auxiliary": rest, "deployed": rest - closing}

    def _final_maps(self) -> tuple[StandardizedLinear, StandardizedLinear]:
        net = cast(Head, self.body.heads["final"]).net
        if not isinstance(net, nn.Sequential):
            raise OptionError(f"{type(self).__name__}: it is deployed, and its head is one map already.")
        return cast(StandardizedLinear, net[0]), cast(StandardizedLinear, net[1])

    def _first(self, t: int) -> "StageStep":
        return cast("StageStep", cast(nn.ModuleList, self.body.branches[t])[0])

    def _check_length(self, x: Tensor) -> None:
        T = self.body.timesteps
        if x.shape[0] != T:
            raise ShapeError(
                f"{type(self).__name__}: it has a sub-network for each of its T = {T} time steps, got x of shape "
                f"{tuple(x.shape)}, T = {x.shape[0]}. {self._length_hint()}, or create it with timesteps={x.shape[0]}."
            )

    def _length_hint(self) -> str:
        T = self.body.timesteps
        if self.auxiliary_heads or self.body.head_of.keys() == {T}:
            return f"Show an image T times, encoding.repeat(x, timesteps={T})"
        return f"Split a recording into {T} frames, encoding.event_frames(events, timesteps={T}, ...)"

    def _shape_hint(self, x: Tensor) -> str:
        return f"{self._length_hint()}. {super()._shape_hint(x)}"
