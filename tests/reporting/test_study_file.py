"""The study file: read, checked, and every mistake named."""

import pytest

from spikefit.errors import RecipeError
from spikefit.reporting.study_file import read_study, recipe_key

GOOD = """
recipe = "demo.toml"
seeds = [0, 3]
set = { "train.epochs" = 1 }
[[variants]]
name = "slow"
set = { neuron = { tau = 4.0 }, "train.lr" = 0.1 }
[[variants]]
name = "plain"
[[data]]
name = "digits"
set = { "data.name" = "digits" }
"""


def read(tmp_path, text):
    path = tmp_path / "tau.toml"
    path.write_text(text)
    return read_study(path)


def test_reads_all_keys(tmp_path):
    study = read(tmp_path, GOOD)
    assert study.name == "tau"
    assert study.recipe == tmp_path / "demo.toml"
    assert study.seeds == (0, 3)
    assert study.set == {"train.epochs": 1}
    assert [(v.name, v.set) for v in study.variants] == [("slow", {"neuron.tau": 4.0, "train.lr": 0.1}), ("plain", {})]
    assert study.data[0].set == {"data.name": "digits"}
    assert not study.memory
    assert study.text == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds", "seed"), r"unknown key 'seed'; known: recipe, seeds.* Did you mean seeds\?"),
        (("[0, 3]", "[0, 0]"), "every seed counts once"),
        (("[0, 3]", "[]"), "list of whole numbers"),
        (("[0, 3]", "[0.5]"), "list of whole numbers"),
        (("[0, 3]", "true"), "list of whole numbers"),
        (('recipe = "demo.toml"', ""), "expected recipe ="),
        (('"plain"', '"slow"'), "two of .* are named 'slow'"),
        (('name = "plain"', 'nam = "plain"'), r"unknown key 'nam'.* Did you mean name\?"),
        (('name = "plain"', ""), "needs a name"),
        (('{ "train.epochs" = 1 }', "3"), "expected set = "),
        (('"train.lr" = 0.1', "seed = 1"), "list seeds once"),
        (("seeds = [0, 3]", "seeds = [0, 3"), "not valid TOML"),
        (("seeds = [0, 3]", "memory = 1"), "memory = true or false"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    assert change[0] in GOOD
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, GOOD.replace(*change))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read .*none\.toml"):
        read_study(tmp_path / "none.toml")


def test_key_follows_values_not_order():
    key = recipe_key({"a": 1, "b": {"c": 2.0, "d": 3}})
    assert key == recipe_key({"b": {"d": 3, "c": 2.0}, "a": 1})
    assert key != recipe_key({"a": 1, "b": {"c": 2.5, "d": 3}})
    assert key == recipe_key({"status": "measured", "a": 1, "b": {"c": 2.0, "d": 3}})
    assert len(key) == 16
