"""Online renormalisation under rules: one move of running statistics per sequence, and the values of its BPTT twin."""

import pytest
import torch
from reference import Quadratic, bptt, dense_net, error, gradients, ottt_by_record, sample
from torch import nn

from spikefit import encoding, use_strategy
from spikefit.errors import StrategyError
from spikefit.layers import (
    Dropout,
    GlobalAveragePool,
    OnlineRenorm,
    Readout,
    SpikingConv2d,
    SpikingLinear,
    StepBatchNorm,
    frozen_statistics,
)
from spikefit.layers.running import SequenceStatistics
from spikefit.losses import create_loss
from spikefit.models import SpikingNetwork
from spikefit.rules import drive, drive_rate, ndot, ottt, rate, sltt, tbptt

LOSS = Quadratic()
RULES = [sltt(), sltt(k=1), ottt(), ndot(), tbptt(2)]


def net(seen=True, seed=0, **options):
    """Two spiking layers behind renormalisation, whose running statistics are not those of any sequence."""
    made = dense_net(norm="osr", seed=seed, **options)
    if seen:
        generator = torch.Generator().manual_seed(seed)
        for norm in norms(made):
            for buffer, low in ((norm.running_mean, -0.5), (norm.running_var, 0.3)):
                buffer.copy_(low + torch.rand(buffer.shape, generator=generator))
            norm.num_batches_tracked.fill_(3)
            nn.init.constant_(norm.weight, 1.5)
            nn.init.constant_(norm.bias, 0.4)
    return made


def norms(model):
    return [m for m in model.modules() if isinstance(m, OnlineRenorm)]


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def same(got, wanted, tolerance=0.0):
    assert wanted
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance, msg=name)


def driven(model, x, y, rule, **options):
    """Logits, gradients and buffers after one sequence under a rule."""
    outcome = drive(model, x, y, LOSS, rule, **options)
    return outcome.logits, gradients(model), buffers(model)


def test_windows_of_all_steps_are_the_twin():
    x, y = sample(T=6)
    twin = net()
    with frozen_statistics([twin]), torch.no_grad():
        wanted_logits = twin(x).sum(0)
    wanted = bptt(twin, x, y, LOSS)
    logits, got, moved = driven(net(), x, y, tbptt(6))
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-12, atol=1e-12)
    assert error(got, wanted) <= 1e-12
    same(moved, buffers(twin))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_move_running_statistics_once_to_the_values_of_a_whole_call(rule):
    x, y = sample(T=3)
    twin = net()
    twin(x)
    _, _, moved = driven(net(), x, y, rule)
    same(moved, buffers(twin))
    before = buffers(net())
    for name, buffer in moved.items():
        assert not torch.equal(buffer, before[name]), name
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 1


def test_the_values_of_all_steps_use_the_statistics_at_the_start():
    x, y = sample(T=5)
    model = net()
    wanted = model.eval()(x).sum(0)
    logits, _, _ = driven(model.train(), x, y, sltt())
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [sltt(), ottt(), tbptt(2)], ids=str)
def test_a_repeated_input_is_that_of_its_copies(rule):
    x, y = sample(T=1)
    repeated = driven(net(), encoding.repeat(x[0], 4), y, rule)
    copied = driven(net(), x.repeat(4, 1, 1), y, rule)
    torch.testing.assert_close(repeated[0], copied[0], rtol=1e-12, atol=1e-12)
    assert error(repeated[1], copied[1]) <= 1e-12
    same(repeated[2], copied[2], 1e-12)


def convolutions(seen=True):
    torch.manual_seed(0)
    neuron = {"name": "lif", "surrogate": "sigmoid(4)"}
    blocks = [
        SpikingConv2d(2, 4, norm="osr", pool="avg", neuron=neuron),
        SpikingConv2d(4, 4, norm="osr", neuron=neuron),
    ]
    made = SpikingNetwork([*blocks, GlobalAveragePool(), Readout(4, 3)], input_shape=(2, 8, 8)).double()
    for norm in norms(made):
        norm.num_batches_tracked.fill_(int(seen))
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, 0.5)
    return made


def test_ottt_traces_what_the_gain_multiplies():
    x, y = sample(T=5)
    model = net()
    with frozen_statistics([model]):
        wanted = ottt_by_record(model, x, y, LOSS)
    _, got, _ = driven(model, x, y, ottt())
    assert error(got, wanted) <= 1e-12
    gains = "norm.weight"
    sums = driven(net(), x, y, sltt())[1]
    assert error(sums, wanted, gains) > 0.05, "a gain without a trace would do as well"


@pytest.mark.parametrize("strategy", ["checkpoint:1", "lean:spikes", "lean:input", "replay"])
@pytest.mark.parametrize("seen", [True, False])
def test_units_may_run_again_inside_a_step(seen, strategy):
    found = []
    for chosen in ("bptt", strategy):
        model = use_strategy(convolutions(seen), chosen)
        x, y = sample(T=4, shape=(2, 8, 8))
        found.append(driven(model, x, y, tbptt(2)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    assert error(found[1][1], found[0][1]) <= 1e-10
    same(found[1][2], found[0][2])


def test_the_first_sequence_starts_from_one_pass_without_a_gradient():
    x, y = sample(T=4)
    model = net(seen=False)
    steps = net(seen=False)
    for block, plain in zip(model.blocks[:2], steps.blocks[:2], strict=True):
        plain.norm = StepBatchNorm(block.norm.channels).double()
    kept = []
    steps.blocks[1].norm.register_forward_hook(lambda m, args, out: kept.append(args[0]))
    steps(x)
    rows = kept[0].movedim(2, 0).flatten(1)
    start = rows.mean(1), rows.var(1)
    seen = []
    model.blocks[1].norm.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    drive(model, x, y, LOSS, sltt())
    first, rest = seen[:4], seen[4:]
    torch.testing.assert_close(torch.cat([z for z, _ in first]), kept[0], rtol=1e-12, atol=1e-12)
    norm = model.blocks[1].norm
    for z, out in rest:
        wanted = (z - start[0]) / (start[1] + norm.eps).sqrt()
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    rows = torch.cat([z for z, _ in rest]).movedim(2, 0).flatten(1)
    torch.testing.assert_close(norm.running_mean, torch.lerp(start[0], rows.mean(1), 0.1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, torch.lerp(start[1], rows.var(1), 0.1), rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 1
    drive(model, x, y, LOSS, sltt())
    assert len(seen) == 12, "the second sequence needs no pass of its own"


def test_of_one_layer_the_first_sequence_is_that_of_a_whole_call():
    x, y = sample(T=4)
    twin = net(seen=False, widths=(7, 8))
    wanted = bptt(twin, x, y, LOSS)
    _, got, moved = driven(net(seen=False, widths=(7, 8)), x, y, tbptt(4))
    assert error(got, wanted) <= 1e-12
    same(moved, buffers(twin), 1e-12)


def test_the_pass_before_leaves_everything_else_alone():
    torch.manual_seed(0)
    neuron = {"name": "lif", "surrogate": "sigmoid(4)"}
    blocks = [SpikingLinear(7, 8, norm="osr", neuron=neuron), SpikingLinear(8, 8, norm="step_bn", neuron=neuron)]
    model = SpikingNetwork([*blocks, Dropout(0.5), Readout(8, 3)], input_shape=(7,)).double()
    x, y = sample(T=3)
    calls = []
    model.blocks[0].norm.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.nn.functional.dropout(torch.ones(1, 4, 8, dtype=torch.float64), 0.5)
        wanted = torch.get_rng_state()
    drive(model, x, y, LOSS, sltt())
    assert calls == [False] * 3 + [True] * 3
    assert model.blocks[1].norm.num_batches_tracked == 3
    # one mask for the sequence, as in every other one
    assert not torch.equal(before, wanted)
    assert torch.equal(torch.get_rng_state(), wanted)


def test_autocast_around_the_loop_does_not_lose_gradients_to_the_pass_before():
    torch.manual_seed(0)
    plain = nn.Linear(8, 3)

    class Own(nn.Module):
        consumes_time = False

        def __init__(self):
            super().__init__()
            self.linear = plain

        def init_state(self, batch_size, shape, **options):
            return None, (3,)

        def forward(self, x, state=None):
            return self.linear(x), None

    model = SpikingNetwork([SpikingLinear(7, 8, norm="osr"), Own()], input_shape=(7,))
    x, y = sample(T=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drive(model, x.float(), y, create_loss("ce_steps"), sltt())
    assert plain.weight.grad is not None
    assert plain.weight.grad.abs().max() > 0


def test_a_sequence_that_fails_moves_nothing():
    x, y = sample(T=4)
    for model in (net(), net(seen=False)):
        before = buffers(model)

        def backward(loss, calls=[]):  # noqa: B006
            calls.append(loss)
            if len(calls) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            drive(model, x, y, LOSS, sltt(), backward=backward)
        same(buffers(model), before)


def test_frozen_statistics_and_evaluation_stay():
    x, y = sample(T=3)
    for seen in (True, False):
        model, free = net(seen), net(seen)
        before = buffers(model)
        with frozen_statistics([model]):
            logits, got, after = driven(model, x, y, ottt())
        same(after, before)
        wanted = driven(free, x, y, ottt())
        torch.testing.assert_close(logits, wanted[0], rtol=0, atol=0)
        assert error(got, wanted[1]) == 0
    still = net(seen=False).eval()
    before = buffers(still)
    driven(still, x, y, ottt())
    same(buffers(still), before)


def test_one_update_per_step_moves_statistics_once():
    x, y = sample(T=3)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    drive(model, x, y, LOSS, sltt(update_every="step"), update=update)
    assert {int(norm.num_batches_tracked) for norm in norms(model)} == {4}


def test_rates_are_refused():
    x, y = sample(T=3)
    with pytest.raises(StrategyError, match=r"rule rate: blocks\.0\.norm .* is OnlineRenorm.*norm=step_bn, ws"):
        drive_rate(net(), x, y, create_loss("ce_mean"), rate())


def test_compiled_units_are_served():
    x, y = sample(T=3)
    wanted = driven(net(), x, y, sltt())
    # no rule applies the parts of units that run again, so the norm itself has to see the sequence
    model = use_strategy(net(), "checkpoint")
    unit = model.blocks[0]
    unit.forward = torch.compile(unit.forward, backend="eager")
    with frozen_statistics([model]):
        model(x)  # a compiled graph without a rule, which must not be used under one
    _, got, moved = driven(model, x, y, sltt())
    assert error(got, wanted[1]) <= 1e-12
    same(moved, wanted[2])


def test_a_compiled_unit_without_breaks_cannot_join_a_sequence():
    torch._dynamo.reset()
    x, _ = sample(T=3)
    whole = torch.compile(SpikingLinear(7, 8, norm="osr").double(), backend="eager", fullgraph=True)
    whole(x)
    with SequenceStatistics().open(), pytest.raises(Exception, match="cannot see where a sequence ends"):
        whole(x)
