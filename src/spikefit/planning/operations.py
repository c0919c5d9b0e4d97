"""Counts the operations of one layer on the values or the shape of its input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefit.planning.energy import Operations


def macs_of(synapse: nn.Module, output_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one sample and step: outputs times fan-in, padding counted.

    Args:
        synapse: convolution or linear map.
        output_shape: shape of one output sample, without time and batch.
    """
    weight: Tensor = synapse.weight  # type: ignore[assignment]
    outputs = 1
    for n in output_shape:
        outputs *= n
    return outputs * int(weight[0].numel())


def operations(synapse: nn.Module, x: Tensor, output_shape: Sequence[int], *, values: bool = True) -> Operations:
    """Count the operations of `synapse` on the sequence `x`, with its values.

    Args:
        synapse: nn.Conv1d, nn.Conv2d or nn.Linear.
        x: input [T, B, ...].
        output_shape: shape of one output sample, without time and batch.
        values: False for tensors that have none; rate and accumulates are then unknown.
    """
    T, B = x.shape[:2]
    steps, macs = 1 if T > 1 and x.stride(0) == 0 else T, macs_of(synapse, output_shape)
    if not values:
        return Operations(macs, steps, False, None)
    binary = bool(((x == 0) | (x == 1)).all())
    exact = exact_synops(synapse, x[:steps]) / B if binary else None
    return Operations(macs, steps, binary, float(x.float().mean()), exact)


def recurrent_operations(
    layer: nn.RNNBase, x: Tensor, hidden: Tensor, tokens: int, *, values: bool = True
) -> tuple[Operations, Operations]:
    """Count the products with weights of one row of a recurrent module: with its input, and with hidden values.

        input half      gates * H * in per token and direction, with the input of the first layer
        recurrent half  gates * H * H per token and direction in every layer, gates * H * (directions * H) more in the
                        layers above the first, and H * projection where a layer projects: analog inputs

    gates: 1 of an RNN, 3 of a GRU, 4 of an LSTM; their arithmetic is not counted.

    Args:
        layer: nn.RNN, nn.GRU or nn.LSTM.
        x: its input [..., in], of several rows.
        hidden: its output; the mean of it stands for that of all hidden values.
        tokens: places in the sequence of one row.
        values: False for tensors that have none; rates and accumulates are then unknown.
    """
    directions = 2 if layer.bidirectional else 1
    weights = [[w.numel() for w in cell if w.ndim == 2] for cell in layer.all_weights]
    of_input = sum(cell[0] for cell in weights[:directions])
    of_hidden = sum(sum(cell) for cell in weights) - of_input
    if not values:
        return Operations(of_input * tokens, 1, False, None), Operations(of_hidden * tokens, 1, False, None)
    binary, rows = bool(((x == 0) | (x == 1)).all()), x.numel() / (tokens * layer.input_size)
    exact = float(x.double().sum()) * (of_input // layer.input_size) / rows if binary else None
    return (
        Operations(of_input * tokens, 1, binary, float(x.float().mean()), exact),
        Operations(of_hidden * tokens, 1, False, float(hidden.float().mean())),
    )


def exact_synops(synapse: nn.Module, spikes: Tensor) -> float:
    """Accumulates that the spikes trigger, over all steps and samples: the sum of W(spikes) with all weights one.

    Args:
        synapse: nn.Conv1d, nn.Conv2d or nn.Linear.
        spikes: [T, B, ...] of 0 and 1.
    """
    weight: Tensor = synapse.weight  # type: ignore[assignment]
    if isinstance(synapse, nn.Linear):
        return float(spikes.double().sum()) * weight.shape[0]
    if not isinstance(synapse, nn.Conv1d | nn.Conv2d):
        raise TypeError(f"exact_synops: expected a convolution or a linear map, got {type(synapse).__name__}.")
    # one output channel per group stands for all channels of that group
    ones = torch.ones((synapse.groups, *weight.shape[1:]), dtype=torch.float32)
    convolve = F.conv2d if isinstance(synapse, nn.Conv2d) else F.conv1d
    padded, total = synapse.padding_mode != "zeros", 0.0
    for step in spikes.unbind(0):
        step = step.float().cpu()
        if padded:  # what is repeated beyond the border does spike
            step = F.pad(step, synapse._reversed_padding_repeated_twice, synapse.padding_mode)
        padding = 0 if padded else synapse.padding
        with torch.autocast("cpu", enabled=False):  # half precision counts to 256
            hits = convolve(step, ones, None, synapse.stride, padding, synapse.dilation, synapse.groups)
        total += float(hits.double().sum())
    return total * (weight.shape[0] // synapse.groups)
