"""Strategies and rules by name: what a text or a table means, and that a driver does what the functions do."""

import pytest
import torch
from rate_reference import LOSS as RATE_LOSS
from rate_reference import conv_net
from reference import Quadratic, bptt, dense_net, gradients, sample
from torch import nn

from spikefit import create_model, use_strategy
from spikefit.engines import Strategy
from spikefit.engines.strategy import RULE_NAMES
from spikefit.errors import OptionError, StrategyError
from spikefit.rules import (
    RULES,
    Driver,
    EveryK,
    GivenSteps,
    RandomK,
    drive,
    drive_rate,
    ndot,
    ottt,
    parse_driver,
    rate,
    sltt,
    tbptt,
)
from spikefit.rules.table import WHOLE, rule_name
from spikefit.rules.verdicts import COLUMNS

LOSS = Quadratic()
# what is written -> the rule, and how it is written in short
TEXTS = {
    "sltt": (sltt(), "sltt"),
    "sltt_k": (sltt(k=2), "sltt_k:2"),
    "sltt_k:3": (sltt(k=3), "sltt_k:3"),
    "ottt": (ottt(), "ottt"),
    "ndot": (ndot(), "ndot"),
    "tbptt": (tbptt(2), "tbptt:2"),
    "tbptt:4": (tbptt(4), "tbptt:4"),
    "rate": (rate(), "rate"),
    "rate:step": (rate(), "rate"),
    "rate:sequence": (rate("sequence"), "rate:sequence"),
}
TABLES = [
    ({"name": "sltt", "grad_scale": 2.0, "loss_norm": "T"}, sltt(grad_scale=2.0, loss_norm="T")),
    ({"name": "sltt", "grad_scale": 3}, sltt(grad_scale=3)),
    ({"name": "sltt_k", "k": 3, "sampler": "every"}, sltt(sampler=EveryK(3))),
    ({"name": "sltt_k:4", "loss_norm": "T"}, sltt(k=4, loss_norm="T")),
    (
        {"name": "ottt", "trace_dtype": "bfloat16", "trace_first": False},
        ottt(trace_dtype=torch.bfloat16, trace_first=False),
    ),
    (
        {"name": "ottt", "update_every": "step", "trace_dtype": "float32"},
        ottt(update_every="step", trace_dtype=torch.float32),
    ),
    ({"name": "ndot", "lag": 1}, ndot(lag=1)),
    ({"name": "tbptt", "k": 5, "update_every": "step"}, tbptt(5, update_every="step")),
    ({"name": "rate", "mode": "sequence", "grad_scale": 0.5}, rate("sequence", grad_scale=0.5)),
    ({"name": "rate:sequence", "grad_scale": 0.5}, rate("sequence", grad_scale=0.5)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_rules(text):
    rule, short = TEXTS[text]
    driver = parse_driver(text)
    assert driver == Driver(None, rule) == parse_driver({"name": text})
    assert str(driver) == short
    assert parse_driver(str(driver)) == driver
    assert rule_name(driver.rule) == text.partition(":")[0]
    assert not driver.exact
    assert not driver.each_step


@pytest.mark.parametrize(("table", "rule"), TABLES, ids=lambda v: None)
def test_tables_of_rules(table, rule):
    driver = parse_driver(table)
    assert driver == Driver(None, rule)
    assert driver.each_step == (table.get("update_every") == "step")
    inside = parse_driver({**table, "inside": "lean:spikes"})
    assert inside == Driver(Strategy("lean", "spikes"), rule)
    assert inside.each_step == driver.each_step
    assert not inside.exact
    assert str(inside) == str(driver), "the rule, as rows of tables are headed by it"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "sltt", "grad_scale": 3.0, "loss_norm": "T"}, "sltt (grad_scale=3.0, loss_norm=T)"),
        ({"name": "sltt_k:4", "sampler": "random"}, "sltt_k:4"),
        ({"name": "sltt_k:4", "sampler": "every"}, "sltt_k:4 (sampler=EveryK(k=4, offset='random'))"),
        ({"name": "tbptt:3", "update_every": "step"}, "tbptt:3 (update_every=step)"),
        ({"name": "rate:sequence", "grad_scale": 2.0, "inside": "bptt"}, "rate:sequence (grad_scale=2.0)"),
    ],
)
def test_the_text_of_a_rule_tells_what_changes_its_gradient(table, text):
    assert str(parse_driver(table)) == text


@pytest.mark.parametrize("text", ["bptt", "lean:spikes", "checkpoint:3", {"name": "lean", "keep": "spikes"}])
def test_strategies_of_whole_sequences(text):
    driver = parse_driver(text)
    assert driver.rule is None
    assert driver.exact
    assert parse_driver(str(driver)) == driver == parse_driver(driver) == parse_driver(driver.strategy)
    assert not parse_driver("inverse").exact
    assert parse_driver(None) == WHOLE
    assert WHOLE.exact
    assert str(WHOLE) == "bptt"


ERRORS = [
    ("slt", StrategyError, r"expected one of bptt, .*sltt, sltt_k, ottt, ndot, tbptt, rate, got 'slt'.*mean sltt"),
    ("otttt", StrategyError, "Did you mean ottt"),
    ("sltt:3", StrategyError, "strategy sltt: it takes no option behind its name, got 'sltt:3'; write 'sltt' alone"),
    ("sltt_k:x", StrategyError, "expected sltt_k:K with a whole number, got sltt_k:x"),
    ("tbptt:2.5", StrategyError, "expected tbptt:K with a whole number, got tbptt:2.5"),
    ("sltt_k:0", OptionError, "k must be a whole number of at least 1, got 0"),
    ("tbptt:-1", OptionError, "tbptt: k must be a whole number of at least 1, got -1"),
    ("rate:sequenz", OptionError, "rate: mode must be one of step, sequence, got 'sequenz'"),
    ({"name": "tbptt:3", "k": 3}, StrategyError, "it has its k given twice, got 'tbptt:3'; write 'tbptt' alone"),
    ({"name": "rate:step", "mode": "step"}, StrategyError, "it has its mode given twice"),
    ({"name": "sltt", "grad_scal": 2.0}, OptionError, r"unknown option 'grad_scal'; known: .*Did you mean grad_scale"),
    (
        {"name": "rate", "update_every": "step"},
        OptionError,
        "strategy rate: unknown option 'update_every'; known: grad_",
    ),
    ({"name": "tbptt", "loss_norm": "T"}, OptionError, "strategy tbptt: unknown option 'loss_norm'"),
    ({"name": "sltt", "grad_scale": "2"}, OptionError, r"sltt: grad_scale: expected float, got '2' \(str\)"),
    ({"name": "sltt", "grad_scale": True}, OptionError, r"grad_scale: expected float, got True \(bool\)"),
    ({"name": "sltt_k", "k": True}, OptionError, r"k: expected int, got True \(bool\)"),
    ({"name": "tbptt", "k": 2.0}, OptionError, r"k: expected int, got 2.0 \(float\)"),
    ({"name": "ottt", "trace_first": 1}, OptionError, r"trace_first: expected bool, got 1 \(int\)"),
    ({"name": "ottt", "trace_dtype": "half"}, OptionError, "trace_dtype must be one of float32, bfloat16, got 'half'"),
    (
        {"name": "sltt_k", "sampler": "top"},
        OptionError,
        "sampler must be one of random, every, top_activity, got 'top'",
    ),
    ({"name": "sltt", "grad_scale": -1.0}, OptionError, "grad_scale must be a finite number > 0, got -1.0"),
    ({"name": "sltt", "update_every": "batch"}, OptionError, "update_every must be one of sequence, step, got 'batch'"),
    (
        {"name": "sltt", "inside": "ottt"},
        StrategyError,
        "inside names the strategy of one step .bptt, .*got 'ottt'",
    ),
    ({"name": "sltt", "inside": "tbptt:2"}, StrategyError, "inside names the strategy of one step .*'tbptt:2'"),
    ({"name": "sltt", "inside": "leen"}, StrategyError, "got 'leen'. Did you mean lean"),
    ({"name": "bptt", "inside": "lean"}, StrategyError, "and bptt is no rule; leave inside out"),
    ({"grad_scale": 2.0}, StrategyError, "expected { name = ..., option = ... }, got"),
    ({"name": 3}, StrategyError, "expected a text"),
    (3, StrategyError, "expected a text such as 'lean:spikes', a table or a Strategy, got 3"),
]


@pytest.mark.parametrize(("text", "kind", "says"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_what_makes_no_sense(text, kind, says):
    with pytest.raises(kind, match=says) as refusal:
        parse_driver(text)
    assert "\n" not in str(refusal.value)


def test_names_are_told_in_one_way():
    assert tuple(RULES) == RULE_NAMES == tuple(dict.fromkeys(column.partition(":")[0] for column in COLUMNS))
    for column in COLUMNS:
        assert rule_name(parse_driver(column).rule) == column.partition(":")[0]
    for name, kind in RULES.items():
        assert kind.option is None or kind.option in kind.options, name
        assert kind.make() == parse_driver(name).rule


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_rule_is_no_strategy_of_a_model(name):
    net = create_model("har_mlp", norm="step_bn", hidden=8)
    with pytest.raises(StrategyError, match=rf"{name} is a rule, .* train with strategy='{name}' in a recipe, or call"):
        use_strategy(net, name)
    assert str(net.strategy) == "bptt"


def test_the_strategy_of_a_driver_is_set_on_the_model():
    net = create_model("har_mlp", norm="step_bn", hidden=8, strategy="lean")
    assert parse_driver("sltt").apply(net) is net
    assert str(net.strategy) == "lean", "a rule alone leaves the model as it is made"
    parse_driver({"name": "sltt", "inside": "checkpoint:2"}).apply(net)
    assert str(net.strategy) == "checkpoint:2"
    plain = nn.Linear(2, 2)
    assert parse_driver("bptt").apply(plain) is plain
    with pytest.raises(StrategyError, match="lean"):
        parse_driver({"name": "sltt", "inside": "lean"}).apply(plain)


def test_the_random_choice_is_made_once():
    assert parse_driver("sltt").drawn(5) == parse_driver("sltt")
    for text in ("bptt", None, "tbptt:2", "rate"):
        assert parse_driver(text).drawn(5) == parse_driver(text)
    choices = set()
    for seed in range(40):
        torch.manual_seed(seed)
        driver = parse_driver({"name": "sltt_k", "k": 2, "loss_norm": "T", "inside": "lean", "grad_scale": 2.0}).drawn(
            4
        )
        torch.manual_seed(seed)
        steps = RandomK(2).draw(4)
        assert driver.rule == sltt(sampler=GivenSteps(steps), loss_norm="T", grad_scale=2.0)
        assert driver.strategy == Strategy("lean")
        assert driver.rule.draw(4) == (steps, 4)
        assert rule_name(driver.rule) == "sltt_k", "a choice of steps keeps its row in the table of verdicts"
        choices.add(steps)
    assert len(choices) == 6
    with pytest.raises(OptionError, match="k of at most T = 4, the steps of the sequence, got 5"):
        parse_driver("sltt_k:5").drawn(4)


def driven(text, net, x, y, loss, **options):
    """(loss, gradients) of a batch, the random choice of steps from a fixed seed."""
    torch.manual_seed(5)
    value = parse_driver(text).run(net, x, y, loss, **options)
    assert not value.requires_grad
    return value, gradients(net)


def assert_same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    for name, g in wanted[1].items():
        assert torch.equal(got[1][name], g), name
    assert any(g.norm() > 0 for g in wanted[1].values())


@pytest.mark.parametrize("text", ["sltt", "sltt_k:2", "ottt", "ndot", "tbptt:3"])
def test_a_driver_of_steps_is_drive_to_the_bit(text):
    x, y = sample(T=5)
    net, other = dense_net((7, 8, 6)), dense_net((7, 8, 6))
    torch.manual_seed(5)
    outcome = drive(other, x, y, LOSS, parse_driver(text).rule)
    assert_same(driven(text, net, x, y, LOSS), (outcome.loss, gradients(other)))


@pytest.mark.parametrize("text", ["rate", "rate:sequence"])
def test_a_driver_of_rates_is_drive_rate_to_the_bit(text):
    x, y = sample(T=4, shape=(2, 8, 8))
    net, other = conv_net(), conv_net()
    outcome = drive_rate(other, x, y, RATE_LOSS, parse_driver(text).rule)
    assert_same(driven(text, net, x, y, RATE_LOSS), (outcome.loss, gradients(other)))


@pytest.mark.parametrize("text", [None, "bptt"])
def test_a_driver_without_a_rule_is_autograd_to_the_bit(text):
    x, y = sample(T=5)
    net = dense_net((7, 8, 6))
    value = LOSS(net(x), y).detach()
    assert_same(driven(text, net, x, y, LOSS), (value, bptt(net, x, y, LOSS)))


@pytest.mark.parametrize("text", [None, "sltt", "tbptt:2", "rate"])
def test_backward_and_surroundings_reach_what_runs(text):
    x, y = sample(T=4, shape=(2, 8, 8))
    loss, calls = RATE_LOSS if text == "rate" else LOSS, []

    class Around:
        def __enter__(self):
            calls.append("in")

        def __exit__(self, *error):
            calls.append("out")

    def doubled(value):
        calls.append("backward")
        (2 * value).backward()

    twice = driven(text, conv_net(), x, y, loss, backward=doubled, around=Around)
    once = driven(text, conv_net(), x, y, loss)
    assert_same((twice[0], {n: g / 2 for n, g in twice[1].items()}), once)
    backwards = {None: 1, "sltt": 4, "tbptt:2": 2, "rate": 1}[text]
    assert calls.count("backward") == backwards
    assert calls.count("in") == calls.count("out") == {None: 1, "sltt": 4, "tbptt:2": 4, "rate": 5}[text]
    assert all(calls[i - 1] == "out" for i, call in enumerate(calls) if call == "backward"), "backward runs outside"


def test_updates_are_called_where_weights_move_behind_every_step():
    x, y = sample(T=5)
    counts = {}
    for text in (None, "sltt", "sltt_k:3", "tbptt:2"):
        for every in ("sequence", "step")[: 1 if text is None else 2]:
            count = [0]
            table = None if text is None else {"name": text, "update_every": every}
            driven(table, dense_net(), x, y, LOSS, update=lambda count=count: count.__setitem__(0, count[0] + 1))
            counts[text, every] = count[0]
    assert counts == {
        (None, "sequence"): 0,
        ("sltt", "sequence"): 0,
        ("sltt", "step"): 5,
        ("sltt_k:3", "sequence"): 0,
        ("sltt_k:3", "step"): 3,
        ("tbptt:2", "sequence"): 0,
        ("tbptt:2", "step"): 3,
    }
    with pytest.raises(OptionError, match="update_every='step' goes with update="):
        parse_driver({"name": "sltt", "update_every": "step"}).run(dense_net(), x, y, LOSS)
