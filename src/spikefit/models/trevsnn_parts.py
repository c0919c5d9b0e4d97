"""What a T-RevSNN is made of: the stem, and what a stage computes at a step.

    w = down(from below) + up(s_{l+1}[t-1])            up for l < 4 and t > 1
    w = w + g DW(PW(s(PW(DW(s(w))))))                  all of it the step's own
    w = w + DW'(PW'(s(PW(DW(s(w))))))                  DW', PW' one for all steps

DW: depthwise k x k, PW: 1x1 to four times the channels and back, with standardised weights.

Source: Hu et al. 2024, arXiv:2405.16466, and its release (BICLab/T-RevSNN).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.errors import ShapeError
from spikefit.layers import StandardizedConv2d, StandardizedLinear, StepBatchNorm
from spikefit.layers.coupled_steps import repeated_in_place
from spikefit.neurons import Threshold

# Side of a stage over that of the stem's output.
STRIDES = (1, 2, 4, 4)
STAGES = len(STRIDES)
# Channels of the two inner layers of a block over those of the stage.
EXPANSION = 4


class Stem(nn.Module):
    """The part of the stem that all steps share: convolutions with standardised weights, one step per call.

    Args:
        stride: 4 for the two strided convolutions, 1 for one of stride 1.
        encode: with "group" the last convolution is the steps' own, with "frames" all of it.
        channels, width: C of the input and C_1.
    """

    def __init__(self, stride: int, encode: str, channels: int, width: int) -> None:
        super().__init__()
        strided = stride > 1 and encode != "frames"
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
        if repeated_in_place(x):
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


def entry_of(stride: int, encode: str, channels: int, width: int) -> nn.Module | None:
    """What a step makes of its input by itself."""
    if encode == "repeat":
        return None
    if encode == "group" and stride > 1:
        return _conv(width, width, 3, stride=2)
    return _conv(channels, width, 3)


def _upsampled(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")


def _conv(channels: int, out: int, kernel: int, *, stride: int = 1) -> StandardizedConv2d:
    """A convolution with a standardised weight of its published eps, which stands inside the root of the variance."""
    eps = 1e-6 * channels * kernel**2
    return StandardizedConv2d(channels, out, kernel, stride=stride, padding=kernel // 2, eps=eps)


def dense(channels: int, out: int) -> StandardizedLinear:
    return StandardizedLinear(channels, out, eps=1e-6 * channels)


def _depthwise(channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


def initialise(network: nn.Module) -> None:
    """Weights normal(0, 0.02), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # the release cuts at 2, a hundred standard deviations, and looks at values, which shapes do not have
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
