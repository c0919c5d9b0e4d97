"""T-RevSNN: networks with sub-networks of their own for every time step, which are reversible in time.

Four stages of analog states; everything else is spikes without a memory. A stage at a step computes

    w = down(from below) + up(s_{l+1}[t-1])            up for l < 4 and t > 1
    w = w + g DW(PW(s(PW(DW(s(w))))))                  all of it the step's own
    w = w + DW'(PW'(s(PW(DW(s(w))))))                  DW', PW' one for all steps
    v_l[t] = w + a_l[t] v_l[t-1]

DW: depthwise k x k, PW: 1x1 to four times the channels and back, with standardised weights.

Source: Hu et al. 2024, arXiv:2405.16466, and its release (BICLab/T-RevSNN); `trevsnn_mini`, the bounded gains and the
layout of feature groups are ours.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError
from spikefit.layers import StandardizedConv2d, StandardizedLinear, StepBatchNorm
from spikefit.layers.chain import State
from spikefit.layers.coupled_steps import CoupledSteps, Head
from spikefit.layers.gains import Gains
from spikefit.models.checks import check_count, check_counts, check_input_shape
from spikefit.models.network import SpikingNetwork
from spikefit.neurons import Threshold

ENCODES: tuple[str, ...] = ("repeat", "frames", "group")
# Side of a stage over that of the stem's output.
STRIDES = (1, 2, 4, 4)
STAGES = len(STRIDES)
# Channels of the two inner layers of a block over those of the stage.
EXPANSION = 4


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
            [StageStep(channels, i, t, k, fusion, _entry(size, encode, shape[0], channels[0])) for i in range(STAGES)]
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
    network = TRevSNN(Stem(size, encode, shape[0], channels[0]), body, input_shape=shape)
    _initialise(network)
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
    made = {f"after_{step}": Head("state", _dense(channels, classes)) for step in steps}
    final = nn.Sequential(_dense(channels, classes), _dense(classes, classes))
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
        names = [self.body.head_of.get(t) for t in range(state[1][0] + 1, after[1][0] + 1)]
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
        self._check(x)
        seen = self.body.inputs(self.blocks[0](x)[0])
        return torch.stack([self._first(t).entered(one) for t, one in enumerate(seen)])

    def step_features(self, feature: Tensor, state: State) -> tuple[Tensor | None, State]:
        """As `step`, from what `features` gave for this step, so that the stem of an image runs once."""
        self._check_state(state)
        body = self.body
        t, v = body.entered(feature.unsqueeze(0), state[1])
        stages = cast(Any, body.branches[t])

        def run(stage: int, below: Tensor, *deeper: Tensor) -> Tensor:
            return stages[stage].behind(cast(Any, body.shared)[stage], below, *deeper)

        fired = [body.fire(one) for one in v]
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
        second = self._final_maps()[1]
        return {
            "trainable": total,
            "without_auxiliary": rest,
            "deployed": rest - sum(p.numel() for p in second.parameters()),
        }

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


class Stem(nn.Module):
    """The part of the stem that all steps share: convolutions with standardised weights, one step per call.

    Args:
        size: of the network; `size.stem` is 4 for the two strided convolutions, 1 for one of stride 1.
        encode: with "group" the last convolution is the steps' own, with "frames" all of it.
        channels, width: C of the input and C_1.
    """

    def __init__(self, size: Size, encode: str, channels: int, width: int) -> None:
        super().__init__()
        strided = size.stem > 1 and encode != "frames"
        self.stride, self.multiple = (4, 4 * max(STRIDES)) if strided else (1, max(STRIDES))
        parts: list[nn.Module] = []
        if strided:
            parts.append(_conv(channels, width, 7, stride=2))
        if strided and encode == "repeat":
            parts.append(_conv(width, width, 3, stride=2))
        if not strided and encode == "repeat":
            parts.append(_conv(channels, width, 3))
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, tuple[()]]:
        """Sequence [T, B, C, H, W] -> (the same behind the convolutions, no state); what is repeated runs once."""
        if not len(self.parts):
            return x, ()
        if x.shape[0] > 1 and x.stride(0) == 0:
            return self.parts(x[0]).unsqueeze(0).expand(x.shape[0], -1, -1, -1, -1), ()
        return torch.stack([self.parts(one) for one in x.unbind()]), ()

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None
    ) -> tuple[tuple[()], tuple[int, ...]]:
        """(no state, shape of what the first stage sees).

        Raises:
            ShapeError: sides that the stages would not halve evenly.
        """
        if len(shape) != 3 or any(side % self.multiple for side in shape[1:]):
            raise ShapeError(
                f"T-RevSNN: expected images whose sides are multiples of {self.multiple}, as stages halve them and "
                f"give them back, got {tuple(shape)}. Pad or resize them, or create it with another input_shape."
            )
        return (), (shape[0], *(side // self.stride for side in shape[1:]))


class StageStep(nn.Module):
    """What a stage has of its own at one step; called with what it shares with the other steps.

    Args:
        widths: channels of all stages.
        stage, t: numbers of the stage and the step, from 0.
        kernel: k of the depthwise convolutions.
        fusion: "adjacent" or "all_deeper".
        entry: of the first stage, what the step makes of its input; None for nothing.
    """

    def __init__(
        self, widths: tuple[int, ...], stage: int, t: int, kernel: int, fusion: str, entry: nn.Module | None
    ) -> None:
        super().__init__()
        c, hidden = widths[stage], EXPANSION * widths[stage]
        self.fire = Threshold()
        self.entry = entry if stage == 0 else None
        self.down = None if stage == 0 else ConvNorm(widths[stage - 1], c, STRIDES[stage] // STRIDES[stage - 1])
        deeper = range(stage + 1, STAGES) if t else range(0)
        if fusion == "adjacent":
            self.up: nn.Module | None = ConvNorm(widths[deeper[0]], c, 1) if deeper else None
            self.mix: nn.ModuleList | None = None
        else:
            self.up = None
            self.mix = nn.ModuleList(nn.Conv2d(widths[i], c, 1, bias=False) for i in deeper)
        self.factors = [STRIDES[i] // STRIDES[stage] for i in deeper]
        self.dw1, self.pw1 = _depthwise(c, kernel), _conv(c, hidden, 1)
        self.pw2, self.dw2 = _conv(hidden, c, 1), _depthwise(c, kernel)
        self.scale = nn.Parameter(torch.ones(c))
        self.dw3, self.pw3 = _depthwise(c, kernel), _conv(c, hidden, 1)

    def forward(self, shared: "Closing", below: Tensor, *deeper: Tensor) -> Tensor:
        """F: from below and from deeper stages of the step before, [B, C_l, H_l, W_l]."""
        return self.behind(shared, self.entered(below), *deeper)

    def entered(self, below: Tensor) -> Tensor:
        """What the step makes of the input of the network."""
        return below if self.entry is None else self.entry(below)

    def behind(self, shared: "Closing", below: Tensor, *deeper: Tensor) -> Tensor:
        """F of what has entered."""
        w = below if self.down is None else self.down(below)
        if self.up is not None:
            w = w + _upsampled(self.up(deeper[0]), self.factors[0])
        first = self.dw2(self.pw2(self.fire(self.pw1(self.dw1(self.fire(w))))))
        w = w + self.scale.view(1, -1, 1, 1) * first
        w = w + shared(self.fire(self.pw3(self.dw3(self.fire(w)))))
        if self.mix is not None:
            for conv, one, factor in zip(self.mix, deeper, self.factors, strict=True):
                w = w + _upsampled(conv(one), factor)
        return w


class Closing(nn.Module):
    """The end of the second block of a stage, one for all steps: DW'(PW'(s))."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.pw, self.dw = _conv(EXPANSION * channels, channels, 1), _depthwise(channels, kernel)

    def forward(self, s: Tensor) -> Tensor:
        """Spikes [B, 4C, H, W] -> [B, C, H, W]."""
        return self.dw(self.pw(s))


class ConvNorm(nn.Module):
    """A convolution and a batch norm of one step: 3x3 of stride 2, or 1x1."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        kernel = 3 if stride > 1 else 1
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = StepBatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H / stride, W / stride]."""
        return self.norm(self.conv(x).unsqueeze(0)).squeeze(0)


def _entry(size: Size, encode: str, channels: int, width: int) -> nn.Module | None:
    """What a step makes of its input by itself."""
    if encode == "repeat":
        return None
    if encode == "group" and size.stem > 1:
        return _conv(width, width, 3, stride=2)
    return _conv(channels, width, 3)


def _upsampled(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")


def _conv(channels: int, out: int, kernel: int, *, stride: int = 1) -> StandardizedConv2d:
    """A convolution with a standardised weight of its published eps, which stands inside the root of the variance."""
    eps = 1e-6 * channels * kernel**2
    return StandardizedConv2d(channels, out, kernel, stride=stride, padding=kernel // 2, eps=eps)


def _dense(channels: int, out: int) -> StandardizedLinear:
    return StandardizedLinear(channels, out, eps=1e-6 * channels)


def _depthwise(channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


def _initialise(network: nn.Module) -> None:
    """Weights normal(0, 0.02), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # the release cuts at 2, a hundred standard deviations, and looks at values, which shapes do not have
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
