"""Training by rules: a run does what the rule does by itself, and everything around it holds as for strategies."""

import math
import re

import pytest
import torch
from runs import stop_at, weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from spikefit.data import batches
from spikefit.errors import CheckpointError, OptionError, StrategyError
from spikefit.reporting import comparison
from spikefit.rules import RandomK, drive, drive_rate
from spikefit.rules.trace import StepRule
from spikefit.training import (
    build_data,
    build_driver,
    build_encoding,
    build_loss,
    build_model,
    derive_seed,
    train,
)

RULES = ["sltt", "sltt_k:2", "ottt", "ndot", "tbptt:2", "rate", "rate:sequence"]
PLAIN = {"optimizer": "sgd", "momentum": "0", "schedule": "constant", "lr": "0.5", "epochs": "1"}


@pytest.fixture
def ruled(small):
    """As `small`, for a rule: a norm and a loss that go with it, and two layers."""

    def make(strategy, **changes):
        loss = "ce_mean" if strategy.startswith("rate") else "tet"
        return small(**{"strategy": strategy, "norm": "step_bn", "loss": loss, "hidden": "[12, 8]", **changes})

    return make


def assert_close(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def distance(a, b):
    """Of two sets of weights, statistics of norms left out."""
    kept = [k for k in a if "running" not in k and "num_" not in k]
    return math.sqrt(sum(float((a[k] - b[k]).double().square().sum()) for k in kept))


def by_hand(recipe):
    """(loss, weights) of the one update of an epoch of one batch, by the rule's own function and torch's SGD."""
    data, rule = build_data(recipe).train, build_driver(recipe).rule
    model, loss = build_model(recipe, data).double().train(), build_loss(recipe)
    index, images, y = next(batches(data, recipe.data.batch_size, seed=recipe.seed, epoch=0, shuffle=True))
    chance = torch.Generator().manual_seed(derive_seed(recipe.seed, "encode", 0, index))
    x = build_encoding(recipe)(images, chance).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.train.lr)
    if isinstance(rule, StepRule):
        steps = torch.Generator().manual_seed(derive_seed(recipe.seed, "steps", 0, index))
        outcome = drive(model, x, y, loss, rule, generator=steps)
    else:
        outcome = drive_rate(model, x, y, loss, rule)
    optimizer.step()
    return float(outcome.loss), model.state_dict()


@pytest.mark.parametrize("encoding", ["repeat", "rate"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_update_is_that_of_the_rule(ruled, tmp_path, rule, encoding):
    recipe = ruled(rule, **PLAIN, limit="16", batch="16", precision="64-true", encoding=encoding)
    record = train(recipe, out=tmp_path)
    value, wanted = by_hand(recipe)
    assert record.steps == 1
    assert math.isfinite(record.loss)
    assert record.history[0]["train_loss"] == pytest.approx(value, rel=1e-6)
    assert_close(weights(tmp_path), wanted, 1e-12)
    start = build_model(recipe, build_data(recipe).train).double().state_dict()
    assert distance(wanted, start) > 1e-3
    assert record.recipe["strategy"]["name"] == rule


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_an_epoch_of_every_rule(ruled, tmp_path, rule, precision):
    recipe = ruled(rule, epochs="1", precision=precision, clip_norm="1")
    record = train(recipe, out=tmp_path)
    assert record.steps == 3
    assert all(math.isfinite(record.history[0][key]) for key in ("train_loss", "test_loss"))
    start = build_model(recipe, build_data(recipe).train).state_dict()
    for name, tensor in weights(tmp_path).items():
        assert tensor.isfinite().all(), name
        assert name.endswith("bias") or not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("rule", ["sltt", "ottt", "tbptt:2", "rate"])
def test_accumulation_equals_a_larger_batch(ruled, tmp_path, rule):
    # 40 samples: the last group of two is uneven, 16 + 16 and 8
    base = {**PLAIN, "norm": "ws", "precision": "64-true"}
    one = train(ruled(rule, **base, batch="32"), out=tmp_path / "one")
    two = train(ruled(rule, **base, batch="16", accumulate="2"), out=tmp_path / "two")
    assert one.steps == two.steps == 2
    assert two.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], rel=1e-6)
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-6)
    start = build_model(ruled(rule, norm="ws"), build_data(ruled(rule)).train).state_dict()
    assert distance(weights(tmp_path / "one"), start) > 1e-2


def updates_of(recipe):
    """How often the optimiser moves weights in a training."""
    count = [0]
    handle = register_optimizer_step_post_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        record = train(recipe)
    finally:
        handle.remove()
    return count[0], record


@pytest.mark.parametrize(("rule", "updates"), [("sltt", 3), ("ottt", 3), ("sltt_k:2", 2), ("tbptt:2", 2)])
def test_updates_behind_every_step(ruled, rule, updates):
    changes = {"epochs": "1", "strategy.update_every": "step"}
    count, record = updates_of(ruled(rule, norm="ws").override(changes))
    # three batches of three steps; the record and the schedule count batches
    assert count == 3 * updates
    assert record.steps == 3
    assert math.isfinite(record.loss)
    assert updates_of(ruled(rule, epochs="1"))[0] == 3
    with pytest.raises(OptionError, match=r"update_every='step' moves the weights .* got train.accumulate=2; use acc"):
        train(ruled(rule, accumulate="2").override(changes))


@pytest.mark.parametrize("rule", ["sltt", "sltt_k:2", "ottt", "rate:sequence"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(ruled, tmp_path, rule):
    recipe = ruled(rule, epochs="2", checkpoint_every="1", encoding="rate", ema="0.9")
    train(recipe, out=tmp_path / "whole")
    for step in (2, 5):
        stop_at(recipe, tmp_path / "torn", step)
    train(recipe, out=tmp_path / "torn", resume=True)
    for group in ("model", "ema", "optimizer"):
        one, two = (weights(tmp_path / name, group) for name in ("whole", "torn"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), group


def test_steps_are_drawn_anew_for_every_batch(ruled, monkeypatch):
    drawn, true = [], RandomK.draw
    monkeypatch.setattr(RandomK, "draw", lambda *a, **k: (drawn.append(true(*a, **k)), drawn[-1])[1])
    for _ in range(2):
        train(ruled("sltt_k:2", epochs="4", limit="48"))
    assert len(drawn) == 24
    assert drawn[:12] == drawn[12:], "the seed decides"
    assert len(set(drawn)) == 3


def test_a_rule_belongs_to_the_run(ruled, tmp_path):
    for rule in ("sltt", "bptt"):
        stop_at(ruled(rule, checkpoint_every="1"), tmp_path / rule, 2)
    for before, changes, told in (
        ("sltt", {"strategy": "tbptt:2"}, r"another run; strategy\.name was sltt and is tbptt:2"),
        ("sltt", {"strategy": "bptt"}, r"strategy\.name was sltt and is bptt"),
        ("bptt", {"strategy": "sltt"}, r"strategy\.name was bptt and is sltt"),
        ("sltt", {"strategy.grad_scale": "2.0"}, r"strategy\.grad_scale was None and is 2\.0"),
    ):
        with pytest.raises(CheckpointError, match=told):
            train(ruled(before).override(changes), out=tmp_path / before, resume=True)
    # exact strategies give the same gradients
    train(ruled("checkpoint"), out=tmp_path / "bptt", resume=True)
    train(ruled("sltt"), out=tmp_path / "sltt", resume=True)


@pytest.mark.parametrize("rule", ["sltt", "rate"])
def test_clipping_bounds_the_update(ruled, tmp_path, rule):
    base = {**PLAIN, "lr": "1", "limit": "16", "batch": "16"}
    start = build_model(ruled(rule), build_data(ruled(rule)).train).state_dict()
    for name, clip_norm in (("clipped", "0.01"), ("free", "0")):
        train(ruled(rule, **base, clip_norm=clip_norm), out=tmp_path / name)
    assert distance(weights(tmp_path / "clipped"), start) == pytest.approx(0.01, rel=1e-3)
    assert distance(weights(tmp_path / "free"), start) > 0.05


@pytest.mark.parametrize(
    ("rule", "inside"), [("sltt", "lean:spikes"), ("ottt", "lean:spikes"), ("sltt", "checkpoint"), ("tbptt:2", "lean")]
)
def test_the_strategy_of_a_step_changes_no_weight(ruled, tmp_path, rule, inside):
    base = {**PLAIN, "lr": "0.05", "precision": "64-true", "encoding": "rate"}
    train(ruled(rule, **base), out=tmp_path / "plain")
    record = train(ruled(rule, **base).override({"strategy.inside": inside}), out=tmp_path / "inside")
    assert record.recipe["strategy"]["inside"] == inside
    assert_close(weights(tmp_path / "inside"), weights(tmp_path / "plain"), 1e-6)


def test_what_does_not_go_with_a_rule_is_told_before_the_first_update(ruled, small, tmp_path):
    steps = []
    for recipe, reasons in (
        (
            small(strategy="sltt"),
            ("blocks.1.norm is BatchNorm", "norm=step_bn", r"CrossEntropyMean \(ce_mean\)", "loss=tet or ce_steps"),
        ),
        (ruled("ottt").override({"strategy.inside": "checkpoint"}), ("has strategy='checkpoint'",)),
        (ruled("rate", loss="tet"), (r"the loss TET \(tet\) reads more", "loss=ce_mean")),
        (ruled("sltt_k:9"), ("needs a sequence of at least 9 steps for sltt, got 3",)),
    ):
        with pytest.raises(StrategyError) as refusal:
            train(recipe, out=tmp_path / "out", on_progress=lambda event: steps.append(event.kind == "step"))
        for reason in reasons:
            assert re.search(reason, str(refusal.value))
    assert not any(steps)
    assert not (tmp_path / "out").exists()


def test_compare_tells_exact_from_approximate(ruled, monkeypatch):
    monkeypatch.setattr(comparison, "profile_of", lambda *_: {"layers": []})
    names = ["bptt", "sltt", "sltt_k:2", "tbptt:2", "tbptt:3", "rate"]
    rows = {row["strategy"]: row for row in comparison.compare(ruled("bptt", epochs="1"), names)}
    assert list(rows) == names
    assert {name for name, row in rows.items() if row["exact"]} == {"bptt"}
    errors = {name: row["max_gradient_error"] for name, row in rows.items()}
    assert errors["bptt"] == 0
    # one window as long as the sequence
    assert 0 < errors["tbptt:3"] < 1e-5
    assert all(errors[name] > 1e-3 for name in ("sltt", "sltt_k:2", "tbptt:2"))
    assert errors["tbptt:2"] < errors["sltt"]
    assert "TET (tet) reads more than the mean" in rows["rate"]["refused"]
    assert errors["rate"] is rows["rate"]["step_seconds"] is None
    assert all(rows[name]["refused"] is None and math.isfinite(rows[name]["loss"]) for name in names[:-1])
    # options of the recipe's rule hold where that is compared
    own = comparison.compare(ruled("sltt", epochs="1", **{"strategy.inside": "lean:spikes"}), ["bptt", "sltt"])
    assert [row["recipe"]["strategy"].get("inside") for row in own] == [None, "lean:spikes"]
    # the random steps of a comparison are those of the seed
    again = comparison.compare(ruled("bptt", epochs="1"), ["sltt_k:2"])
    assert again[0]["max_gradient_error"] == errors["sltt_k:2"]
