"""The key=value grammar of the command line: which key of the recipe a word means, and how its value is read."""

import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from spikefit.data import DATASETS
from spikefit.encoding import ENCODINGS
from spikefit.errors import RecipeError
from spikefit.losses import LOSSES
from spikefit.models import MODELS
from spikefit.neurons import NEURONS
from spikefit.neurons.table import neuron_options
from spikefit.rules import RULES
from spikefit.rules.table import COMMON
from spikefit.training.options import annotations, fixed_parts, preset_for, takes_none, unknown_key
from spikefit.training.recipe import NeuronSection, Recipe, data_options

# Short forms that are no key of any section, or one of several.
ALIASES = {
    "batch": "data.batch_size",
    "timesteps": "encoding.timesteps",
    "image": "model.input_shape",
    "shape": "model.input_shape",
    "classes": "model.num_classes",
}
NAMED = tuple(s for s in Recipe.SECTIONS if s != "train")


def apply_changes(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `recipe` with `changes` made, as a dictionary that `load_recipe` checks.

    Raises:
        RecipeError: a key that no section knows, or two keys that mean the same.
    """
    values = recipe.to_dict()
    rest: dict[str, Any] = {}
    given: dict[tuple[str, str], str] = {}
    model = str(changes.get("model", changes.get("model.name", values["model"]["name"])))
    for section in fixed_parts(model):
        values[section] = {}
    if "preset" in changes:
        preset = preset_for(model, str(changes["preset"]))
        values |= {"neuron": dict(preset.neuron), "norm": {"name": preset.norm}}
    for key, value in changes.items():
        if key == "preset":
            continue
        section, _, field = (f"{key}.name" if key in NAMED else key).partition(".")
        if field == "name" and section in NAMED:
            _once(given, (section, field), key)
            _rename(values, section, str(value))
        else:
            rest[key] = value
    for key, value in rest.items():
        section, field = locate(key, values)
        _once(given, (section, field), key)
        read = _read(value, _annotation(section, field, values))
        if section == "strategy":
            # an option that is set takes the place of the one behind the name
            name = str(values["strategy"].get("name", "")).partition(":")[0]
            if name in RULES and RULES[name].option == field:
                values["strategy"] = {**values["strategy"], "name": name}
        if section:
            values[section] = {**values[section], field: read}
        else:
            values[field] = read
    return values


def _once(given: dict[tuple[str, str], str], place: tuple[str, str], key: str) -> None:
    """Note that `key` fills `place`; refuse a second key for it."""
    if place in given:
        raise RecipeError(f"recipe: {given[place]!r} and {key!r} mean the same; keep one.")
    given[place] = key


def locate(key: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """(section, key in it) of a dotted or flat `key`; the section is "" for keys outside of all.

    Raises:
        RecipeError: nobody knows `key`.
    """
    dotted = ALIASES.get(key, key)
    section, dot, field = dotted.partition(".")
    if dot and section in Recipe.SECTIONS and field:
        return section, field
    known = known_keys(values)
    if dotted in known:
        return known[dotted], dotted
    if ":" in values["model"].get("name", ""):
        # a factory of the user's own: whatever no section knows is an option of it
        return "model", dotted
    raise RecipeError(f"recipe: {unknown_key(key, sorted({*known, *ALIASES, *NAMED, 'preset'}))}")


def known_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Flat key -> its section, for a recipe with these values; where two know a key, the declared one counts."""
    found: dict[str, str] = {}
    for section in ("strategy", "loss", "encoding", "data", "model"):
        found |= dict.fromkeys(_options_of(section, values[section].get("name")), section)
    for section in Recipe.SECTIONS:
        found |= {field: section for field in _fields(section) if field != "name"}
    found |= {field: "" for field in Recipe.model_fields if field not in Recipe.SECTIONS}
    return found


def _rename(values: dict[str, Any], section: str, name: str) -> None:
    """Give `section` another name; options the new thing does not take go, so that none has to be unset by hand."""
    taken = set(_options_of(section, name)) | {"batch_size", "drop_last", "root"}
    if section == "model" and ":" in name:
        taken = set()
    # the shape and statistics of a data set belong to it alone
    if section == "data" and name != values["data"].get("name"):
        taken -= {"mean", "std"}
        values["model"] = {k: v for k, v in values["model"].items() if k not in ("num_classes", "input_shape")}
    kept = values[section]
    if section == "neuron" and name != kept.get("name", "lif"):
        # defaults differ between neurons, and the recipe holds those of the last one written out
        usual = NeuronSection(name=kept.get("name", "lif")).model_dump()
        kept = {k: v for k, v in kept.items() if v != usual[k]}
    if section == "strategy":
        taken &= _kept_of_rule(name, kept.get("name"))
    values[section] = {"name": name, **{k: v for k, v in kept.items() if k in taken}}


def _kept_of_rule(name: str, before: str | None) -> set[str]:
    """Options that a rule keeps under its next name: those of every rule; of the same rule all but what is named."""
    rule, _, option = name.partition(":")
    if rule not in RULES:
        return set()
    if rule != str(before).partition(":")[0]:
        return {*COMMON, "inside"}
    chosen = {RULES[rule].option, "sampler", "p"} if option else set()
    return {*RULES[rule].options, "inside"} - chosen


def _options_of(section: str, name: str | None) -> dict[str, Any]:
    """Option -> type of what the section names; nothing where the name is unknown, which the recipe then reports."""
    if section == "neuron" and name in NEURONS:
        return dict.fromkeys(neuron_options(NEURONS[name]), Any)
    if section == "data":
        return data_options(name) if name in DATASETS else {}
    if section == "strategy":
        rule = RULES.get((name or "").partition(":")[0])
        return {} if rule is None else {**rule.options, "inside": str}
    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "model": {k: kind.make for k, kind in MODELS.items()},
        "encoding": ENCODINGS,
        "loss": LOSSES,
    }
    # a loss without a name follows the model; what all of them take can be set all the same
    make = tables.get(section, {}).get(name or ("ce_mean" if section == "loss" else ""))
    return {} if make is None else {k: v for k, v in annotations(make).items() if k not in NAMED}


def _fields(section: str) -> dict[str, FieldInfo]:
    return Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def _annotation(section: str, field: str, values: Mapping[str, Any]) -> Any:
    fields = _fields(section) if section else Recipe.model_fields
    if field in fields:
        return fields[field].annotation
    return _options_of(section, values[section].get("name")).get(field, Any)


def _read(value: Any, annotation: Any) -> Any:
    """A Python value of a text; texts stay texts where the key takes nothing else."""
    # a recipe keeps "none" as a text, which TOML can hold
    if not isinstance(value, str) or (value.strip() == "none" and takes_none(annotation)):
        return value
    kinds = {annotation}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = set(typing.get_args(annotation))
    kinds -= {type(None)}
    if kinds == {str}:
        return value
    if {typing.get_origin(kind) for kind in kinds} <= {list, tuple}:
        return _list(value)
    return _scalar(value)


def _list(text: str) -> Any:
    """3x32x32, [32, 64], 32,64 or a single entry."""
    text = text.strip()
    if re.fullmatch(r"\d+(x\d+)+", text):
        return [int(side) for side in text.split("x")]
    return [_scalar(entry) for entry in text.removeprefix("[").removesuffix("]").split(",") if entry.strip()]


def _scalar(text: str) -> Any:
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
