"""Operations, and the simple MAC/AC energy model.

    E = 4.6 pJ * MACs of layers with analog input * (T, or 1 if computed once)
      + 0.9 pJ * sum over layers of MACs_l * T * rate_l

An operation of a layer whose input is binary is an accumulate, counted where a spike arrives; any other is a
multiply-accumulate. Energies are those of 32-bit floats at 45 nm: 3.7 pJ multiply, 0.9 pJ add.

Source: Horowitz, "Computing's energy problem", ISSCC 2014, doi:10.1109/ISSCC.2014.6757323.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAC_PJ, AC_PJ = 4.6, 0.9

ASSUMPTIONS = (
    "45 nm, 32-bit float: 4.6 pJ per multiply-accumulate (3.7 multiply + 0.9 add), 0.9 pJ per accumulate.",
    "No memory traffic, no neuron updates; norms count as folded into the weights.",
    "A layer is charged accumulates only if its input is binary; analog, pooled or summed inputs are charged "
    "multiply-accumulates at every step, or once where one step is repeated.",
    "The rate of a layer is the measured mean of its input per element and step, on the sample that was profiled.",
    "synops counts zeros of the padding as if they could spike (nominal); synops_exact leaves them out.",
    "The ANN twin does every multiply-accumulate once.",
)


@dataclass(frozen=True)
class Operations:
    """Operations of one layer, for one sample.

    Attributes:
        macs: multiply-accumulates of one step if the input were dense.
        steps: how often the layer is computed per sequence: T, or 1 for a repeated step.
        binary: whether the input was 0 or 1 everywhere.
        rate: mean of the input per element and step; None if it was not run.
        synops_exact: accumulates triggered by spikes, padding left out, per sample; None if not binary or not run.
    """

    macs: int
    steps: int
    binary: bool
    rate: float | None
    synops_exact: float | None = None

    def __add__(self, later: "Operations") -> "Operations":
        """Those of a sequence whose first steps are here and whose others are `later`."""
        steps = self.steps + later.steps
        both = self.rate is not None and later.rate is not None
        rate = (self.rate * self.steps + later.rate * later.steps) / steps if both else None  # type: ignore[operator]
        known = self.synops_exact is not None and later.synops_exact is not None
        exact = self.synops_exact + later.synops_exact if known else None  # type: ignore[operator]
        return Operations(self.macs, steps, self.binary and later.binary, rate, exact)

    @property
    def synops(self) -> float | None:
        """Accumulates per sample and sequence, MACs * T * rate; None for analog input or if it was not run."""
        return self.macs * self.steps * self.rate if self.binary and self.rate is not None else None

    @property
    def energy_pj(self) -> float | None:
        """Energy per sample and sequence [pJ]; None if the layer was not run."""
        if self.rate is None:
            return None
        return AC_PJ * self.synops if self.synops is not None else MAC_PJ * self.macs * self.steps


def energy_report(layers: Sequence[Operations]) -> dict[str, Any]:
    """Energy of a network and of its ANN twin, per sample.

    Returns:
        snn_pj (None if a layer was not run), ann_pj = 4.6 * sum of MACs, ratio = ann / snn, macs, synops, assumptions.
    """
    energies = [layer.energy_pj for layer in layers]
    known = [e for e in energies if e is not None]
    snn = sum(known) if layers and len(known) == len(energies) else None
    ann = MAC_PJ * sum(layer.macs for layer in layers)
    return {
        "snn_pj": snn,
        "ann_pj": ann,
        "ratio": ann / snn if snn else None,
        "macs": sum(layer.macs for layer in layers),
        "synops": sum(layer.synops or 0 for layer in layers) if snn is not None else None,
        "assumptions": list(ASSUMPTIONS),
    }


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


def operations(synapse: nn.Module, x: Tensor, output_shape: Sequence[int]) -> Operations:
    """Count the operations of `synapse` on the sequence `x`, with its values.

    Args:
        synapse: nn.Conv1d, nn.Conv2d or nn.Linear.
        x: input [T, B, ...].
        output_shape: shape of one output sample, without time and batch.
    """
    T, B = x.shape[:2]
    steps = 1 if T > 1 and x.stride(0) == 0 else T
    binary = bool(((x == 0) | (x == 1)).all())
    exact = exact_synops(synapse, x[:steps]) / B if binary else None
    return Operations(macs_of(synapse, output_shape), steps, binary, float(x.float().mean()), exact)


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
    total = 0.0
    for step in spikes.unbind(0):
        hits = convolve(
            step.float().cpu(), ones, None, synapse.stride, synapse.padding, synapse.dilation, synapse.groups
        )
        total += float(hits.double().sum())
    return total * (weight.shape[0] // synapse.groups)
