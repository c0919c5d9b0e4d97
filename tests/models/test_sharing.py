"""Networks that share membranes: sizes, stages, state, presets, and a refusal with the way out for every misuse."""

import copy
import json

import pytest
import torch

from spikefit.errors import OptionError, RangeError, ShapeError, StateError, StrategyError
from spikefit.layers import (
    BatchNorm,
    Flatten,
    GlobalAveragePool,
    Readout,
    ResidualBlock,
    SpikingConv2d,
    SpikingLinear,
)
from spikefit.models import SpikingNetwork, create_model, use_strategy
from spikefit.neurons import LIF, SpikingNeuron
from spikefit.planning import plan
from spikefit.training import build_model, load_recipe

SHARES = {"none": 1, "layer": 1, "channel": 2, "layer_channel": 2}
SMALL = {
    "vgg16": {"width": 1 / 32, "input_shape": (3, 16, 16)},
    "resnet19": {"width": 1 / 32, "input_shape": (3, 8, 8)},
    "har_mlp": {"hidden": 16},
}


def small(name, share, **options):
    torch.manual_seed(0)
    options = {"share": share, "groups": SHARES[share], **SMALL[name], **options}
    return create_model(name, **options)


def sequence(model, T=4, B=3):
    torch.manual_seed(1)
    return torch.randn(T, B, *model.input_shape)


def stages(name, **options):
    with torch.device("meta"):
        return create_model(name, share="layer", **options).stages


@pytest.mark.parametrize(("share", "groups"), [("none", 1), ("layer", 1), ("channel", 4), ("layer_channel", 2)])
@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet19", {}, 26_108_042),
        ("resnet19", {"num_classes": 100}, 26_154_212),
        ("resnet19", {"input_shape": (2, 32, 32)}, 26_106_890),
        ("resnet19", {"widths": "narrow"}, 12_585_866),
        ("resnet19", {"widths": "narrow", "num_classes": 100}, 12_632_036),
        ("resnet19", {"widths": "narrow", "input_shape": (2, 32, 32)}, 12_584_714),
        ("vgg16", {}, 14_910_346),
        ("vgg16", {"num_classes": 100}, 14_956_516),
        ("vgg16", {"widths": "base"}, 15_795_594),
        ("vgg16", {"widths": "base", "num_classes": 100}, 15_841_764),
    ],
)
def test_sharing_adds_no_parameters(name, options, parameters, share, groups):
    with torch.device("meta"):
        model = create_model(name, share=share, groups=groups, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parameters_of_every_stage_of_resnet19():
    for widths, wanted in (("wide", (3_280_384, 13_114_368, 9_704_448)), ("narrow", (902_912, 3_280_384, 8_393_728))):
        with torch.device("meta"):
            model = create_model("resnet19", widths=widths, share="layer")
        counts = [
            sum(p.numel() for block in model.blocks[first : last + 1] for p in block.parameters())
            for first, last in model.stages
        ]
        assert counts == [3_712, *wanted]
        assert sum(p.numel() for p in model.blocks[-1].parameters()) == 5_130


@pytest.mark.parametrize("name", SMALL)
def test_weights_move_from_one_sharing_to_another(name):
    models = {share: small(name, share, norm="step_bn") for share in SHARES}
    keys = set(models["none"].state_dict())
    x, outputs = sequence(models["none"]), {}
    with torch.no_grad():
        for p in models["none"].parameters():
            p.add_(0.05 * torch.randn(p.shape))
        for share, model in models.items():
            assert set(model.state_dict()) == keys
            model.load_state_dict(models["none"].state_dict())
            outputs[share] = model(x)
    # the membrane is another one, so the results are
    different = [a for a in outputs if not any(torch.equal(outputs[a], outputs[b]) for b in outputs if b != a)]
    assert different == list(SHARES)


def test_stages_of_the_networks():
    assert stages("vgg16") == [(0, 0), (1, 1), (2, 3), (4, 6), (7, 9), (10, 12)]
    assert stages("vgg16", merge_first=True) == [(0, 1), (2, 3), (4, 6), (7, 9), (10, 12)]
    # 13 convolutions and their pools: base widths change nothing about the stages
    assert stages("vgg16", widths="base") == stages("vgg16")
    assert stages("resnet19") == [(0, 0), (1, 3), (4, 6), (7, 8)]
    assert stages("har_mlp") == [(0, 0), (1, 3)]
    assert stages("har_mlp", layers=1) == [(0, 0)]
    with torch.device("meta"):
        layers = [len(stage.layers) for stage in create_model("resnet19", share="layer").chain[:4]]
    assert layers == [1, 6, 6, 4]
    for share in ("none", "channel"):
        model = small("vgg16", share)
        assert model.stages == []
        assert model.chain == list(model.blocks)


@pytest.mark.parametrize("name", SMALL)
def test_groups_are_those_of_every_neuron(name):
    for share, groups in SHARES.items():
        model = small(name, share)
        found = [m.groups for m in model.modules() if isinstance(m, SpikingNeuron)]
        assert set(found) == {groups}
        assert len(found) == {"vgg16": 13, "resnet19": 17, "har_mlp": 4}[name]
        assert (model.share, model.groups) == (share, groups)


def leaves(state):
    if isinstance(state, tuple):
        return [leaf for entry in state for leaf in leaves(entry)]
    return [] if state is None else [state]


def test_one_membrane_per_stage_and_group():
    # shapes of one sample: stem, then the three stages
    shapes = {
        "none": [(4, 8, 8), *[(8, 4, 4)] * 6, *[(16, 2, 2)] * 6, *[(16, 1, 1)] * 4],
        "layer": [(4, 8, 8), (8, 4, 4), (16, 2, 2), (16, 1, 1)],
        "channel": [(2, 8, 8), *[(4, 4, 4)] * 6, *[(8, 2, 2)] * 6, *[(8, 1, 1)] * 4],
        "layer_channel": [(2, 8, 8), (4, 4, 4), (8, 2, 2), (8, 1, 1)],
    }
    for share, wanted in shapes.items():
        model = small("resnet19", share).eval()
        state = model.init_state(5)
        assert [tuple(v.shape) for v in leaves(state)] == [(5, *shape) for shape in wanted]
        _, after = model.step(torch.randn(5, 3, 8, 8), state)
        assert [tuple(v.shape) for v in leaves(after)] == [(5, *shape) for shape in wanted]
        assert {v.dtype for v in leaves(model.double().init_state(1))} == {torch.float64}
        assert {v.dtype for v in leaves(model.bfloat16().init_state(1))} == {torch.float32}
        # other sides than the network was made for
        assert leaves(model.init_state(1, (3, 16, 16)))[1].shape == (1, wanted[1][0], 8, 8)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SMALL)
def test_steps_equal_one_call_bit_for_bit(name, share, training):
    model = small(name, share, norm="step_bn")
    x = sequence(model, T=3)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = None  # one pass gives running statistics with which neurons fire
    with torch.no_grad():
        model(x)
    model.train(training)
    with torch.no_grad():
        whole, again = model(x), model(x)
        # nothing is left behind: a second sequence starts from zero
        assert torch.equal(again, whole)
        state, steps = model.init_state(3), []
        for x_t in x:
            logits, state = model.step(x_t, state)
            steps.append(logits)
        half, middle = model.run(x[:2], model.init_state(3))
        rest, last = model.run(x[2:], middle)
    assert whole.std() > 1e-3
    assert not torch.equal(whole[0], whole[-1])
    assert torch.equal(torch.stack(steps), whole)
    assert torch.equal(torch.cat([half, rest]), whole)
    assert all(torch.equal(a, b) for a, b in zip(leaves(last), leaves(state), strict=True))


@pytest.mark.parametrize("share", SHARES)
def test_two_sequences_do_not_influence_each_other(share):
    """Neither two that follow, nor two in one batch, nor two that take turns step by step."""
    model = small("har_mlp", share, norm="ws")
    a, b = sequence(model, T=6, B=2).unbind(1)
    with torch.no_grad():
        alone = model(a[:, None])
        model(100 * b[:, None])
        assert torch.equal(model(a[:, None]), alone)
        torch.testing.assert_close(model(torch.stack([a, b], 1))[:, :1], alone)
        one, two, got = model.init_state(1), model.init_state(1), []
        for a_t, b_t in zip(a, b, strict=True):
            logits, one = model.step(a_t[None], one)
            _, two = model.step(b_t[None], two)
            got.append(logits)
    assert torch.equal(torch.stack(got), alone)


@pytest.mark.parametrize("name", SMALL)
def test_defaults_of_norm_and_strategy(name):
    for share in SHARES:
        model = small(name, share)
        per_step = share in ("layer", "layer_channel")
        assert {m.time_scope for m in model.modules() if hasattr(m, "time_scope")} == {
            "step" if per_step else "sequence"
        }
        assert str(model.strategy) == ("bptt" if share == "none" else "replay")
        assert str(small(name, share, strategy="bptt").strategy) == "bptt"


def test_preset():
    for share in SHARES:
        model = small("vgg16", share, preset="efficientlif")
        neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron)]
        assert {type(n) for n in neurons} == {LIF}
        for neuron in neurons:
            leak, gain = neuron.coefficients()
            assert (leak, gain) == (pytest.approx(0.25), pytest.approx(0.75))
            assert (neuron.v_threshold, neuron.v_reset, neuron.detach_reset) == (1.0, None, True)
            assert str(neuron.surrogate) == "atan(2)"
            assert neuron.groups == SHARES[share]
        assert {m.time_scope for m in model.modules() if hasattr(m, "time_scope")} == {"step"}
    # what is written wins: the hard baseline, and another norm
    hard = {"name": "lif", "tau": 4 / 3, "decay_input": True, "v_reset": 0.0}
    model = small("resnet19", "none", preset="efficientlif", neuron=hard, norm="tdbn")
    assert {m.v_reset for m in model.modules() if isinstance(m, SpikingNeuron)} == {0.0}
    assert {m.time_scope for m in model.modules() if hasattr(m, "time_scope")} == {"sequence"}
    with pytest.raises(
        OptionError, match=r"preset: expected one of efficientlif, .*got 'eficientlif'.*Did you mean efficientlif"
    ):
        create_model("vgg16", preset="eficientlif")


def test_preset_with_gain_one():
    """The same neuron and norm but for the factor on the input."""
    plain, scaled = (
        small("har_mlp", "layer", preset=name).blocks[1] for name in ("efficientlif_gain1", "efficientlif")
    )
    assert plain.neuron.coefficients() == (pytest.approx(0.25), 1.0)
    assert {**plain.neuron.options(), "gain": 0} == {**scaled.neuron.options(), "gain": 0}
    assert type(plain.norm) is type(scaled.norm)
    assert plain.norm.time_scope == "step"


def test_preset_and_sharing_in_a_recipe():
    model = {"name": "har_mlp", "hidden": 16, "num_classes": 3, "input_shape": [9], "share": "layer_channel"}
    values = {"model": {**model, "groups": 2, "preset": "efficientlif"}, "strategy": {"name": "inverse"}}
    values |= {"encoding": {"name": "sequence"}}
    made = build_model(load_recipe(values))
    assert (made.share, made.groups, made.stages) == ("layer_channel", 2, [(0, 0), (1, 3)])
    assert str(made.strategy) == "inverse"
    assert {m.coefficients() for m in made.modules() if isinstance(m, SpikingNeuron)} == {(0.25, 0.75)}
    written = json.loads(json.dumps(load_recipe(values).to_dict()))
    assert "preset" not in written["model"]
    assert load_recipe(written).to_dict() == written
    wins = build_model(load_recipe({**values, "neuron": {"name": "lif", "tau": 10.0}, "norm": {"name": "ws"}}))
    assert {round(m.coefficients()[0], 6) for m in wins.modules() if isinstance(m, SpikingNeuron)} == {0.9}
    assert "strategy" not in values["model"]
    del values["strategy"]
    assert str(build_model(load_recipe(values)).strategy) == "replay"


@pytest.mark.parametrize("shares", [("none", "channel"), ("channel", "none")])
def test_networks_of_the_same_blocks_do_not_change_each_other(shares):
    first = small("har_mlp", shares[0], norm="step_bn", strategy="bptt")
    x, groups = sequence(first), [SHARES[share] for share in shares]
    wanted = first(x)
    assert torch.equal(SpikingNetwork(first.blocks, input_shape=(9,), share=shares[0], groups=groups[0])(x), wanted)

    def second(blocks):
        return SpikingNetwork(blocks, input_shape=(9,), share=shares[1], groups=groups[1], strategy="bptt")

    if shares[0] == "none":
        second(copy.deepcopy(first.blocks))
        assert torch.equal(first(x), wanted)
        other = second(first.blocks)
        with pytest.raises(
            OptionError, match=r"made with groups=1, and blocks\.0 now has groups=2, .*copy\.deepcopy\(blocks\)"
        ):
            first(x)
        assert not torch.equal(other(x), wanted)
    else:
        with pytest.raises(OptionError, match=r"got blocks\.0 with groups=2, which another network may use"):
            second(first.blocks)
        assert torch.equal(first(x), wanted)


def test_a_network_that_is_refused_leaves_its_blocks_alone():
    blocks = convs(SpikingConv2d(8, 8, stride=2, norm="step_bn"))
    with pytest.raises(OptionError, match="one shape"):
        chain(*blocks, share="layer_channel", groups=2, stages=[(0, 2)])
    assert {m.groups for m in chain(*blocks).modules() if isinstance(m, SpikingNeuron)} == {1}


def chain(*blocks, **options):
    return SpikingNetwork(blocks, input_shape=(3, 8, 8), **options)


def convs(second):
    first = SpikingConv2d(3, 8, norm="step_bn")
    return [first, SpikingConv2d(8, 8, norm="step_bn"), second, GlobalAveragePool(), Readout(second_width(second), 3)]


def second_width(unit):
    return int(unit.synapse.weight.shape[0])


def stepped(share, change, **options):
    """A step from a state that `change` made of the right one."""
    model = small("har_mlp", share, **options).eval()
    state = model.init_state(2)
    return model.step(torch.randn(2, 9), (state[0], change(state[1]), *state[2:]))


def large(share, strategy):
    """A step of a network on a grid whose membranes leave it."""
    model = small("har_mlp", share, neuron={"name": "lif", "frac_bits": 20}, norm="none", strategy=strategy)
    with torch.no_grad():
        model.blocks[2].synapse.bias.add_(100)
    return model(torch.randn(2, 2, 9))


def residual(share, neuron, **options):
    """A network of two residual blocks, whose layers have names of their own."""
    blocks = [SpikingConv2d(3, 8, norm="step_bn"), *(ResidualBlock(8, 8, norm="step_bn") for _ in range(2))]
    blocks[2].second.neuron = LIF(**neuron)
    return chain(*blocks, GlobalAveragePool(), Readout(8, 3), share=share, stages=[(1, 2)], **options)


HARD = {"name": "lif", "v_reset": 0.0}
# error, what the message must say, call
BAD_INPUT = {
    "channels that groups do not divide": (
        OptionError,
        r"blocks\.0: its 16 channels \(divisors: 2, 4, 8, 16\) .*groups=3; .*'none' and 'layer' take 1\.",
        lambda: small("har_mlp", "channel", groups=3),
    ),
    "channels of one layer that groups do not divide": (
        OptionError,
        r"blocks\.1\.first: its 10 channels \(divisors: 2, 5, 10\) .*groups=4; .*another width",
        lambda: chain(SpikingConv2d(3, 8), ResidualBlock(8, 10), share="channel", groups=4),
    ),
    "one channel": (
        OptionError,
        r"blocks\.0: its 1 channels .*there is none",
        lambda: small("har_mlp", "channel", hidden=1),
    ),
    **{
        f"groups={groups!r} with {share}": (
            OptionError,
            rf"share='{share}' takes groups={wanted}(, .*)?, got {groups!r}; blocks\.0 has 4 channels "
            r"\(divisors: 2, 4\)\. share='channel' and 'layer_channel' take groups=2 or more, 'none'",
            lambda share=share, groups=groups: small("vgg16", share, groups=groups),
        )
        for share, wanted, values in (
            ("none", "1", (0, -1, 2, 1.0, True)),
            ("layer", "1", (0, 2)),
            ("channel", "2 or more", (1, 0, -2, 2.0, True)),
            ("layer_channel", "2 or more", (1, 0)),
        )
        for groups in values
    },
    "layers of one membrane that differ in channels": (
        OptionError,
        r"blocks\.1-2: .*one shape, got blocks\.1 8x8x8, blocks\.2 4x8x8\..*share='channel', or split the stage",
        lambda: chain(*convs(SpikingConv2d(8, 4, norm="step_bn")), share="layer", stages=[(1, 2)]),
    ),
    "layers of one membrane that differ in side": (
        OptionError,
        r"blocks\.0-2: .*one shape, got .*8x8x8.*8x8x8.*8x4x4.*split the stage",
        lambda: chain(*convs(SpikingConv2d(8, 8, stride=2, norm="step_bn")), share="layer", stages=[(0, 2)]),
    ),
    "a state of other membranes": (
        StateError,
        r"blocks\.1: lif: expected a membrane \(2, 8\) torch\.float32 on cpu, got \(2, 16\)",
        lambda: stepped("layer_channel", lambda v: torch.cat([v, v], 1)),
    ),
    "a state of another dtype": (
        StateError,
        r"blocks\.1: lif: expected a membrane \(2, 16\) torch\.float32 on cpu, got \(2, 16\) torch\.float64",
        lambda: stepped("layer", lambda v: v.double()),
    ),
    "a state on another device": (
        StateError,
        r"blocks\.1: lif: expected a membrane \(2, 8\) torch\.float32 on cpu, got \(2, 8\) torch\.float32 on meta",
        lambda: stepped("channel", lambda v: v.to("meta")),
    ),
    **{
        f"a state of another shape under {strategy}": (
            StateError,
            r"blocks\.1: lif: expected a membrane \(2, 16\) torch\.float32 on cpu, got \(3, 16\)",
            lambda strategy=strategy: stepped("none", lambda v: torch.zeros(3, 16), strategy=strategy, norm="step_bn"),
        )
        for strategy in ("bptt", "checkpoint:1", "checkpoint:2", "replay", "inverse")
    },
    **{
        f"a {kind} as membrane under {strategy}": (
            StateError,
            rf"blocks\.1-3: expected a membrane as a tensor, got {kind}\. Pass what the last call returned",
            lambda strategy=strategy, value=value: stepped("layer", lambda v: value, strategy=strategy),
        )
        for strategy in ("bptt", "replay", "inverse")
        for kind, value in (("list", [0.0]), ("str", "zeros"))
    },
    "a state of one membrane per layer": (
        StateError,
        r"blocks\.1-3: expected a state of 1 membranes, got 2.*init_state\(2\)",
        lambda: stepped("layer", lambda v: (v, v)),
    ),
    "the state of another sharing": (
        StateError,
        r"expected a state of 3 entries, got 5.*init_state",
        lambda: small("har_mlp", "layer").eval().step(torch.randn(2, 9), small("har_mlp", "none").init_state(2)),
    ),
    "an image without time": (
        ShapeError,
        r"\[T, B, 3, 16, 16\], got \(2, 3, 16, 16\).*encoding\.repeat\(x, timesteps=T\)",
        lambda: small("vgg16", "layer")(torch.rand(2, 3, 16, 16)),
    ),
    "frames of another kind": (
        ShapeError,
        r"\[T, B, 3, 16, 16\], got \(4, 2, 2, 16, 16\).*3 channels",
        lambda: small("vgg16", "layer")(torch.rand(4, 2, 2, 16, 16)),
    ),
    "time that is not first": (
        ShapeError,
        r"\[T, B, 9\], got \(4, 9, 128\)\..*x\.permute\(2, 0, 1\)",
        lambda: small("har_mlp", "layer")(torch.rand(4, 9, 128)),
    ),
    "another T than the network consumes": (
        ShapeError,
        r"made for T = 16, got T = 15",
        lambda: create_model("har_conv", timesteps=16, widths=[8], share="channel", groups=2)(torch.rand(15, 2, 9)),
    ),
    **{
        f"{strategy} with a hard reset": (
            StrategyError,
            rf"blocks\.0.*{strategy} undoes .*erases u.*v_reset='soft' \(None in Python\), or strategy='replay'",
            lambda strategy=strategy: small("vgg16", "layer", neuron=HARD, strategy=strategy),
        )
        for strategy in ("inverse", "integer")
    },
    "inverse without a reset": (
        StrategyError,
        r"blocks\.0.*undoes a soft reset",
        lambda: small("har_mlp", "layer", neuron={"name": "lif", "reset": False}, strategy="inverse"),
    ),
    "a leak of zero": (
        StrategyError,
        r"blocks\.0.*inverse divides by the leak, which is 0; use strategy='replay'",
        lambda: small("har_mlp", "layer", neuron={"name": "lif", "tau": 1.0}, strategy="inverse"),
    ),
    "a leak beyond its range": (
        OptionError,
        r"tau must be at least 1 step .*got 0\.5",
        lambda: small("har_mlp", "layer", neuron={"name": "lif", "tau": 0.5}),
    ),
    "a leak that is learnt": (
        StrategyError,
        r"blocks\.0.*this neuron learns it; use strategy='replay'",
        lambda: small("har_mlp", "layer", neuron="plif", strategy="inverse"),
    ),
    "a grid whose leak is no power of two": (
        OptionError,
        r"leak = 1/2, 1/4, 1/8.*got leak=0\.9",
        lambda: small("har_mlp", "layer", neuron={"name": "lif", "tau": 10.0, "frac_bits": 16}),
    ),
    "integer without a grid": (
        StrategyError,
        r"blocks\.0.*floating point; give the neuron a grid, frac_bits=16 .*or use strategy='replay'",
        lambda: small("har_mlp", "layer", strategy="integer"),
    ),
    "integer with more digits than a byte holds": (
        StrategyError,
        r"blocks\.0.*leak >= 1/256, got 0\.00195312.*'replay'",
        lambda: small(
            "har_mlp", "layer", neuron={"name": "lif", "tau": 512 / 511, "frac_bits": 16}, strategy="integer"
        ),
    ),
    "a grid with inverse": (
        StrategyError,
        r"blocks\.0.*digits that a membrane on a grid loses \(frac_bits=16\); use strategy='integer'",
        lambda: small("har_mlp", "layer", neuron={"name": "lif", "frac_bits": 16}, strategy="inverse"),
    ),
    **{
        f"a membrane that leaves its grid, {share}, {strategy}": (
            RangeError,
            r"blocks\.2: lif: expected membranes below 8.*lower frac_bits",
            lambda share=share, strategy=strategy: large(share, strategy),
        )
        for share in ("none", "layer")
        for strategy in ("bptt", "replay", "integer")
    },
    "a reset inside a block of a stage": (
        StrategyError,
        r"^blocks\.2\.second: inverse undoes a soft reset",
        lambda: residual("layer", {"v_reset": 0.0}, strategy="inverse"),
    ),
    "a leak inside a block of a stage": (
        StrategyError,
        r"^blocks\.1\.first and blocks\.2\.second: inverse undoes .*leak=0\.5, .*leak=0\.75",
        lambda: residual("layer", {"tau": 4.0}, strategy="inverse"),
    ),
    "a bound that is passed": (
        StrategyError,
        r"blocks\.0: .*leak=0\.25, .*up to 8 .*0\.0026 .*largest safe anchor_every is 6 .*'replay'",
        lambda: small("har_mlp", "layer", preset="efficientlif", strategy="inverse:7"),
    ),
    "half precision": (
        StrategyError,
        r"blocks\.0.*inverse needs float32 or float64, got torch\.bfloat16; use autocast .*'replay'",
        lambda: use_strategy(small("har_mlp", "layer").bfloat16(), "inverse"),
    ),
    "a norm over the sequence": (
        OptionError,
        r"share='layer' runs step by step, and blocks\.0\.norm needs .*norm='step_bn' .*or share='channel'",
        lambda: small("vgg16", "layer", norm="bn"),
    ),
    "inverse with a norm over the sequence": (
        StrategyError,
        r"blocks\.0.*inverse runs backwards step by step.*norm='step_bn' .*or strategy='replay'",
        lambda: small("vgg16", "channel", strategy="inverse"),
    ),
    "an unknown share": (
        OptionError,
        r"share must be one of none, layer, channel, layer_channel, got 'layers'",
        lambda: create_model("vgg16", share="layers"),
    ),
    "an unknown strategy": (
        StrategyError,
        r"expected one of bptt, .*replay, inverse, integer, .*got 'inverted'.*Did you mean inverse",
        lambda: small("vgg16", "layer", strategy="inverted"),
    ),
    "an unknown reset": (
        OptionError,
        r"v_reset must be a finite number or None, got 'hard'.*soft",
        lambda: small("vgg16", "layer", neuron={"name": "lif", "v_reset": "hard"}),
    ),
    "an unknown surrogate": (
        OptionError,
        r"expected one of atan, triangle, .*got 'arctan\(2\)'; did you mean atan",
        lambda: small("vgg16", "layer", neuron={"name": "lif", "surrogate": "arctan(2)"}),
    ),
    "merge_first without stages": (
        OptionError,
        r"merge_first joins stages .*got share='channel'",
        lambda: small("vgg16", "channel", merge_first=True),
    ),
    "groups as an option of the neuron": (
        OptionError,
        r"unknown option groups",
        lambda: small("vgg16", "none", neuron={"name": "lif", "groups": 2}),
    ),
    **{
        f"strategy {text}": (StrategyError, told, lambda text=text: small("har_mlp", "layer", strategy=text))
        for text, told in {
            "replay:3": r"replay: takes no option, got '3'",
            "integer:16": r"integer: takes no option, got '16'",
            "inverse:0": r"1 or more.*inverse:6,0\.01, got '0'",
            "inverse:six": r"got 'six'",
            "inverse:6,0": r"got '6,0'",
            "inverse:6,nan": r"got '6,nan'",
            "inverse:6,0.01,3": r"got '6,0\.01,3'",
        }.items()
    },
    "layer sharing without stages": (
        OptionError,
        r"share='layer' needs stages .*share='channel', or give stages=\[\(first, last\)",
        lambda: chain(*convs(SpikingConv2d(8, 8, norm="step_bn")), share="layer"),
    ),
    "layer sharing over time": (
        OptionError,
        r"har_conv: .*cannot share a membrane, got share='layer'; use share='channel', or model har_mlp",
        lambda: create_model("har_conv", timesteps=16, widths=[8, 8], share="layer"),
    ),
    **{
        f"stages with share={share}": (
            OptionError,
            rf"stages are those of share='layer' and 'layer_channel', got stages=\[\(0, 1\)\] with share='{share}'",
            lambda share=share, groups=groups: chain(
                *convs(SpikingConv2d(8, 8)), share=share, groups=groups, stages=[(0, 1)]
            ),
        )
        for share, groups in (("none", 1), ("channel", 2))
    },
    **{
        f"a neuron with groups of its own, share={share}": (
            OptionError,
            rf"without groups, as this network has groups={groups}, got blocks\.2 with groups=4, .*build new blocks",
            lambda share=share, groups=groups: chain(
                *convs(SpikingConv2d(8, 8, neuron=LIF(groups=4))), share=share, groups=groups
            ),
        )
        for share, groups in (("none", 1), ("channel", 2))
    },
    "lean": (
        StrategyError,
        r"lean: the layers of blocks\.1-3 share a membrane.*use strategy='replay'",
        lambda: small("har_mlp", "layer", strategy="lean"),
    ),
    "lean with groups": (
        StrategyError,
        r"lean: the layers of blocks\.0 share a membrane.*use strategy='replay'",
        lambda: small("har_mlp", "channel", strategy="lean:spikes"),
    ),
    "a plan": (
        StrategyError,
        r"share a membrane.*use strategy='replay'",
        lambda: plan(small("har_mlp", "layer"), sequence(small("har_mlp", "layer")), budget=None),
    ),
    "a plan with groups": (
        StrategyError,
        r"share a membrane.*use strategy='replay'",
        lambda: plan(small("har_mlp", "channel"), sequence(small("har_mlp", "channel")), budget=None),
    ),
    "nothing that is known": (
        StrategyError,
        r"replay: the network has no block of neurons .*use strategy='bptt'",
        lambda: chain(Flatten(), Readout(192, 3), strategy="replay"),
    ),
    "a neuron with a forward of its own": (
        StrategyError,
        r"blocks\.0.*Own has a forward of its own, which replay cannot rebuild; use strategy='bptt'",
        lambda: SpikingNetwork([SpikingLinear(4, 4, neuron=Own()), Readout(4, 2)], input_shape=(4,), strategy="replay"),
    ),
}


class Own(LIF):
    def forward(self, x, v_0=None):
        return super().forward(2 * x, v_0)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_refuses(case):
    error, told, call = BAD_INPUT[case]
    with pytest.raises(error, match=told):
        call()


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([(2, 1)], r"got \(2, 1\)"),
        ([(0, 5)], r"blocks 0 to 4, got \(0, 5\)"),
        ([(-1, 1)], r"got \(-1, 1\)"),
        ([(0, 1), (1, 2)], r"got \(1, 2\) behind \(0, 1\)"),
        ([(0, 2), (0, 2)], r"got \(0, 2\) behind \(0, 2\)"),
        ([(0, 3)], r"blocks\.3 \(GlobalAveragePool\) has no neurons"),
        ([3], "got 3"),
        ([(0.0, 1.0)], r"got \(0\.0, 1\.0\)"),
    ],
)
def test_stages_that_are_none_are_refused(stages, told):
    """Turned around, beyond the chain, overlapping, or with a block that has no neurons."""
    with pytest.raises(OptionError, match=f"SpikingNetwork: stages .*{told}"):
        chain(*convs(SpikingConv2d(8, 8, norm="step_bn")), share="layer", stages=stages)


def test_stages_in_any_order():
    model = chain(*convs(SpikingConv2d(8, 8, norm="step_bn")), share="layer", stages=[(2, 2), [0, 1]])
    assert [getattr(block, "name", None) for block in model.chain] == ["blocks.0-1", "blocks.2", None, None]


def test_a_refused_strategy_leaves_the_network_as_it_was():
    model = small("har_mlp", "layer")
    for strategy in ("lean", "integer", "inverse:100"):
        with pytest.raises(StrategyError):
            use_strategy(model, strategy)
    assert str(model.strategy) == "replay"
    model(sequence(model)).sum().backward()
