"""The two-group neuron: its options, its place in units, and what is refused around it."""

import pytest
import torch

from spikefit.errors import OptionError, ShapeError
from spikefit.layers import SpikingConv2d, SpikingLinear
from spikefit.models import create_model
from spikefit.neurons import NEURONS, TwoGroupNode, create_neuron, reversing
from spikefit.ops.dispatch import use_backend
from spikefit.ops.node import reference
from spikefit.ops.node.equation import TwoGroups
from spikefit.ops.surrogate import atan
from spikefit.training import Recipe
from support import dyadic


def test_the_table_makes_it_with_its_options():
    assert NEURONS["two_group"] is TwoGroupNode
    node = create_neuron("two_group")
    assert (node.alpha, node.beta, node.kappa, node.v_threshold, node.v_reset) == (0.4, 0.5, 0.5, 1.0, 0.0)
    assert (node.detach_reset, str(node.surrogate), node.check) == (False, "atan(2)", "spikes")
    assert node.coefficients() == (0.5, 0.5)
    soft = create_neuron("two_group", alpha=0.3, v_reset="soft", detach_reset=True, check="off")
    assert repr(soft).endswith("check=off)")
    assert "check" not in repr(node)
    assert "alpha=0.3, beta=0.5, kappa=0.5" in repr(soft)
    assert "reset soft, detached" in repr(soft)
    assert soft.node() == TwoGroups.make(
        alpha=0.3, beta=0.5, kappa=0.5, v_threshold=1.0, v_reset=None, detach_reset=True, surrogate=atan(2)
    )
    assert node.state_dict() == {}


@pytest.mark.parametrize("v_reset", [0.0, 0.3, "soft"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_runs_its_equation_and_pieces_equal_one_call(backend, v_reset):
    node = TwoGroupNode(alpha=0.375, v_reset=v_reset, backend=backend)
    x, v_0 = dyadic(6, 2, 4, 3, 3, high=3.0), dyadic(2, 4, 3, 3, seed=1)
    y, v_T = node(x, v_0)
    wanted = reference.two_group(x, v_0, node.node())
    assert torch.equal(y, wanted[0])
    assert torch.equal(v_T, wanted[1])
    first, v = node(x[:2], v_0)
    second, v = node(x[2:], v)
    assert torch.equal(torch.cat([first, second]), y)
    assert torch.equal(v, v_T)
    assert not ((y == 0) | (y == 1)).all(), "outputs are real numbers"


@pytest.mark.parametrize("norm", ["bn", "step_bn", "none"])
def test_in_units(norm):
    for unit, x in (
        (SpikingConv2d(3, 8, norm=norm, neuron="two_group", pool="avg"), torch.randn(3, 2, 3, 6, 6)),
        (SpikingLinear(5, 8, norm=norm, neuron={"name": "two_group", "v_reset": "soft"}), torch.randn(3, 2, 5)),
    ):
        state, _ = unit.init_state(2, tuple(x.shape[2:]))
        gradients = []
        for setting in (None, "streamlined", "generic"):
            unit.zero_grad()
            if setting is None:
                y, v_T = unit(x, state)
            else:
                with reversing(setting, anchor_every=2):
                    y, v_T = unit(x, state)
            (y.square().sum() + v_T.sum()).backward()
            gradients.append([p.grad.clone() for p in unit.parameters()])
        assert v_T.shape == state.shape
        for got in gradients[1:]:
            for a, b in zip(got, gradients[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["vgg6", "resnet19"])
def test_in_models_on_both_backends(name):
    options = {"width": 0.125, "input_shape": (3, 16, 16), "neuron": "two_group"}
    logits = []
    for backend in ("reference", "auto"):
        torch.manual_seed(0)
        model = create_model(name, **options)
        with use_backend(backend):
            logits.append(model(torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))))
    assert torch.equal(*logits)
    assert logits[0].std() > 0


def test_in_recipes():
    recipe = Recipe.model_validate({"model": {"name": "vgg6"}, "neuron": {"name": "two_group", "alpha": 0.3}})
    made = create_neuron("two_group", **recipe.neuron.options())
    assert repr(made) == repr(TwoGroupNode(alpha=0.3))
    assert recipe.override({"neuron": "lif"}).neuron.options().keys().isdisjoint({"alpha", "beta", "kappa", "check"})
    with pytest.raises(ValueError, match="alpha must be at most kappa"):
        Recipe.model_validate({"model": {"name": "vgg6"}, "neuron": {"name": "two_group", "alpha": 0.9}})
    with pytest.raises(ValueError, match="neuron two_group: unknown option strict; known: alpha"):
        Recipe.model_validate({"model": {"name": "vgg6"}, "neuron": {"name": "two_group", "strict": True}})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TwoGroupNode(alpha=0.6), OptionError, "alpha must be at most kappa, here 0.5, got 0.6"),
        (lambda: TwoGroupNode(alpha=0), OptionError, r"alpha must lie in \(0, kappa\]"),
        (lambda: TwoGroupNode(beta=0.0), OptionError, "beta must not be 0"),
        (lambda: TwoGroupNode(check="spot"), OptionError, "check must be one of off, spikes, got 'spot'"),
        (lambda: TwoGroupNode(v_reset="hard"), OptionError, "v_reset must be a number, None or 'soft', got 'hard'"),
        (lambda: TwoGroupNode(v_threshold=-1.0), OptionError, "v_threshold must be a finite number > 0"),
        (lambda: create_neuron("two_group", tau=2.0), OptionError, "two_group: unknown option tau; known: alpha, "),
        (lambda: create_neuron("two_group", v_rest=0.5), OptionError, "unknown option v_rest"),
        (lambda: create_neuron("two_group", frac_bits=16), OptionError, "unknown option frac_bits"),
        (lambda: SpikingLinear(4, 5, neuron="two_group").init_state(1, (4,)), ShapeError, "even number.*got 5"),
        (lambda: SpikingLinear(4, 5, neuron="two_group")(torch.randn(2, 1, 4)), ShapeError, "even number.*got 5"),
        (
            lambda: create_model("vgg6", neuron="two_group", share="channel", groups=2),
            OptionError,
            "blocks.0.*TwoGroupNode drive each other.*share='none'",
        ),
        (
            lambda: create_model("resnet19", neuron="two_group", share="layer"),
            OptionError,
            "TwoGroupNode drive each other",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
