"""What `list` and `env` tell."""

import os
import platform
from importlib import metadata
from typing import Any

from spikefit.errors import OptionError

Row = dict[str, Any]


def listing(what: str | None, model: str | None, changes: dict[str, str] | None = None) -> list[Row]:
    """Rows of one kind of thing; without a kind, what can be listed.

    Args:
        what: a key of `KINDS`.
        model: for strategies, the model that they are asked to apply to, or a recipe.
        changes: settings of the model, with the keys of a recipe.

    Raises:
        OptionError: an unknown kind; near ones are listed.
    """
    from spikefit.training.options import near

    if what is None:
        return [{"name": name, "summary": summary} for name, (summary, _) in KINDS.items()]
    if what not in KINDS:
        raise OptionError(f"list: expected one of {', '.join(KINDS)}, got {what!r}.{near(what, KINDS)}")
    if model is not None and what != "strategies":
        raise OptionError(f"list: only 'list strategies' takes a model, got {model!r} behind {what!r}.")
    if model is not None:
        return _strategies_for(model, changes or {})
    return KINDS[what][1]()


def _models() -> list[Row]:
    from spikefit.models import MODELS
    from spikefit.models.table import model_options

    return [{"name": n, "summary": kind.summary, "options": ", ".join(model_options(n))} for n, kind in MODELS.items()]


def _presets() -> list[Row]:
    from spikefit.models.table import PRESETS

    return [{"name": n, "summary": preset.summary} for n, preset in PRESETS.items()]


def _strategies() -> list[Row]:
    from spikefit.engines import STRATEGIES
    from spikefit.rules import RULES

    rows = [
        {"name": n, "gradient": "exact" if kind.exact else "approximate", "summary": kind.summary}
        for n, kind in STRATEGIES.items()
    ]
    return rows + [{"name": n, "gradient": "approximate", "summary": kind.summary} for n, kind in RULES.items()]


def _rules() -> list[Row]:
    from spikefit.rules import verdict_rows

    return verdict_rows()


def _strategies_for(model: str, changes: dict[str, str]) -> list[Row]:
    """Every strategy with yes, or no and why, for one model."""
    from spikefit.cli.targets import read_recipe
    from spikefit.engines import STRATEGIES, parse_strategy
    from spikefit.errors import StrategyError
    from spikefit.models import SpikingNetwork, use_strategy
    from spikefit.rules import RULES, parse_driver
    from spikefit.training import build_loss, build_model

    recipe = read_recipe(model, changes)
    network, rows = build_model(recipe, learns=False), []
    for name, kind in STRATEGIES.items():
        try:
            use_strategy(network, name)
            applies = "yes"
        except StrategyError as error:
            applies = f"no: {error}"
        exact = all(parse_strategy(name).exact_on(m.chain) for m in network.modules() if isinstance(m, SpikingNetwork))
        gradient = "exact" if exact and kind.exact else "approximate"
        rows.append({"name": name, "applies": applies, "gradient": gradient, "summary": kind.summary})
    network = build_model(recipe, learns=False)  # under the strategy that it is made with, or that of the recipe
    for name, rule in RULES.items():
        try:
            notes = parse_driver(name).notes(network, build_loss(recipe, network), timesteps=recipe.encoding.timesteps)
            applies = "; ".join(["yes", *map(str, notes)])
        except StrategyError as error:
            applies = f"no: {error}"
        rows.append({"name": name, "applies": applies, "gradient": "approximate", "summary": rule.summary})
    return rows


def _neurons() -> list[Row]:
    from spikefit.neurons import NEURONS
    from spikefit.neurons.table import neuron_options

    return [
        {"name": n, "summary": (cls.__doc__ or "").splitlines()[0], "options": ", ".join(sorted(neuron_options(cls)))}
        for n, cls in NEURONS.items()
    ]


def _norms() -> list[Row]:
    from spikefit.layers import NORMS, create_norm

    summaries = {
        "bn": "batch norm over time, batch and space",
        "tdbn": "the same, weight starting at v_threshold",
        "step_bn": "batch norm of every step apart",
        "osr": "running statistics forward, batch norm of every step backward",
        "ws": "none; the weight is standardised",
        "none": "none; the weight has a bias",
    }
    scopes = {n: getattr(create_norm(n, 1), "time_scope", "none") for n in NORMS}
    return [{"name": n, "time_scope": scopes[n], "summary": summaries[n]} for n in NORMS]


def _surrogates() -> list[Row]:
    from spikefit.ops.surrogate import MAKERS

    return [{"name": str(make()), "summary": (make.__doc__ or "").splitlines()[0]} for make in MAKERS.values()]


def _data() -> list[Row]:
    from spikefit.data import DATASETS, dataset_options

    return [
        {"name": n, "summary": kind.summary, "options": ", ".join(dataset_options(n))} for n, kind in DATASETS.items()
    ]


def _encodings() -> list[Row]:
    from spikefit.encoding import ENCODINGS

    return [{"name": n, "summary": (f.__doc__ or "").splitlines()[0]} for n, f in ENCODINGS.items()]


def _losses() -> list[Row]:
    from spikefit.losses import LOSSES

    return [{"name": n, "summary": (cls.__doc__ or "").splitlines()[0]} for n, cls in LOSSES.items()]


def _backends() -> list[Row]:
    import torch

    from spikefit.ops import dispatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1, 1, device=device)
    refusals = {
        "reference": None,
        "numba": dispatch.numba_refusal(torch.empty(1, 1)),
        "triton": dispatch.auto_triton_refusal(x),
    }
    summaries = {"reference": "plain torch, the meaning", "numba": "CPU", "triton": "CUDA"}
    return [
        {"name": n, "runs here": "yes" if r is None else f"no: {r}", "summary": summaries[n]}
        for n, r in refusals.items()
    ]


def _recipes() -> list[Row]:
    from pathlib import Path

    from spikefit.training import load_recipe

    found = sorted(Path("recipes").glob("*.toml"))
    if not found:
        raise OptionError("list: expected a folder recipes/ with .toml files here, found none.")
    rows = []
    for path in found:
        recipe = load_recipe(path)
        rows.append({"name": str(path), "model": recipe.model.name, "data": recipe.data.name, "status": recipe.status})
    return rows


KINDS: dict[str, tuple[str, Any]] = {
    "models": ("networks of the zoo", _models),
    "presets": ("neuron and norm of published networks", _presets),
    "strategies": ("how gradients are obtained", _strategies),
    "rules": ("which rule goes with which part: yes, note (it runs, with a remark), no", _rules),
    "neurons": ("neuron equations", _neurons),
    "norms": ("norms", _norms),
    "surrogates": ("slopes of the spike in backward", _surrogates),
    "data": ("data sets", _data),
    "encodings": ("from samples to sequences", _encodings),
    "losses": ("losses", _losses),
    "backends": ("which kernels run here", _backends),
    "recipes": ("recipe files of this folder", _recipes),
}

PACKAGES = (
    "numba",
    "triton",
    "lightning-fabric",
    "safetensors",
    "pydantic",
    "rich",
    "typer",
    "plotly",
    "scikit-learn",
    "pillow",
    "torchvision",
)


def environment_rows() -> list[Row]:
    """Versions, device, threads, backends and optional packages."""
    import numpy as np
    import torch

    import spikefit

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "spikefit": spikefit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cuda device": cuda,
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "SPIKEFIT_DATA": os.environ.get("SPIKEFIT_DATA", "not set; data are looked for in ./data"),
    }
    facts |= {f"backend {row['name']}": row["runs here"] for row in _backends()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return [{"name": name, "value": value} for name, value in facts.items()]
