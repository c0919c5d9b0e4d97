"""Which rule goes with what: the table against minimal nets that carry one trait each, and what is said about it."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from reference import dense_net, sample
from torch import nn

from spikefit import create_model, use_strategy
from spikefit.errors import OptionError, RuleWarning, StrategyError
from spikefit.layers import AveragePoolTime, GlobalAveragePool, Readout, SpikingConv2d, SpikingLinear, SpikingUnit
from spikefit.losses import create_loss
from spikefit.losses.losses import Loss
from spikefit.models import SpikingNetwork
from spikefit.rules import (
    RandomK,
    TopActivity,
    drive,
    drive_rate,
    ndot,
    ottt,
    rate,
    resolve,
    sltt,
    tbptt,
    verdict_rows,
)
from spikefit.rules.trace import StepRule
from spikefit.rules.verdicts import COLUMNS, TRAITS, VERDICTS, markdown

DOCS = Path(__file__).parents[2] / "docs"
MAKE = {
    "sltt": sltt,
    "sltt_k": sltt,
    "ottt": ottt,
    "ndot": ndot,
    "tbptt": partial(tbptt, 2),
    "rate": rate,
    "rate:sequence": partial(rate, "sequence"),
}


class Linear(Loss):
    """mean_t of a weighted sum of logits: it splits over steps, and reads their mean alone."""

    splits_per_step = True
    reads_mean = True

    def __call__(self, logits, targets):
        return self.step(logits.mean(0), targets)

    def step(self, logits_t, targets, *, labels=None):
        return (logits_t * torch.linspace(-1, 1, logits_t.shape[1], dtype=logits_t.dtype)).sum()


class Block(nn.Module):
    """A block of a user around one unit."""

    def __init__(self):
        super().__init__()
        self.unit = SpikingLinear(7, 7, norm="none")

    def forward(self, x, state=None):
        return self.unit(x, state)

    def init_state(self, batch_size, shape, **like):
        return None, shape


class Lateral(Block):
    lateral = True

    def forward(self, x, state=None):
        v, before = (None, torch.zeros_like(x[0])) if state is None else state
        spikes = []
        for x_t in x:
            out, v = self.unit((x_t + 0.5 * before)[None], v)
            before = out[0]
            spikes.append(before)
        return torch.stack(spikes), (v, before)


class Product(Block):
    multiplies_activations = True

    def __init__(self):
        super().__init__()
        self.other = SpikingLinear(7, 7, norm="none")

    def forward(self, x, state=None):
        v, w = (None, None) if state is None else state
        (a, v), (b, w) = self.unit(x, v), self.other(x, w)
        return a * b, (v, w)


class Parallel(nn.Module):
    """A neuron without a membrane: it weighs all steps at once."""

    stepwise = False

    def forward(self, x, state=None):
        return x.cumsum(0), None

    def init_state(self, batch_size, shape, **like):
        return None, shape


class Bare(nn.Module):
    """A block that does not say what it carries."""

    def forward(self, x, state=None):
        return x, None


class Halving(nn.Module):
    """A norm of a user."""

    def forward(self, z, *, repeats=1):
        return z / 2


class Late(SpikingNetwork):
    reads_out_every_step = False


class Own(nn.Module):
    """A model of a user with a step of its own."""

    def __init__(self):
        super().__init__()
        self.unit = SpikingLinear(7, 3, norm="none").double()

    def init_state(self, batch_size, shape):
        return None

    def step(self, x_t, state):
        out, state = self.unit(x_t[None], state)
        return out[0], state


def chain(*blocks, kind=SpikingNetwork, shape=(7,), **options):
    torch.manual_seed(0)
    return kind([*blocks, Readout(7, 3)], input_shape=shape, **options).double()


def linear():
    return SpikingLinear(7, 7, norm="none")


def with_unit(norm):
    return chain(SpikingUnit(nn.Linear(7, 7), norm, linear().neuron))


def pooled():
    convolutions = [SpikingConv2d(2, 7, norm="none", pool="max"), SpikingConv2d(7, 7, norm="none")]
    return chain(*convolutions, GlobalAveragePool(), shape=(2, 4, 4))


def of_length(T):
    net = dense_net()
    net.timesteps = T
    return net


def with_parameter():
    net = dense_net()
    net.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return net


def shared():
    options = {"input_shape": (7,), "hidden": 8, "num_classes": 3, "norm": "none"}
    return create_model("har_mlp", share="layer", strategy="bptt", **options).double()


class Case(NamedTuple):
    """A net, a loss, and options of a rule that carry one trait, and what the sentence names."""

    where: str
    net: Callable[[], nn.Module] = dense_net
    loss: Loss = Linear()
    timesteps: int = 4
    world_size: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "sequence_norm": Case(r"blocks.0.norm (and blocks.1.norm) is BatchNorm", partial(dense_net, norm="bn")),
    "step_norm": Case("blocks.0.norm (and blocks.1.norm) is StepBatchNorm", partial(dense_net, norm="step_bn")),
    "foreign_norm": Case("blocks.0.norm is Halving", lambda: with_unit(Halving())),
    "whole_loss": Case("the loss CrossEntropyMean (ce_mean)", loss=create_loss("ce_mean")),
    "loss_beyond_mean": Case("the loss TET (tet)", loss=create_loss("tet")),
    "whole_neuron": Case("blocks.1 is Parallel", lambda: chain(linear(), Parallel())),
    "consumes_time": Case(
        "blocks.1 is AveragePoolTime", lambda: chain(linear(), AveragePoolTime(2), linear(), timesteps=4)
    ),
    "no_step": Case("Linear has no init_state and step", lambda: nn.Linear(7, 3).double()),
    "no_state": Case("blocks.1 is Bare without init_state", lambda: chain(linear(), Bare())),
    "late_readout": Case("Late has a read-out at some steps only", lambda: chain(linear(), kind=Late)),
    "other_length": Case("SpikingNetwork was made for T = 9, got T = 4", lambda: of_length(9)),
    "own_model": Case("Own is not run as a SpikingNetwork", Own),
    "foreign_block": Case("blocks.", lambda: chain(Block())),
    "lateral": Case("blocks.0 reads its own output", lambda: chain(Lateral())),
    "product": Case("blocks.0 is Product and multiplies", lambda: chain(Product())),
    "max_pool": Case("the max pool of blocks.0", pooled),
    "leaky_readout": Case("blocks.2.membrane", partial(dense_net, head_tau=2.0)),
    "hard_reset": Case("blocks.0.neuron (and blocks.1.neuron) has a hard reset", partial(dense_net, v_reset=0.0)),
    "attached_reset": Case("blocks.0.neuron (and blocks.1.neuron)", partial(dense_net, detach_reset=False)),
    "grid": Case("has a membrane on a grid (frac_bits=8)", partial(dense_net, frac_bits=8)),
    "learned_leak": Case(
        "blocks.1.neuron is ParametricLIF", lambda: dense_net(neurons=[{}, {"name": "plif"}], detach_reset=True)
    ),
    "own_membrane": Case(
        "blocks.0.neuron is TwoGroupNode",
        lambda: chain(SpikingLinear(7, 8, norm="none", neuron="two_group"), SpikingLinear(8, 7, norm="none")),
    ),
    "shared_membrane": Case("SpikingNetwork has share='layer'", shared),
    "chain_strategy": Case("strategy='checkpoint'", lambda: use_strategy(dense_net(), "checkpoint")),
    "lean_unit": Case("blocks.0 (and blocks.1) runs lean", lambda: use_strategy(dense_net(), "lean:spikes")),
    "untraced": Case("scale is trained and belongs to no synapse", with_parameter),
    "no_first_synapse": Case("trace_first=False", lambda: chain(Block(), linear()), options={"trace_first": False}),
    "top_activity": Case("sampler=TopActivity(p=0.5", options={"sampler": TopActivity(0.5)}),
    "look_ahead": Case("sampler=TopActivity(p=0.5", options={"sampler": TopActivity(0.5, look_ahead=True)}),
    "too_short": Case("sampler=RandomK(k=9)", timesteps=4, options={"sampler": RandomK(9)}),
    "update_every_step": Case("update_every='step' on 2 processes", world_size=2, options={"update_every": "step"}),
    "one_step": Case("T = 1 is one time step", timesteps=1),
}
CELLS = [(trait, rule) for trait in TRAITS for rule in COLUMNS if TRAITS[trait].verdict(rule) != "-"]
# synapses inside of a block and behind it; and without a known source there is no known first synapse either
MORE_REASONS = {("foreign_block", "ndot"), ("no_first_synapse", "ndot")}


def rule_of(case, rule):
    options = dict(case.options)
    if rule == "sltt_k":
        options.setdefault("sampler", RandomK(min(2, case.timesteps)))
    return MAKE[rule](**options)


def verdict(case, rule, trait):
    """(verdict of `resolve`, its sentence)."""
    try:
        notes = resolve(
            case.net(), case.loss, rule_of(case, rule), timesteps=case.timesteps, world_size=case.world_size
        )
    except StrategyError as refusal:
        return "no", str(refusal)
    assert [note.code for note in notes] in ([], [trait])
    return ("note", str(notes[0])) if notes else ("yes", "")


@pytest.mark.parametrize(("trait", "rule"), CELLS)
def test_every_cell_is_what_resolve_says_of_a_net_with_that_trait(trait, rule):
    case = CASES[trait]
    found, said = verdict(case, rule, trait)
    assert found == TRAITS[trait].verdict(rule), said
    if found != "yes":
        assert case.where in said
        assert "reasons" not in said or (trait, rule) in MORE_REASONS
        assert rule.removesuffix("_k").partition(":")[0] in said or found == "note"
        assert "{" not in said


@pytest.mark.parametrize(("trait", "rule"), CELLS)
def test_every_cell_is_what_a_step_of_training_does(trait, rule, monkeypatch):
    case, wanted = CASES[trait], TRAITS[trait].verdict(rule)
    monkeypatch.setattr("spikefit.rules.driver.world_size", lambda: case.world_size)
    net, made = case.net(), rule_of(case, rule)
    x, y = sample(T=case.timesteps, shape=getattr(net, "input_shape", (7,)))
    options: dict[str, Any] = {"update": lambda: None} if getattr(made, "update_every", "") == "step" else {}
    run = partial(drive if isinstance(made, StepRule) else drive_rate, net, x, y, case.loss, made, **options)
    if wanted == "no":
        with pytest.raises(StrategyError):
            run()
        assert all(p.grad is None for p in net.parameters())
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = run()
    assert [w.category for w in caught] == ([RuleWarning] if wanted == "note" else [])
    assert all(w.filename == __file__ for w in caught), "a warning names the line that called the driver"
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert outcome.loss.isfinite()
    assert all(g.isfinite().all() for g in found)
    assert sum(float(g.norm()) for g in found) > 0


def test_the_table_is_whole():
    assert set(CASES) == set(TRAITS)
    for row in verdict_rows():
        assert set(row) == {"name", "summary", *COLUMNS}
        assert {row[rule] for rule in COLUMNS} <= set(VERDICTS)
        assert len(TRAITS[row["name"]].verdicts.split()) == len(COLUMNS)
    for missing in (partial(rate, sampler=RandomK(1)), partial(tbptt, 2, sampler=RandomK(1))):
        with pytest.raises(TypeError):
            missing()
    with pytest.raises(TypeError):
        rate(update_every="step")


def test_the_docs_have_the_table():
    page = (DOCS / "choosing_a_strategy.md").read_text()
    command = "python -c 'from spikefit.rules.verdicts import markdown; print(markdown())'"
    assert command in page
    assert markdown() in page, f"docs/choosing_a_strategy.md has another table than the code; put that of {command}"


def test_all_clashes_stand_in_one_error():
    net = create_model("har_mlp", input_shape=(7,), layers=5, norm="bn", neuron={"name": "lif", "v_reset": 0.0})
    with pytest.raises(StrategyError) as refusal:
        resolve(net, create_loss("ce_mean"), ndot(), timesteps=4)
    head, *reasons = str(refusal.value).split("\n- ")
    assert head == "rule ndot: it does not go with SpikingNetwork, for 3 reasons:"
    said = "\n".join(reasons)
    assert "blocks.0.norm (and 4 more) is BatchNorm and needs all T steps; ndot frees each step before" in said
    assert "norm=step_bn" in said
    assert "loss=tet" in said
    assert "blocks.0.neuron (and 4 more) has a hard reset" in said


def test_what_follows_from_a_refusal_is_not_said_again():
    attention = create_model("revsformer_2_384", channels=16, heads=2, norm="step_bn", num_classes=3)
    with pytest.raises(StrategyError, match=r"blocks.8.nets.0 \(and blocks.8.nets.2\) is SpikingAttention") as refusal:
        resolve(attention, create_loss("tet"), ottt())
    assert "nets.0.query" not in str(refusal.value)
    # nested in a block that is refused for the same reason
    over_time = chain(nn.Sequential())
    over_time.blocks[0].consumes_time = True
    over_time.blocks[0].append(AveragePoolTime(2))
    over_time.blocks[0].init_state = lambda *_, **__: None
    with pytest.raises(StrategyError, match=r"rule sltt: blocks.0.0 is AveragePoolTime and needs"):
        resolve(over_time, Linear(), sltt())


def test_running_statistics_are_no_statistics_of_steps():
    for norm in ("bn", "step_bn"):
        net = dense_net(norm=norm)
        for rule in (sltt(), ottt(), ndot(), rate()):
            assert resolve(net.eval(), Linear(), rule, timesteps=4) == []
    assert resolve(dense_net(neurons=[{"name": "plif"}, {}]).requires_grad_(False), Linear(), sltt()) == []


def test_one_step_has_nothing_to_approximate_from_step_to_step():
    net = dense_net(norm="step_bn", v_reset=0.0, head_tau=2.0)
    codes = [note.code for note in resolve(net, Linear(), ottt(), timesteps=4)]
    assert codes == ["step_norm", "hard_reset", "leaky_readout"]
    (note,) = resolve(net, Linear(), ottt(), timesteps=1)
    assert (note.code, note.path) == ("one_step", "T = 1")
    assert [n.code for n in resolve(net, Linear(), ottt())] == codes, "T may not be known yet"


def test_a_training_loop_shows_each_note_once_per_model():
    net, other, (x, y) = dense_net(norm="step_bn"), dense_net(norm="step_bn"), sample(T=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            drive(net, x, y, Linear(), ottt())
        drive(other, x, y, Linear(), ottt())
        drive(net, x, y, Linear(), ndot())
    assert [str(w.message).partition(":")[0] for w in caught] == ["rule ottt", "rule ottt", "rule ndot"]


def test_networks_of_the_zoo_with_their_own_time():
    tet = create_loss("tet")
    images = create_model("trevsnn_mini", num_classes=3)
    for rule in (sltt(), sltt(k=1), ottt(), ndot(), tbptt(2)):
        with pytest.raises(StrategyError, match="TRevSNN has a read-out at some steps only"):
            resolve(images, tet, rule, timesteps=4)
    with pytest.raises(StrategyError, match="TRevSNN has a read-out at some steps only"):
        resolve(images, create_loss("ce_mean"), rate(), timesteps=4)
    frames = create_model("trevsnn_mini", num_classes=3, encode="frames", input_shape=(2, 16, 16))
    assert resolve(frames, tet, sltt(), timesteps=4) == resolve(frames, tet, tbptt(2), timesteps=4) == []
    with pytest.raises(StrategyError, match="TRevSNN was made for T = 4, got T = 3"):
        resolve(frames, tet, sltt(), timesteps=3)
    drive(frames, torch.rand(4, 2, 2, 16, 16), torch.tensor([0, 1]), tet, tbptt(2))
    assert all(p.grad.isfinite().all() for p in frames.parameters() if p.grad is not None)
    window = create_model("dmsn_cnn12", num_classes=3, width=0.125)
    for rule in (sltt(), tbptt(2)):
        assert [n.code for n in resolve(window, tet, rule, timesteps=1)] == ["one_step"]
    with pytest.raises(StrategyError, match="OneStepNetwork was made for T = 1, got T = 4"):
        resolve(window, tet, sltt(), timesteps=4)
    with pytest.raises(StrategyError, match=r"blocks.0.conv.weight \(and \d+ more\) is trained"):
        resolve(window, tet, ottt(), timesteps=1)


def test_rules_without_a_column():
    class Other(StepRule):
        name = "other"

    with pytest.raises(OptionError, match=r"expected a rule of spikefit.rules.*its column in"):
        resolve(dense_net(), Linear(), Other())
