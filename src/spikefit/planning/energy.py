"""Operations of layers, and the simple MAC/AC energy model. They are counted in `operations`.

    E = 4.6 pJ * MACs of layers with analog input * (T, or 1 if computed once)
      + 0.9 pJ * sum over layers of MACs_l * T * rate_l

An operation of a layer whose input is binary is an accumulate, counted where a spike arrives; any other is a
multiply-accumulate. Energies are those of 32-bit floats at 45 nm: 3.7 pJ multiply, 0.9 pJ add.

Published energies are often totals of other kinds, which charge accumulates also where a layer reads analog values.
`energy_report` gives two of them apart: `all_spiking_pj`, with an accumulate for every operation behind the first
layer, and `published`, with one rate for the whole network.

Source: Horowitz, "Computing's energy problem", ISSCC 2014, doi:10.1109/ISSCC.2014.6757323. `published`: Yao, Wu, Chen,
Zhang, "Training a General Spiking Neural Network with Improved Efficiency and Minimum Latency", ACML 2023, PMLR 222,
pp. 1558-1573.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spikefit.errors import OptionError

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
    "Parts that a block cuts one step into (parts_of_a_step) are one step, and the ANN twin does all of them.",
    "all_spiking_pj charges accumulates only behind the first layer, at the firing rate of the network, also where a "
    "layer reads analog values, as published energies often do.",
    "snn_pj is the strict accounting. published flatters: it charges T times the operations of the ANN, at the plain "
    "mean of the firing rates, as accumulates, also where a layer reads analog values, and multiplications for first "
    "layers with analog input alone; its ANN row charges 5.5 pJ per multiply-accumulate, a multiply-accumulate (4.6) "
    "and an accumulate (0.9), where 4.6 is the whole of it.",
    "The firing rates of published are those of neurons; where no neuron is a module of this library, those of the "
    "spikes that layers read.",
    "Recurrent modules: products with weights are counted, the arithmetic of the gates is not.",
    "Random draws of encodings inside the network, and operations on maps of membranes, are in no accounting.",
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
        over_time: whether one computation covers the whole sequence, as of a convolution over time.
    """

    macs: float
    steps: int
    binary: bool
    rate: float | None
    synops_exact: float | None = None
    first: bool = False
    own_steps: bool = False
    over_time: bool = False

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
            over_time=self.over_time or later.over_time,
        )

    def joined(self, part: "Operations") -> "Operations":
        """These and those of another part of the last step here: more operations in as many steps."""
        both = self + part
        return replace(both, macs=_quotient(both.total_macs, self.steps), steps=self.steps)

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


def published_energy(adds: float, mults: float) -> float:
    """Energy as it is often published, from numbers of additions and multiplications [pJ].

        E = 0.9 pJ * adds + 4.6 pJ * mults

    A row of an ANN counts every multiply-accumulate as one addition and one multiplication, 5.5 pJ.

    Raises:
        OptionError: a number that is negative or not finite.

    Source: Yao, Wu, Chen, Zhang, ACML 2023, PMLR 222, pp. 1558-1573.
    """
    for name, number in (("adds", adds), ("mults", mults)):
        if not (math.isfinite(number) and number >= 0):
            raise OptionError(
                f"published_energy: {name} must be a finite number of operations, at least 0, got {number}. "
                "Count single operations, not millions."
            )
    return AC_PJ * adds + MAC_PJ * mults


def energy_report(layers: Sequence[Operations], *, firing: Collection[float] = ()) -> dict[str, Any]:
    """Energy of a network and of its ANN twin, per sample.

        snn_pj          = 4.6 * sum of MACs_l * T of layers with analog input + 0.9 * sum of SynOps_l of all others
        ann_pj          = 4.6 * macs,   macs = sum of MACs_l, or of MACs_l * T where every step has weights of its own
        all_spiking_pj  = energy of the first layers, as in snn_pj + 0.9 * r * sum of MACs_l * T of all layers behind
        r               = sum of SynOps_l / sum of MACs_l * T, both over the layers behind whose input is binary

    The first layers are those marked `first`; r is `all_spiking_rate`. `snn_pj` is the strict one: it charges what the
    hardware of the model would do. `all_spiking_pj` compares with publications that count accumulates alone, and
    `published`, which flatters, with those that put

        adds = rate * sum of MACs_l * T over all layers,   mults = MACs of first layers with analog input
        published.snn_pj = 0.9 * adds + 4.6 * mults,       published.ann_pj = 5.5 * macs

    with T the most steps of any layer; where all steps are in MACs_l already (over_time), or every step is a layer of
    the twin (own_steps), what is computed counts.

    Args:
        layers: the operations of every layer.
        firing: mean firing rate of every layer that fires, for `published`; none: the rates of the spikes that the
            layers read stand for them.

    Returns:
        snn_pj (None if a layer was not run), ann_pj, ratio = ann / snn, macs, synops, all_spiking_pj and
        all_spiking_rate (None if a layer was not run, or no layer behind the first reads spikes), published (a mapping
        of rate, the plain mean of the firing rates, adds, mults, snn_pj, ann_pj and ratio; all but ann_pj None if a
        layer was not run, or nothing fires), assumptions.
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
        "published": _published(layers, firing, macs, run=snn is not None),
        "assumptions": list(ASSUMPTIONS),
    }


def _published(layers: Sequence[Operations], firing: Collection[float], macs: float, *, run: bool) -> dict[str, Any]:
    """The block `published` of a report; `macs` are those of the twin."""
    if any(not 0 <= rate <= 1 for rate in firing):
        raise OptionError(
            f"energy_report: firing rates are shares of neurons, 0 to 1, got {sorted(firing)}. Leave out what gives "
            "other values than spikes."
        )
    rates = list(firing) or [layer.rate or 0.0 for layer in layers if layer.binary and not layer.first]
    report = dict.fromkeys(("rate", "adds", "mults", "snn_pj", "ann_pj", "ratio"), None)
    report["ann_pj"] = ann = published_energy(adds=macs, mults=macs)
    if not run or not any(rates):
        return report
    rate, timesteps = sum(rates) / len(rates), max(layer.steps for layer in layers)
    dense = sum(layer.total_macs if layer.own_steps or layer.over_time else layer.macs * timesteps for layer in layers)
    adds, mults = rate * dense, sum(layer.total_macs for layer in layers if layer.first and not layer.binary)
    snn = published_energy(adds, mults)
    return report | {"rate": rate, "adds": adds, "mults": mults, "snn_pj": snn, "ratio": ann / snn}


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
