"""Networks of two-group nodes under every strategy: one gradient, less memory, and refusals where none applies."""

import pytest
import torch

from spikefit.engines import STRATEGIES, parse_strategy
from spikefit.errors import ReconstructionError, StrategyError
from spikefit.layers import GlobalAveragePool, Readout, SpikingConv2d
from spikefit.models import SpikingNetwork, create_model, use_strategy
from spikefit.ops.dispatch import use_backend
from spikefit.planning import profile, verify, watch_saved
from spikefit.planning.memory import predicted_bytes
from support import backends_called

CASES = {
    "vgg6": {"input_shape": (3, 8, 8), "width": 0.125},
    "resnet19": {"width": 0.0625, "input_shape": (3, 16, 16)},
}
REVERSED = ["streamlined", "streamlined:2", "streamlined:none", "generic", "generic:1"]


def network(strategy, name="vgg6", dtype=torch.float64, **neuron):
    torch.manual_seed(0)
    model = create_model(name, **CASES[name], neuron={"name": "two_group", **neuron})
    return use_strategy(model.to(dtype), strategy)


def step(strategy, name="vgg6", dtype=torch.float64, backend="auto", **neuron):
    """Output, gradients and buffers of one step from the same weights and batch."""
    model = network(strategy, name, dtype, **neuron)
    x = torch.randn(6, 3, *model.input_shape, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        logits = model(x)
    gradients = torch.autograd.grad(logits.square().mean(), [x, *model.parameters()])
    return logits.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["checkpoint", *REVERSED])
def test_matches_bptt(strategy, name):
    # statistics of norms in float64 are those of a backend to rounding only
    for backend in ("reference", "auto"):
        wanted, got = step("bptt", name, backend=backend), step(strategy, name, backend=backend)
        assert sum(float(g.abs().sum()) for g in wanted[1]) > 0
        assert torch.equal(got[0], wanted[0])
        for a, b in zip(got[1], wanted[1], strict=True):
            assert (a - b).abs().max() <= 1e-8 * max(1e-3, float(b.abs().max()))
        for key, buffer in wanted[2].items():
            torch.testing.assert_close(got[2][key], buffer)


@pytest.mark.parametrize("strategy", ["streamlined", "generic:2"])
def test_verify_compares_it_with_plain_bptt(strategy):
    model = network(strategy, dtype=torch.float32)
    verdict = verify(model, torch.randn(4, 2, 3, 8, 8), tolerance=1e-3)
    assert verdict.passed, verdict
    assert verdict.spikes_equal


def test_steps_fed_one_by_one_equal_one_call():
    model = network("streamlined", dtype=torch.float32).eval()
    x = torch.randn(5, 2, 3, 8, 8)
    state, logits = model.init_state(2), []
    for x_t in x:
        out, state = model.step(x_t, state)
        logits.append(out)
    assert torch.equal(torch.stack(logits), model(x))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_backward_needs_no_context(backend):
    model = network("streamlined", dtype=torch.float32)

    def run():
        with use_backend(backend):
            loss = model(torch.randn(4, 2, 3, 8, 8)).sum()
        loss.backward()

    assert backends_called(run, "two_group") == ({"numba"} if backend == "numba" else set())


def test_under_autocast_states_stay_float32():
    model = network("streamlined", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model.eval().run(torch.randn(4, 2, 3, 8, 8), model.init_state(2))
    assert {v.dtype for v in state if v is not None} == {torch.float32}
    logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def chain(units, strategy, reset):
    blocks = [SpikingConv2d(8 if i else 4, 8, neuron={"name": "two_group", **reset}) for i in range(units)]
    model = SpikingNetwork([*blocks, GlobalAveragePool(), Readout(8, 2)], input_shape=(4, 8, 8))
    return use_strategy(model, strategy)


@pytest.mark.parametrize("T", [4, 16])
def test_bytes_of_a_layer(T):
    """Of one more conv-norm-node layer, per neuron and step: 20 under bptt, 8 + 4 ceil(T / K) / T under streamlined."""
    held = {}
    for strategy in ("bptt", "streamlined", "streamlined:2"):
        counts = []
        for units in (2, 3):
            model = chain(units, strategy, {})
            with use_backend("reference"), watch_saved(model) as saved:
                model(torch.randn(T, 2, 4, 8, 8))
            counts.append(saved.total)
        # statistics of a norm are a few numbers per channel
        held[strategy] = (counts[1] - counts[0]) / (T * 2 * 8 * 64)
    assert held["bptt"] == pytest.approx(20, rel=0.01)
    assert held["streamlined"] == pytest.approx(8 + 4 * -(-T // 4) / T, rel=0.01)
    assert held["streamlined:2"] == pytest.approx(8 + 4 * -(-T // 2) / T, rel=0.01)


def test_predictions_know_the_strategy():
    x, y = torch.randn(8, 2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    saved = {}
    for strategy in ("bptt", "streamlined", "generic"):
        model = network(strategy, dtype=torch.float32)
        assert predicted_bytes(model, x, y).peak > 0
        saved[strategy] = profile(model, x, predict_only=True)
    assert saved["streamlined"].saved_bytes == saved["generic"].saved_bytes < saved["bptt"].saved_bytes
    # what these strategies would hold is computed for neurons that they can rebuild
    kept = saved["bptt"].lif_backward_kept_bytes
    assert (kept["replay"], kept["inverse"], kept["integer"]) == (None, None, None)


def test_options():
    assert str(parse_strategy({"name": "streamlined", "anchor_every": 8})) == "streamlined:8"
    assert str(parse_strategy({"name": "generic", "anchor_every": "none"})) == "generic:none"
    for name in ("streamlined", "generic"):
        assert not STRATEGIES[name].exact
        for wrong in ("0", "-1", "2.5", "all"):
            with pytest.raises(StrategyError, match=rf"strategy {name}: .*1 or more, or 'none'.*got '{wrong}'"):
                parse_strategy(f"{name}:{wrong}")


@pytest.mark.parametrize("name", ["streamlined", "generic"])
def test_a_network_without_a_two_group_node_is_refused(name):
    with pytest.raises(StrategyError, match=f"strategy {name}: the network has no two-group node.*neuron='two_group'"):
        create_model("vgg6", strategy=name)


@pytest.mark.parametrize("name", ["lean", "lean:input", "replay", "inverse", "integer"])
def test_strategies_that_rebuild_spikes_refuse_the_node_by_name(name):
    with pytest.raises(StrategyError, match=r"TwoGroupNode has a forward of its own.*use strategy='bptt'"):
        network(name, dtype=torch.float32)(torch.randn(2, 2, 3, 8, 8))


def test_without_anchors_only_what_is_safe():
    model = network("streamlined:none", dtype=torch.float32)
    with pytest.raises(StrategyError, match=r"16 steps would be undone.*largest safe anchor_every is 5"):
        model(torch.randn(16, 2, 3, 8, 8))
    with pytest.warns(UserWarning, match="gradients will be off") as found:
        network("streamlined:16", dtype=torch.float32)(torch.randn(16, 2, 3, 8, 8))
    assert {w.filename for w in found} == {__file__}


def test_wrong_spikes_stop_a_step_before_a_weight_has_a_gradient():
    model = network("streamlined:12", dtype=torch.float32, alpha=0.1, check="spikes")
    with pytest.warns(UserWarning, match="gradients will be off"):
        loss = model(3 * torch.randn(12, 2, 3, 8, 8)).square().sum()
    with pytest.raises(ReconstructionError, match="lower anchor_every"):
        loss.backward()
    assert model.blocks[0].synapse.weight.grad is None


@pytest.mark.parametrize("strategy", ["streamlined", "generic"])
def test_the_check_runs_in_a_compiled_graph(strategy):
    unit = SpikingConv2d(2, 8, norm="none", neuron="two_group", bias=True)
    torch.nn.init.constant_(unit.synapse.weight, 1.0)
    torch.nn.init.zeros_(unit.synapse.bias)
    model = SpikingNetwork([unit, GlobalAveragePool(), Readout(8, 2)], input_shape=(2, 8, 8))
    compiled = torch.compile(use_strategy(model, strategy), backend="aot_eager", fullgraph=True)
    loss = compiled(torch.randn(4, 2, 2, 8, 8).round()).square().sum()
    with use_backend("auto"), pytest.raises(ReconstructionError, match="a membrane at the threshold"):
        loss.backward()


def test_compiles_as_one_graph():
    model, x = network("streamlined", dtype=torch.float32), torch.randn(4, 2, 3, 8, 8)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
