"""Losses that read auxiliary heads, and those that do not, in everything that runs a step; fixed lengths of models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import headed
from spikefit.errors import OptionError, ShapeError
from spikefit.losses import CrossEntropyHeads, CrossEntropyMean
from spikefit.losses.model_loss import auxiliary_heads, loss_of
from spikefit.models import create_model, use_strategy
from spikefit.planning import (
    Target,
    memory_against_timesteps,
    plan,
    predicted_bytes,
    profile,
    random_sample,
    report,
    saved_bytes,
    verify,
    watch_saved,
)
from spikefit.planning.measured import measured_peak_bytes_of
from spikefit.planning.target import mean_cross_entropy, training_step

WEIGHTS = (0.25, 0.5, 0.75, 2.0)


def network(strategy="bptt", **options):
    torch.manual_seed(0)
    return use_strategy(headed.make(**options), strategy)


def sample(T=4, B=6):
    x, _ = random_sample((1, 8, 8), T, B)
    return x, torch.arange(B) % 10


def by_hand(model, x, y):
    """The loss of the heads, from their logits."""
    logits, auxiliary = model(x, auxiliary=True)
    return sum(w * F.cross_entropy(o, y) for w, o in zip(WEIGHTS, (*auxiliary, logits[0]), strict=True))


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_one_helper_calls_every_kind_of_loss(training):
    model, (x, y) = network().train(training), sample()
    value, outputs = loss_of(model, CrossEntropyHeads(), x, y)
    assert [tuple(out.shape) for out in outputs] == [(1, 6, 10), (3, 6, 10)]
    torch.testing.assert_close(value, by_hand(model, x, y))
    for plain in (mean_cross_entropy, CrossEntropyMean(), lambda logits, targets: logits.square().mean()):
        value, outputs = loss_of(model, plain, x, y)
        assert len(outputs) == 1
        torch.testing.assert_close(value, plain(model(x), y))


def test_a_step_gives_every_head_its_gradient():
    model, (x, y) = network(), sample()
    wanted = gradients(model, by_hand(model, x, y))
    model.zero_grad()
    value = training_step(model, x, y, CrossEntropyHeads())
    assert not value.requires_grad
    assert len([name for name in wanted if name.startswith("early")]) == 6
    for name, p in model.named_parameters():
        assert wanted[name].abs().max() > 0, name
        torch.testing.assert_close(p.grad, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_loss_that_finds_no_heads_is_told_before_the_forward():
    x, y = random_sample((1, 8, 8), 4, 2)
    called = []
    mlp = create_model("mlp", input_shape=(1, 8, 8), hidden=[4])
    mlp.register_forward_pre_hook(lambda *_: called.append(1))
    told = r"CrossEntropyHeads: expected a model with auxiliary heads, got SpikingNetwork with none; use .*ce_mean"
    for run in (training_step, lambda *step: profile(step[0], step[1:3], loss=step[3], predict_only=True)):
        with pytest.raises(OptionError, match=told):
            run(mlp, x, y, CrossEntropyHeads())
    with pytest.raises(OptionError, match=r"got Headed with none"):
        verify(network(auxiliary=False), (x, y), loss=CrossEntropyHeads())
    assert not called
    assert auxiliary_heads(network(heads=2)) == 2
    # a module of that name counts nothing
    mlp.auxiliary_heads = nn.ModuleList([nn.Linear(1, 1)])
    assert auxiliary_heads(mlp) == 0


def test_a_wrapper_of_data_parallelism_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, (x, y) = network(), sample()
        wanted = gradients(model, by_hand(model, x, y))
        training_step(wrapped := DistributedDataParallel(network()), x, y, CrossEntropyHeads())
        for name, p in wrapped.module.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], msg=lambda m, n=name: f"{n}: {m}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", [CrossEntropyHeads(), CrossEntropyMean(), mean_cross_entropy])
@pytest.mark.parametrize("strategy", ["lean:spikes", "checkpoint"])
def test_verify_passes(loss, strategy):
    verdict = verify(network(strategy), sample(), loss=loss)
    assert verdict.passed, str(verdict)


class Faulty(headed.Headed):
    """Auxiliary logits that are wrong in value, or in gradient alone, unless the strategy is bptt."""

    fault = ""

    def forward(self, x, *, auxiliary=False):
        if not auxiliary or self.strategy.name == "bptt":
            return super().forward(x, auxiliary=auxiliary)
        logits, early = super().forward(x, auxiliary=True)
        return logits, early + 1e-3 if self.fault == "value" else 2 * early - early.detach()


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_verify_sees_a_fault_of_an_auxiliary_head(fault):
    model = network("lean:spikes")
    model.__class__, model.fault = Faulty, fault
    assert verify(model, sample()).passed
    verdict = verify(model, sample(), loss=CrossEntropyHeads())
    assert not verdict.passed
    assert verdict.spikes_equal is (fault == "gradient")
    assert not verdict.spikes_differing
    if fault == "gradient":
        assert 0.05 < verdict.max_gradient_error <= 1 + 1e-5


def test_held_bytes_are_those_of_a_real_step():
    model, (x, y) = network(), sample()
    for loss in (CrossEntropyHeads(), CrossEntropyMean()):
        with watch_saved(model) as saved:
            value = loss_of(model, loss, x, y)[0]
        assert saved.layers == saved_bytes(model, x, y, loss=loss).layers
        del value


def test_predicted_and_measured_peaks_hold_the_auxiliary_logits():
    classes, B, heads = 20_000, 144, 3
    model, (x, y) = network(num_classes=classes), sample(B=B)
    logits = B * classes * 4
    found = {}
    for loss in (CrossEntropyHeads(), CrossEntropyMean()):
        predicted = predicted_bytes(model, x, y, loss=loss)
        assert predicted.stages["loss"] > logits
        found[type(loss)] = (predicted.saved.total, predicted.peak, measured_peak_bytes_of(model, x, y, loss))
        _, expected, got = found[type(loss)]
        assert got <= expected <= 1.15 * got
    saved, peak, measured = (a - b for a, b in zip(*found.values(), strict=True))
    # each head keeps its log-softmax at least, until its turn in backward comes
    assert min(saved, peak, measured) >= heads * logits


def test_profile_plan_and_report_take_the_loss():
    model, step = network(), sample()
    seen = profile(model, step, loss=CrossEntropyHeads(), repeats=1)
    assert seen.measured_peak_bytes > 0
    assert seen.step_seconds > 0
    assert seen.saved_bytes > profile(model, step, loss=mean_cross_entropy, predict_only=True).saved_bytes
    (row,) = memory_against_timesteps(model, *step, timesteps=[4], loss=CrossEntropyHeads())
    assert row["saved_bytes"] == seen.saved_bytes
    chosen = plan(model, step, None, loss=CrossEntropyHeads())
    told = report(model, step, chosen, loss=CrossEntropyHeads())
    assert told.after.peak_bytes <= told.before.peak_bytes
    assert verify(chosen.apply(model), step, loss=CrossEntropyHeads()).passed


def test_autocast():
    model, step = network("lean:spikes"), sample()
    assert verify(model, step, loss=CrossEntropyHeads(), autocast=True).passed
    assert training_step(model, *step, CrossEntropyHeads(), autocast=True).isfinite()


def test_a_model_of_fixed_length_gets_that_of_the_sample():
    seen = profile("har_conv", timesteps=16, batch=2, widths=[8, 8], repeats=1)
    assert seen.settings["timesteps"] == 16
    assert seen.measured_peak_bytes > 0
    assert Target("har_conv", timesteps=16).build().timesteps == 16
    assert Target("har_mlp", timesteps=16).build().timesteps is None
    # what the caller writes holds
    target = Target("har_conv", options={"timesteps": 12}, timesteps=16)
    assert target.build().timesteps == 12
    with pytest.raises(ShapeError, match="T = 12, got T = 16"):
        profile(target, predict_only=True)
