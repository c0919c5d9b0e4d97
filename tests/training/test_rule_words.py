"""The words of a rule in recipes and on the command line: what an option of one rule does to the next."""

import pytest

from spikefit import load_recipe
from spikefit.errors import RecipeError
from spikefit.training import build_driver


def written(start, **changes):
    recipe = load_recipe({"model": {"name": "har_mlp"}, "strategy": start}).override(changes)
    return str(build_driver(recipe)), recipe.strategy.model_dump()


def test_options_of_one_rule_do_not_move_to_another():
    for strategy, text, wanted in (
        ({"name": "sltt_k", "k": 2}, "sltt_k:3", "sltt_k:3"),
        ({"name": "tbptt", "k": 2}, "tbptt:4", "tbptt:4"),
        ({"name": "sltt_k", "k": 8}, "tbptt:2", "tbptt:2"),
        ({"name": "sltt_k", "k": 8}, "tbptt", "tbptt:2"),
        ({"name": "sltt_k", "sampler": "top_activity", "p": 0.5}, "sltt_k:3", "sltt_k:3"),
        ({"name": "rate", "mode": "sequence"}, "sltt", "sltt"),
        ({"name": "ndot", "lag": 1}, "ottt", "ottt"),
        ({"name": "sltt", "grad_scale": 2.0}, "bptt", "bptt"),
        ("lean:spikes", "sltt", "sltt"),
    ):
        found, section = written(strategy, strategy=text)
        assert found == wanted, (strategy, text)
        assert section == {"name": text}, (strategy, text)


def test_options_of_every_rule_stay_and_those_of_the_same_rule_too():
    assert written({"name": "sltt", "grad_scale": 2.0, "inside": "lean"}, strategy="ottt")[1] == {
        "name": "ottt",
        "grad_scale": 2.0,
        "inside": "lean",
    }
    assert written({"name": "sltt_k", "k": 2, "loss_norm": "T"}, strategy="sltt_k:3")[1] == {
        "name": "sltt_k:3",
        "loss_norm": "T",
    }
    assert written({"name": "tbptt", "k": 3}, strategy="tbptt")[0] == "tbptt:3"


def test_an_option_that_is_set_takes_the_place_of_the_one_behind_the_name():
    assert written("sltt_k:2", k="3")[0] == "sltt_k:3"
    assert written("sltt", **{"strategy.inside": "lean", "strategy": "tbptt:4", "k": "5"})[0] == "tbptt:5"
    with pytest.raises(RecipeError, match="unknown option 'lag'"):
        written("sltt", **{"strategy.lag": "1"})
