"""Attention between spikes: no softmax, only counts of coincidences."""

from typing import Any

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError
from spikefit.layers.chain import State, entries
from spikefit.layers.unit import SpikingConv2d
from spikefit.neurons import create_neuron


class SpikingAttention(nn.Module):
    """Self-attention over the pixels of an image, of binary queries, keys and values.

        s = neuron(x),   q, k, v = neuron(norm(W s)) each,   a = scale (q k^T) v,   out = norm(W neuron(a) + b)

    The products are taken as (v k^T) q: without a softmax both orders give the same whole numbers, and this one costs
    N D^2 / heads instead of N^2 D for N pixels.

    Args:
        channels: D.
        heads: number of heads, a divisor of D.
        scale: factor on the counts.
        gate_threshold: firing level of the neuron behind the product.
        norm: as in `SpikingConv2d`.
        neuron: a name, or {"name": ..., option: ...}; all five are made from it.

    Shapes:
        [T, B, D, H, W] -> the same; state: five membranes [B, D, H, W].

    Raises:
        OptionError: heads is no divisor of the channels.

    Source: Zhou et al. 2023, arXiv:2209.15425 (spiking self-attention).
    """

    consumes_time = False
    # rules that follow one input to what it does ask for this
    multiplies_activations = True

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 8,
        scale: float = 0.125,
        gate_threshold: float = 0.5,
        norm: str = "bn",
        neuron: str | dict[str, Any] = "lif",
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise OptionError(
                f"SpikingAttention: heads must divide the channels, got heads={heads} and channels={channels}."
            )
        self.heads, self.scale = heads, scale
        options = {"name": neuron} if isinstance(neuron, str) else neuron
        self.fire = create_neuron(**options)
        self.query, self.key, self.value = (
            SpikingConv2d(channels, channels, 1, norm=norm, neuron=neuron) for _ in range(3)
        )
        self.gate = create_neuron(**{**options, "v_threshold": gate_threshold})
        self.out = SpikingConv2d(channels, channels, 1, norm=norm, neuron=None, bias=True)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Sequence and five membranes (None for zeros) -> (current, five membranes)."""
        v = entries("SpikingAttention", state, 5)
        s, v_fire = self.fire(x, v[0])
        units = (self.query, self.key, self.value)
        made = [unit(s, before) for unit, before in zip(units, v[1:4], strict=True)]
        # [T, B, heads, D / heads, pixels]
        query, key, value = (sequence.unflatten(2, (self.heads, -1)).flatten(4) for sequence, _ in made)
        counts = (value @ key.mT) @ query
        gated, v_gate = self.gate(self.scale * counts.reshape(x.shape), v[4])
        return self.out(gated)[0], (v_fire, *(after for _, after in made), v_gate)

    def init_state(
        self, batch_size: int, shape: tuple[int, ...], *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[State, tuple[int, ...]]:
        """(five zero membranes, shape of one output sample)."""
        out = self.out.output_shape(tuple(shape))
        made = [torch.zeros((batch_size, *shape), device=device, dtype=dtype) for _ in range(5)]
        return tuple(made), out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:g}"
