"""Rules over the models of the zoo: shared membranes, reversible depth, and which rule trains which model."""

import copy

import pytest
import torch
from reference import error, gradients
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from spikefit import create_model, use_strategy
from spikefit.errors import StrategyError
from spikefit.losses import create_loss
from spikefit.planning import saved_bytes
from spikefit.rules import parse_driver

NEURON = {"name": "lif", "tau": 2.0, "v_threshold": 0.5}
COMMON = {"neuron": NEURON, "norm": "step_bn", "num_classes": 3}
IMAGE = {"width": 1 / 16, "input_shape": (3, 16, 16)}
TET = create_loss("tet")
Y = torch.tensor([0, 1, 2, 0])


def made(name, **options):
    torch.manual_seed(0)
    return create_model(name, **options)


def sequence(net, T=4):
    generator = torch.Generator().manual_seed(1)
    dtype = next(net.parameters()).dtype
    return torch.rand(T, len(Y), *net.input_shape, generator=generator, dtype=dtype)


def cut(state):
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, state)


def slow(net, x, k=1):
    """Gradients of truncated BPTT in windows of k steps, SLTT for k = 1: everything is cut behind each window."""
    state, window = net.init_state(x.shape[1]), 0
    for t in range(len(x)):
        logits, state = net.step(x[t], state)
        window = window + TET.step(logits, Y) / len(x)
        if (t + 1) % k == 0 or t + 1 == len(x):
            window.backward()
            state, window = cut(state), 0
    return gradients(net)


def by_rule(text, net, x):
    net.zero_grad()
    parse_driver(text).run(net, x, Y, TET)
    return gradients(net)


SHARED = {
    "har_mlp layer": ("har_mlp", {**COMMON, "hidden": 12, "share": "layer"}),
    "har_mlp channel": ("har_mlp", {**COMMON, "hidden": 12, "share": "channel", "groups": 2}),
    "vgg6 channel": ("vgg6", {**COMMON, "width": 1 / 8, "input_shape": (2, 8, 8), "share": "channel", "groups": 2}),
}


@pytest.mark.parametrize(("text", "k"), [("sltt", 1), ("tbptt:2", 2)])
@pytest.mark.parametrize("case", SHARED)
def test_layers_and_channels_that_share_a_membrane(case, text, k):
    name, options = SHARED[case]
    net = made(name, **options).double()
    twin = use_strategy(copy.deepcopy(net), "bptt")
    assert net.share != "none"
    x = sequence(net, T=5)
    wanted = slow(twin, x, k)
    large = {n: g for n, g in wanted.items() if g.norm() > 1e-9}
    assert len(large) > len(wanted) / 2
    for strategy in ("bptt", "replay"):
        parse_driver({"name": text, "inside": strategy}).apply(net)
        assert net.strategy.name == strategy
        assert error(by_rule(text, net, x), large) <= 1e-10, strategy


def reversible(blocks=None, order="rev", width=1 / 16):
    return made("revsresnet21", **{**COMMON, **IMAGE, "width": width}, order=order, blocks=blocks)


@pytest.mark.parametrize("order", ["rev", "para"])
@pytest.mark.parametrize(("text", "k"), [("sltt", 1), ("tbptt:2", 2)])
def test_blocks_that_run_backwards_in_depth(order, text, k):
    net = use_strategy(reversible((1, 1), order).double(), "reversible")
    x = sequence(net, T=3)
    wanted = slow(use_strategy(copy.deepcopy(net), "bptt"), x, k)
    large = {n: g for n, g in wanted.items() if g.norm() > 1e-9}
    assert len(large) > len(wanted) / 2
    assert error(by_rule(text, net, x), large) <= 1e-10


def membranes(blocks):
    """Bytes of the state, which a forward without a graph holds too."""
    state = reversible((blocks, 1)).init_state(len(Y))
    return sum(v.numel() * v.element_size() for v in tree_leaves(state) if isinstance(v, Tensor))


def test_what_is_held_beside_membranes_grows_neither_with_time_nor_with_depth():
    def held(T, blocks, strategy):
        net = use_strategy(reversible((blocks, 1)), strategy)
        return saved_bytes(net, sequence(net, T), Y, loss=TET, driver=parse_driver("sltt")).total

    for strategy in ("bptt", "reversible", "reversible:off"):
        assert held(2, 1, strategy) == held(6, 1, strategy), strategy
    depth = {s: (held(2, 5, s) - held(2, 1, s)) / 4 for s in ("bptt", "reversible", "reversible:off")}
    state = (membranes(5) - membranes(1)) / 4
    # two checksums a block, of eight bytes each
    assert depth["reversible"] == state + 16
    assert depth["reversible:off"] == state
    assert depth["bptt"] > 3 * state


# model -> how it is made, and what each rule does with it: True where it trains, else what the refusal says
MODELS = {
    "vgg9": ("vgg9", {**COMMON, **IMAGE}),
    "vgg9 avg": ("vgg9", {**COMMON, **IMAGE, "pool": "avg"}),
    "har_mlp": ("har_mlp", {**COMMON, "hidden": 12}),
    "resnet19": ("resnet19", {**COMMON, **IMAGE}),
    "revsresnet21": ("revsresnet21", {**COMMON, **IMAGE}),
    "shared": ("har_mlp", {**COMMON, "hidden": 12, "share": "layer"}),
    "trevsnn images": ("trevsnn_mini", {"num_classes": 3, "input_shape": (3, 16, 16)}),
    "trevsnn frames": ("trevsnn_mini", {"num_classes": 3, "input_shape": (2, 16, 16), "encode": "frames"}),
}
RULES = ["sltt", "sltt_k:2", "ottt", "ndot", "tbptt:2", "rate", "rate:sequence"]
LATE = "TRevSNN has a read-out at some steps only"
RATES = dict.fromkeys(("rate", "rate:sequence"))


def refused(**says):
    """What a model does with every rule; those not named train it."""
    rates = says.pop("rates", True)
    return {rule: says.get(rule.partition(":")[0], rates if rule in RATES else True) for rule in RULES}


VERDICTS = {
    "vgg9": refused(
        ndot=r"behind the max pool of blocks\.1 \(and blocks\.3, blocks\.6\)",
        rates=r"the max pool of blocks\.1 \(and blocks\.3, blocks\.6\) is not linear in rates",
    ),
    "vgg9 avg": refused(),
    "har_mlp": refused(),
    "resnet19": refused(),
    "revsresnet21": refused(
        ottt=r"blocks\.0\.synapse\.weight \(and \d+ more\) is trained and belongs to no synapse",
        ndot=r"blocks\.0\.synapse\.weight \(and \d+ more\) is trained and belongs to no synapse",
        rates=r"blocks\.1 \(and 3 more\) is TwoStreams, which is not known to be linear in rates",
    ),
    "shared": refused(
        ottt="SpikingNetwork has share='layer', where no single leak leads",
        ndot="SpikingNetwork has share='layer', where no single leak leads",
        rates="SpikingNetwork has share='layer', where no single leak leads",
    ),
    "trevsnn images": refused(**dict.fromkeys(("sltt", "sltt_k", "ottt", "ndot", "tbptt", "rates"), LATE)),
    "trevsnn frames": refused(
        ottt=r"blocks\.1\.branches\.\S+ \(and \d+ more\) is trained and belongs to no synapse",
        ndot="TRevSNN is not run as a SpikingNetwork, so no one can tell which neuron a synapse reads from",
        rates="TRevSNN is not run as a SpikingNetwork, so no one can tell what is linear in rates",
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", MODELS)
def test_a_rule_trains_a_model_or_says_why_not(case, rule):
    name, options = MODELS[case]
    net, verdict = made(name, **options), VERDICTS[case][rule]
    x, driver = sequence(net), parse_driver(rule)
    loss = create_loss("ce_mean") if rule in RATES else TET
    if verdict is not True:
        with pytest.raises(StrategyError, match=verdict) as refusal:
            driver.run(net, x, Y, loss)
        assert str(refusal.value).startswith(f"rule {driver.rule.name}: ")
        assert all(p.grad is None for p in net.parameters())
        return
    assert driver.run(net, x, Y, loss).isfinite()
    found = {n: p.grad for n, p in net.named_parameters()}
    left_out = [n for n, g in found.items() if g is None]
    # every step of a T-RevSNN has weights of its own, and two of them call backward
    assert not left_out or (case, rule) == ("trevsnn frames", "sltt_k:2"), left_out
    reached = {n: g for n, g in found.items() if g is not None}
    assert all(g.isfinite().all() for g in reached.values())
    if not case.startswith("trevsnn"):
        assert all(g.norm() > 0 for n, g in reached.items() if n.endswith("weight"))
    assert sum(float(g.norm()) > 0 for g in reached.values()) > len(reached) / 2
