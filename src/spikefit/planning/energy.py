"""Operations, and the simple MAC/AC energy model.

    E = 4.6 pJ * MACs of layers with analog input * (T, or 1 if computed once)
      + 0.9 pJ * sum over layers of MACs_l * T * rate_l

An operation of a layer whose input is binary is an accumulate, counted where a spike arrives; any other is a
multiply-accumulate. Energies are those of 32-bit floats at 45 nm: 3.7 pJ multiply, 0.9 pJ add.

Published energies are often totals of another kind, with an accumulate for every operation behind the first layer, also
where a layer reads analog values. `energy_report` gives that one apart, as `all_spiking_pj`.

Source: Horowitz, "Computing's energy problem", ISSCC 2014, doi:10.1109/ISSCC.2014.6757323.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    "The ANN twin does every multiply-accumulate of a layer once, however many steps call it; in a block whose steps "
    "have weights of their own (weights_per_step) the steps are layers of the twin, and it does those of all calls.",
    "all_spiking_pj charges accumulates only behind the first layer, at the firing rate of the network, also where a "
    "layer reads analog values, as published energies often do; no other number here does.",
)


@dataclass(frozen=True)
class Operations:
    """Operations of one layer, for one sample.

    Attributes:
        macs: multiply-accumulates of one step if the input were dense; the mean over steps of different size.
        steps: how often the layer is computed per sequence: T, or 1 for a repeated step.
        binary: whether the input was 0 or 1 everywhere.
        rate: mean of the input per element and step; None if it was not run.
        synops_exact: accumulates triggered by spikes, padding left out, per sample; None if not binary or not run.
        first: whether it reads the data, or what layers made of them without a neuron between.
        own_steps: whether its steps belong to different layers of the ANN twin, as every step has weights of its own.
    """

    macs: float
    steps: int
    binary: bool
    rate: float | None
    synops_exact: float | None = None
    first: bool = False
    own_steps: bool = False

    def __add__(self, later: "Operations") -> "Operations":
        """Those of a sequence whose first steps are here and whose others are `later`."""
        steps, total = self.steps + later.steps, self.total_macs + later.total_macs
        rate = exact = None
        if self.rate is not None and later.rate is not None:
            rate = (self.rate * self.total_macs + later.rate * later.total_macs) / total
        if self.synops_exact is not None and later.synops_exact is not None:
            exact = self.synops_exact + later.synops_exact
        return Operations(
            macs=_quotient(total, steps),
            steps=steps,
            binary=self.binary and later.binary,
            rate=rate,
            synops_exact=exact,
            first=self.first and later.first,
            own_steps=self.own_steps or later.own_steps,
        )

    @property
    def total_macs(self) -> float:
        """Multiply-accumulates per sample and sequence if the input were dense."""
        return self.macs * self.steps

    @property
    def twin_macs(self) -> float:
        """Multiply-accumulates of the same layer, or layers, of the ANN twin, per sample."""
        return self.total_macs if self.own_steps else self.macs

    @property
    def synops(self) -> float | None:
        """Accumulates per sample and sequence, MACs * T * rate; None for analog input or if it was not run."""
        return self.total_macs * self.rate if self.binary and self.rate is not None else None

    @property
    def energy_pj(self) -> float | None:
        """Energy per sample and sequence [pJ]; None if the layer was not run."""
        if self.rate is None:
            return None
        return AC_PJ * self.synops if self.synops is not None else MAC_PJ * self.total_macs


def energy_report(layers: Sequence[Operations]) -> dict[str, Any]:
    """Energy of a network and of its ANN twin, per sample.

        snn_pj          = 4.6 * sum of MACs_l * T of layers with analog input + 0.9 * sum of SynOps_l of all others
        ann_pj          = 4.6 * macs,   macs = sum of MACs_l, or of MACs_l * T where every step has weights of its own
        all_spiking_pj  = energy of the first layers, as in snn_pj + 0.9 * r * sum of MACs_l * T of all layers behind
        r               = sum of SynOps_l / sum of MACs_l * T, both over the layers behind whose input is binary

    The first layers are those marked `first`; r is `all_spiking_rate`. `snn_pj` charges what the hardware of the model
    would do, `all_spiking_pj` compares with publications that count accumulates alone.

    Returns:
        snn_pj (None if a layer was not run), ann_pj, ratio = ann / snn, macs, synops, all_spiking_pj and
        all_spiking_rate (None if a layer was not run, or no layer behind the first reads spikes), assumptions.
    """
    energies = [layer.energy_pj for layer in layers]
    known = [e for e in energies if e is not None]
    snn = sum(known) if layers and len(known) == len(energies) else None
    macs = sum(layer.twin_macs for layer in layers)
    ann = MAC_PJ * macs
    all_spiking, rate = (None, None) if snn is None else _all_spiking(layers)
    return {
        "snn_pj": snn,
        "ann_pj": ann,
        "ratio": ann / snn if snn else None,
        "macs": macs,
        "synops": sum(layer.synops or 0 for layer in layers) if snn is not None else None,
        "all_spiking_pj": all_spiking,
        "all_spiking_rate": rate,
        "assumptions": list(ASSUMPTIONS),
    }


def _all_spiking(layers: Sequence[Operations]) -> tuple[float | None, float | None]:
    """(energy if layers behind the first did nothing but accumulates [pJ], the rate at which they do)."""
    behind = [layer for layer in layers if not layer.first]
    spiking = [layer for layer in behind if layer.binary]
    if not spiking:
        return None, None
    rate = sum(layer.synops or 0 for layer in spiking) / sum(layer.total_macs for layer in spiking)
    first = sum(layer.energy_pj or 0 for layer in layers if layer.first)
    return first + AC_PJ * rate * sum(layer.total_macs for layer in behind), rate


def counts_analog_as_spikes(energy: Mapping[str, Any]) -> bool:
    """Whether the total with accumulates only is another one than `snn_pj`, so that both have to be shown."""
    strict, published = energy.get("snn_pj"), energy.get("all_spiking_pj")
    return strict is not None and published is not None and not math.isclose(strict, published, rel_tol=1e-9)


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


def of_rows(one: Operations, rows: int, batch: int) -> Operations:
    """Operations per sample of a call with so many rows, from those of one row: k B rows are k steps.

    Rows that are no multiple of the batch are one step of all samples together.
    """
    steps = rows // batch if rows % batch == 0 else 1
    exact = None if one.synops_exact is None else one.synops_exact * rows / batch
    return replace(one, macs=_quotient(one.macs * rows, batch * steps), steps=steps, synops_exact=exact)


def _quotient(a: float, b: int) -> float:
    """a / b, whole if it is."""
    return a // b if a % b == 0 else a / b


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
