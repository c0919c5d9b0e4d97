"""spikefit: train any spiking neural network in the memory you have.

The names below are the public ones; everything else is reached through its room: `spikefit.encoding.repeat`.
Importing the package needs torch and numpy only; a name whose room needs more is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikefit.data import load_dataset as load_dataset
    from spikefit.engines import Plan as Plan
    from spikefit.engines import Strategy as Strategy
    from spikefit.engines import pack_saved_tensors as pack_saved_tensors
    from spikefit.errors import SpikefitError as SpikefitError
    from spikefit.layers import ResidualBlock as ResidualBlock
    from spikefit.layers import SpikingConv1d as SpikingConv1d
    from spikefit.layers import SpikingConv2d as SpikingConv2d
    from spikefit.layers import SpikingLinear as SpikingLinear
    from spikefit.models import SpikingNetwork as SpikingNetwork
    from spikefit.models import create_model as create_model
    from spikefit.models import use_strategy as use_strategy
    from spikefit.neurons import IF as IF
    from spikefit.neurons import LIF as LIF
    from spikefit.neurons import LeakyReadout as LeakyReadout
    from spikefit.neurons import ParametricLIF as ParametricLIF
    from spikefit.ops.dispatch import use_backend as use_backend
    from spikefit.ops.lif import lif as lif
    from spikefit.planning import doctor as doctor
    from spikefit.planning import plan as plan
    from spikefit.planning import profile as profile
    from spikefit.planning import report as report
    from spikefit.planning import verify as verify
    from spikefit.reporting import compare as compare
    from spikefit.reporting import study as study
    from spikefit.training import evaluate as evaluate
    from spikefit.training import load_recipe as load_recipe
    from spikefit.training import predict as predict
    from spikefit.training import train as train

__version__ = "0.1.0"

# public name -> room it lives in
_ROOM = {
    "IF": "neurons",
    "LIF": "neurons",
    "LeakyReadout": "neurons",
    "ParametricLIF": "neurons",
    "Plan": "engines",
    "ResidualBlock": "layers",
    "SpikefitError": "errors",
    "SpikingConv1d": "layers",
    "SpikingConv2d": "layers",
    "SpikingLinear": "layers",
    "SpikingNetwork": "models",
    "Strategy": "engines",
    "compare": "reporting",
    "create_model": "models",
    "doctor": "planning",
    "evaluate": "training",
    "lif": "ops.lif",
    "load_dataset": "data",
    "load_recipe": "training",
    "pack_saved_tensors": "engines",
    "plan": "planning",
    "predict": "training",
    "profile": "planning",
    "report": "planning",
    "study": "reporting",
    "train": "training",
    "use_backend": "ops.dispatch",
    "use_strategy": "models",
    "verify": "planning",
}

# rooms reached as attributes: spikefit.encoding.repeat
_ROOMS = (
    "data",
    "encoding",
    "engines",
    "errors",
    "layers",
    "losses",
    "models",
    "neurons",
    "ops",
    "planning",
    "reporting",
    "rules",
    "training",
)

__all__ = [*_ROOM, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOM:
        return getattr(import_module(f"spikefit.{_ROOM[name]}"), name)
    if name in _ROOMS:
        return import_module(f"spikefit.{name}")
    raise AttributeError(f"module 'spikefit' has no attribute {name!r}; public names: {', '.join(sorted(_ROOM))}.")


def __dir__() -> list[str]:
    return sorted([*_ROOM, *_ROOMS, "__version__"])
