"""The floor plan as a test: imports go one way, importing does nothing, and the public names are the listed ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spikefit

SOURCE = Path(spikefit.__file__).parent

# rooms in import order; a room imports only from rooms before it, and from itself
ROOMS = [
    "errors",
    "ops",
    "neurons",
    "layers",
    "engines",
    "models",
    "data",
    "encoding",
    "losses",
    "rules",
    "planning",
    "training",
    "reporting",
    "cli",
]
DATA_ROOMS = {"data", "encoding", "losses"}

PUBLIC = {
    "IF",
    "LIF",
    "LeakyReadout",
    "ParametricLIF",
    "Plan",
    "ResidualBlock",
    "SpikefitError",
    "SpikingConv1d",
    "SpikingConv2d",
    "SpikingLinear",
    "SpikingNetwork",
    "Strategy",
    "compare",
    "create_model",
    "doctor",
    "evaluate",
    "lif",
    "load_dataset",
    "load_recipe",
    "pack_saved_tensors",
    "plan",
    "predict",
    "profile",
    "report",
    "study",
    "train",
    "use_backend",
    "use_strategy",
    "verify",
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms named in any import of the file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "spikefit" else [f"spikefit.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("spikefit.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, f"{room} is no room of the floor plan"
    before = set(ROOMS[: ROOMS.index(room) + 1])
    if room in DATA_ROOMS:
        before = {room, "errors"}
    assert imported_rooms(path) - {"__version__"} <= before, f"{path} imports from a later room"


def test_every_room_is_in_the_floor_plan():
    here = {
        p.name.removesuffix(".py") for p in SOURCE.iterdir() if not p.name.startswith("__") and p.suffix in ("", ".py")
    }
    assert here == set(ROOMS)
    assert set(spikefit._ROOMS) == set(ROOMS) - {"cli"}
    plan = (SOURCE.parents[1] / "docs" / "floor_plan.md").read_text()
    for room in ROOMS:
        assert f"`{room}" in plan, f"docs/floor_plan.md says nothing about {room}"


def test_public_names_are_the_listed_ones():
    assert set(spikefit.__all__) - {"__version__"} == PUBLIC
    for name in PUBLIC:
        assert getattr(spikefit, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="public names"):
        spikefit.trian  # noqa: B018


def test_no_folder_is_deeper_than_two_levels():
    assert max(len(p.relative_to(SOURCE).parts) for p in SOURCE.rglob("*.py")) <= 3


def test_import_loads_nothing_but_torch_and_numpy():
    heavy = [
        "numba",
        "triton",
        "lightning_fabric",
        "pydantic",
        "typer",
        "rich",
        "plotly",
        "sklearn",
        "PIL",
        "safetensors",
    ]
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import os; env = dict(os.environ)\n"
        "import spikefit, spikefit.data, spikefit.encoding, spikefit.losses, spikefit.models, spikefit.planning\n"
        f"added = [m for m in {heavy!r} if m in set(sys.modules) - before]\n"
        "assert not added, added\n"
        "assert dict(os.environ) == env\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
