"""Plans: the search is exact, the prediction holds, a plan knows its model, and bad budgets say what would do."""

import itertools
import json
import random

import pytest
import torch

from spikefit.engines import Plan
from spikefit.errors import BudgetError, OptionError, PlanError
from spikefit.models import create_model, use_strategy
from spikefit.planning import plan, predicted_bytes, report, verify
from spikefit.planning.plan import Unit, choose, largest_size, parse_budget
from spikefit.planning.target import Target

SMALL = {"input_shape": (3, 16, 16), "width": 0.25}


def sample(T=4, B=4):
    return torch.rand(1, B, 3, 16, 16).expand(T, B, 3, 16, 16)


def brute_force(units, around, live):
    """Fewest operations run again over all 2^n choices, or None."""
    best = None
    for keeps in itertools.product(("input", "spikes"), repeat=len(units)):
        kept = [u.kept if k == "input" else 0 for u, k in zip(units, keeps, strict=True)]
        fits = sum(kept) + around <= live and all(
            u.forward + sum(kept[:j]) <= live and u.backward + sum(kept[: j + 1]) <= live for j, u in enumerate(units)
        )
        cost = sum(u.macs for u, k in zip(units, keeps, strict=True) if k == "spikes")
        if fits and (best is None or cost < best):
            best = cost
    return best


def test_the_search_finds_what_brute_force_finds():
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        units = [Unit(str(i), *(rng.randint(1, 60) for _ in range(5))) for i in range(6)]
        around, costs = rng.randint(1, 60), []
        for live in range(20, 260, 30):
            keeps, wanted = choose(units, around, live), brute_force(units, around, live)
            cost = None if keeps is None else sum(u.macs for u, k in zip(units, keeps, strict=True) if k == "spikes")
            assert cost == wanted
            found += keeps is not None
            costs.append(float("inf") if cost is None else cost)
        assert costs == sorted(costs, reverse=True), "more memory must not cost more time"
    assert found > 200


@pytest.mark.parametrize("name", ["vgg6", "resnet19"])
def test_plans_fit_and_faster_ones_need_more(name):
    model, x = create_model(name, **SMALL), sample()
    least = plan(model, x, None)
    bits_alone = predicted_bytes(use_strategy(model, "lean:spikes"), x, torch.zeros(x.shape[1], dtype=torch.int64)).peak
    use_strategy(model, "bptt")
    assert least.predicted_peak_bytes <= 1.01 * bits_alone
    assert "input" in {u.keep for u in least.units}, "some speed is free"
    smallest = least.static_bytes + least.predicted_peak_bytes
    slowdowns = []
    for budget in (smallest, int(1.1 * smallest), int(1.5 * smallest), 10**9):
        made = plan(model, x, budget)
        assert made.static_bytes + made.predicted_peak_bytes <= budget
        slowdowns.append(made.predicted_slowdown)
    assert slowdowns == sorted(slowdowns, reverse=True)
    assert {u.keep for u in made.units} == {"all"}
    assert all(m.keep == "all" for m in model.modules() if hasattr(m, "keep")), "planning must leave the model alone"


def test_a_mixed_plan_keeps_the_promise_of_the_prediction():
    options = {"model": "vgg6", "timesteps": 8, "batch": 8, "input_shape": (3, 32, 32), "options": {"width": 0.5}}
    model = Target(**options).build()
    x, y = Target(**options).sample(model)
    least = plan(model, (x, y), None)
    made = plan(model, (x, y), int(1.25 * (least.static_bytes + least.predicted_peak_bytes)))
    assert {"input", "spikes"} == {u.keep for u in made.units}
    from spikefit.planning.measured import measured_peak_bytes_of

    measured = measured_peak_bytes_of(made.apply(model), x, y)
    assert measured <= made.predicted_peak_bytes <= 1.15 * measured


def test_a_plan_replaces_whatever_strategy_the_model_had():
    model, x = create_model("vgg6", **SMALL), sample()
    made = plan(model, x, None)
    use_strategy(model, "checkpoint")
    assert plan(model, x, None).predicted_peak_bytes == made.predicted_peak_bytes
    assert model.strategy.name == "checkpoint", "planning must leave the model alone"
    assert report(model, x, made).after.peak_bytes == made.predicted_peak_bytes
    assert made.apply(model).strategy.name == "lean"


def test_plans_save_and_load(tmp_path):
    model, x = create_model("vgg6", **SMALL), sample()
    made = plan(model, x, None)
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    keys = list(model.state_dict())
    again.apply(model)
    assert list(model.state_dict()) == keys
    assert [u.keep for u in model.blocks if hasattr(u, "keep")] == [u.keep for u in made.units]
    assert again.remove(model).blocks[0].keep == "all"
    use_strategy(model, f"lean:{tmp_path / 'plan.json'}")
    assert model.blocks[1].keep == made.units[1].keep == "spikes"
    assert "blocks.3" in made.explain()
    with pytest.raises(PlanError, match=r"cannot write .*choose another place"):
        made.save(tmp_path / "nowhere" / "plan.json")
    old = json.loads((tmp_path / "plan.json").read_text()) | {"schema": 0}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(PlanError, match="has schema 0, expected 1; make it again"):
        Plan.load(tmp_path / "old.json")
    with pytest.raises(PlanError, match="made for another model"):
        made.apply(create_model("vgg6", input_shape=(3, 16, 16), width=0.5))
    with pytest.raises(PlanError, match="made for another model"):
        made.apply(create_model("vgg9", **SMALL))
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(PlanError, match="no saved plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no saved plan"):
        use_strategy(model, "lean:missing.json")


def test_infeasible_budgets_say_what_would_do():
    model, x = create_model("vgg6", **SMALL), sample()
    least = plan(model, x, None)
    smallest = least.static_bytes + least.predicted_peak_bytes
    with pytest.raises(BudgetError, match="the smallest is") as caught:
        plan(model, x, int(0.8 * smallest))
    assert "batch" in str(caught.value)
    assert "T = " in str(caught.value)
    plan(model, x[:, :2], smallest)
    with pytest.raises(BudgetError, match="Even one sample does not fit"):
        plan(model, x, 1000)


@pytest.mark.parametrize("verb", [lambda m, x: plan(m, x, "1GB"), verify, report])
def test_models_and_samples_of_another_kind(verb):
    model, x = create_model("mlp", input_shape=(8,)), torch.rand(4, 2, 8)
    with pytest.raises(OptionError, match="expected a torch module as model, got str"):
        verb("mlp", x)
    for sample, got in ((x.numpy(), "ndarray"), ([x], "list"), ((x, None), "NoneType"), (torch.rand(8), r"\(8,\)")):
        with pytest.raises(OptionError, match=f"expected an input tensor .*got .*{got}"):
            verb(model, sample)


def test_report_refuses_what_is_no_plan():
    with pytest.raises(OptionError, match=r"report: .*got str; Plan.load"):
        report(create_model("mlp", input_shape=(8,)), torch.rand(4, 2, 8), "plan.json")


def test_budgets():
    assert parse_budget("4GB") == 4 * 10**9
    assert parse_budget(" 1.5 GiB ") == int(1.5 * 2**30)
    assert parse_budget("512mb") == 512 * 10**6
    assert parse_budget("1000") == parse_budget(1000) == 1000
    assert 0 < parse_budget(0.5) < 10**15
    for text in ("4 gigs", "", "GB", "1.2.3GB", "4iB", float("nan")):
        with pytest.raises(OptionError, match="budget: "):
            parse_budget(text)
    for text in (-1, 0, "0GB", "-4GB", True, [4], b"4GB"):
        with pytest.raises(OptionError, match="budget: "):
            parse_budget(text)


def test_static_bytes_and_optimisers():
    model, x = create_model("vgg6", **SMALL), sample()
    weights = sum(p.numel() * 4 for p in model.parameters())
    plain, adam = plan(model, x, None), plan(model, x, None, optimizer="adamw")
    assert adam.static_bytes == plain.static_bytes + 2 * weights
    with pytest.raises(OptionError, match="optimizer must be"):
        plan(model, x, None, optimizer="adma")
    with pytest.raises(PlanError, match="no spiking unit"):
        plan(torch.nn.Linear(3, 3), x, None)


def test_report_shows_both_sides():
    model, x = create_model("resnet19", width=0.0625, input_shape=(3, 16, 16)), sample(T=8)
    made = plan(model, x, "1GB")
    least = plan(model, x, None)
    found = report(model, x, least)
    assert found.after.peak_bytes == least.predicted_peak_bytes
    assert found.before.peak_bytes == predicted_bytes(model, x, torch.zeros(4, dtype=torch.int64)).peak
    assert found.ratio > 2
    assert found.after.categories["kept spikes"] < found.before.categories["kept floats"] / 20
    assert "blocks.1.first" in str(found)
    within = report(model, x, made)
    assert within.largest_batch > 4
    assert within.largest_timesteps > 8
    static, more = made.static_bytes, sample(T=8, B=within.largest_batch)
    assert static + predicted_bytes(model, more, torch.zeros(more.shape[1], dtype=torch.int64)).peak <= 10**9


@pytest.mark.parametrize("peak", [lambda n: 100 + 7 * n, lambda n: max(300, 20 + 11 * n), lambda n: 64 * (-(-n // 5))])
@pytest.mark.parametrize("limit", [50, 300, 1000, 5003])
@pytest.mark.parametrize("start", [1, 4, 300])
def test_largest_size_is_the_last_that_fits(peak, limit, start):
    fitting = [n for n in range(1, 1000) if peak(n) <= limit]
    assert largest_size(peak, limit, start) == max(fitting, default=0)
    assert largest_size(peak, limit, start, most=start) == max([n for n in fitting if n <= start], default=0)
