"""The study file: variants x data sets x seeds on top of one recipe, checked before anything runs."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefit.errors import DataError, RecipeError
from spikefit.training.files import write_json

KEYS = ("recipe", "seeds", "set", "train", "memory", "transfer", "pruning", "variants", "data")


@dataclass(frozen=True)
class Choice:
    """A named set of recipe keys: one variant, or one data set."""

    name: str
    set: dict[str, Any]


@dataclass(frozen=True)
class StudyFile:
    """A study file, read and checked.

    Attributes:
        name: the file's name without its ending.
        recipe: path of the recipe all cells start from, or the recipe itself as a dict.
        seeds: one run of every cell per seed.
        set: recipe keys set in all cells.
        train: whether cells are trained; if not, only bytes of their membranes are counted.
        memory: whether saved bytes and peak are measured too, once per variant and data set.
        transfer: whether the weights of every variant are evaluated under every other one.
        pruning: shares of weights that are set to zero in trained models, in [0, 1); empty for none.
        variants, data: the two axes of the table.
        text: the file itself.
    """

    name: str
    recipe: Path | dict[str, Any]
    seeds: tuple[int, ...]
    set: dict[str, Any]
    train: bool
    memory: bool
    transfer: bool
    pruning: tuple[float, ...]
    variants: tuple[Choice, ...]
    data: tuple[Choice, ...]
    text: str


@dataclass(frozen=True)
class Cell:
    """One training run of a study; `key` names its file and changes with any change of the recipe."""

    variant: str
    data: str
    seed: int
    recipe: Any
    key: str


def read_study(path: str | Path) -> StudyFile:
    """Read a study file.

    Args:
        path: TOML with recipe (path relative to the study file, or a table), and optionally seeds (default [0]),
            set, train (default true), memory, transfer, pruning, [[variants]] and [[data]] of name and set.

    Raises:
        RecipeError: no such file, no TOML, an unknown or missing key, a wrong type, a name or seed used twice, or a
            key without effect.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"study: expected a TOML file, cannot read {path} ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"study {path}: not valid TOML: {error}.") from error
    who = f"study {path.name}"
    _known(who, raw, KEYS)
    recipe = raw.get("recipe")
    if isinstance(recipe, str):
        recipe = path.parent / recipe
    elif not isinstance(recipe, dict):
        raise RecipeError(f'{who}: expected recipe = "path/to/recipe.toml" or a table [recipe], got {recipe!r}.')
    seeds = raw.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise RecipeError(f"{who}: expected seeds as a list of whole numbers such as [0, 1, 2], got {seeds!r}.")
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"{who}: every seed counts once, got {seeds}; remove the repeated ones.")
    train, memory = _switch(who, raw, "train", default=True), _switch(who, raw, "memory")
    transfer, pruning = _switch(who, raw, "transfer"), _shares(who, raw.get("pruning", []))
    variants = _choices(who, "variants", raw.get("variants", []))
    if not train:
        _check_untrained(who, raw)
    if transfer and len(variants) < 2:
        raise RecipeError(
            f"{who}: transfer = true evaluates the weights of one variant under another, and there are "
            f"{len(variants)} [[variants]]; give two or more, or remove it."
        )
    return StudyFile(
        path.stem,
        recipe,
        tuple(seeds),
        _settings(who, "set", raw.get("set", {})),
        train,
        memory,
        transfer,
        pruning,
        variants,
        _choices(who, "data", raw.get("data", [])),
        text,
    )


def make_cells(study: StudyFile, load: Callable[[Any], Any]) -> list[Cell]:
    """All runs of a study, in the order of the file; recipes are checked here, before the first run.

    Args:
        study: the study file, read.
        load: reads a recipe: `spikefit.training.load_recipe`.

    Raises:
        RecipeError: a recipe is not valid, or two variants are the same recipe.
    """
    base = load(study.recipe)
    cells: list[Cell] = []
    taken: dict[str, str] = {}
    for data in study.data or (Choice("", {}),):
        for variant in study.variants or (Choice("recipe", {}),):
            for seed in study.seeds:
                recipe = base.override({**study.set, **data.set, **variant.set, "seed": seed})
                content = recipe.to_dict()
                rows = data.name or str(content["data"].get("name", "no data"))
                cell = Cell(variant.name, rows, seed, recipe, recipe_key(content))
                label = f"{cell.variant} / {cell.data}"
                if cell.key in taken:
                    raise RecipeError(
                        f"study {study.name}: {taken[cell.key]!r} and {label!r} are the same recipe at seed {seed}; "
                        "change a key in one of them or remove it."
                    )
                taken[cell.key] = label
                cells.append(cell)
    return cells


def recipe_key(recipe: dict[str, Any]) -> str:
    """16 hexadecimal digits that change with any setting of the recipe, and not with the order of keys or `status`."""
    settings = {name: value for name, value in recipe.items() if name != "status"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _switch(who: str, raw: dict[str, Any], key: str, *, default: bool = False) -> bool:
    value = raw.get(key, default)
    if type(value) is not bool:
        raise RecipeError(f"{who}: expected {key} = true or false, got {value!r}.")
    return value


def _shares(who: str, raw: Any) -> tuple[float, ...]:
    fits = isinstance(raw, list) and all(type(one) in (int, float) and 0 <= one < 1 for one in raw)
    if not fits or len(set(raw)) < len(raw):
        raise RecipeError(
            f"{who}: expected pruning as a list of different shares of weights from 0 to below 1, such as "
            f"[0.0, 0.5, 0.9], got {raw!r}."
        )
    return tuple(map(float, raw))


def _check_untrained(who: str, raw: dict[str, Any]) -> None:
    """Refuse keys that have no effect where nothing is trained."""
    found = [key for key in ("memory", "transfer", "pruning") if raw.get(key)]
    found += ["seeds"] if len(raw.get("seeds", [])) > 1 else []
    if found:
        raise RecipeError(
            f"{who}: with train = false nothing is trained and bytes of membranes are counted from shapes, so "
            f"{found[0]} has no effect; remove it, or train."
        )


def once(file: Path, cell: Cell, run: Callable[[], dict[str, Any]], *, again: bool = False) -> dict[str, Any]:
    """What `file` holds of `cell`, made by `run` if there is no such file or it is to be made `again`.

    Raises:
        DataError: the file is damaged, or of another recipe.
    """
    if again or not file.exists():
        write_json(file, {"recipe": cell.recipe.to_dict(), "result": run()})
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if recipe_key(stored["recipe"]) == cell.key:
            return stored["result"]
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"study: {file} is damaged or was edited; delete it and start the study again to repeat that run.")


def _choices(who: str, axis: str, raw: Any) -> tuple[Choice, ...]:
    if not isinstance(raw, list) or any(not isinstance(one, dict) for one in raw):
        raise RecipeError(f"{who}: expected [[{axis}]] tables with name and set, got {raw!r}.")
    choices = []
    for one in raw:
        _known(f"{who}, [[{axis}]]", one, ("name", "set"))
        if not isinstance(one.get("name"), str) or not one["name"]:
            raise RecipeError(f"{who}: every one of [[{axis}]] needs a name, got {one}.")
        choices.append(Choice(one["name"], _settings(who, f"{axis} {one['name']!r}: set", one.get("set", {}))))
    names = [choice.name for choice in choices]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"{who}: two of [[{axis}]] are named {repeated[0]!r}; give each its own name.")
    return tuple(choices)


def _settings(who: str, where: str, raw: Any) -> dict[str, Any]:
    """{"neuron.tau": 2.0} or {"neuron": {"tau": 2.0}} as dotted keys."""
    if not isinstance(raw, dict):
        raise RecipeError(f'{who}: expected {where} = {{ "section.key" = value }}, got {raw!r}.')
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in _settings(who, where, value).items()}
        else:
            flat[key] = value
    if "seed" in flat:
        raise RecipeError(f"{who}: {where} holds seed = {flat['seed']!r}; list seeds once, as seeds = [...].")
    return flat


def _known(who: str, raw: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in raw:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(f"{who}: unknown key {key!r}; known: {', '.join(keys)}.{hint}")
