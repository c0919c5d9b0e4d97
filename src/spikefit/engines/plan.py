"""A plan: what every unit of one model keeps for backward. Made by `spikefit.plan`; a value that saves and loads."""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikefit.errors import PlanError
from spikefit.layers import KEEPS, SpikingUnit
from spikefit.layers.keeping import Keeping

SCHEMA = 1


@dataclass(frozen=True)
class UnitPlan:
    """The choice for one unit.

    Attributes:
        name: path of the unit in the model.
        keep: "all", "input" or "spikes".
        kept_bytes: what the unit holds between forward and backward under this choice.
        weight: shape of its weight, by which a plan knows the model again.
        reason: why, in one line.
    """

    name: str
    keep: str
    kept_bytes: int
    weight: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """Choices for all units of a model, and what was predicted for them.

    Attributes:
        budget_bytes: what the step may take, weights and optimiser included; None if none was given.
        static_bytes: weights, buffers, optimiser slots and input, which exist before the step.
        predicted_peak_bytes: peak of the step above that level: gradients, what is kept, and working memory.
        predicted_slowdown: step time over that of plain BPTT, from the number of operations.
        units: one choice per unit, in the order of the network.
        sample: shape of the input [T, B, ...] it was made for.
        dtype: of the input.
        notes: what the prediction assumed.
        explanation: which unit sets the peak, and the next plan that is faster.
    """

    budget_bytes: int | None
    static_bytes: int
    predicted_peak_bytes: int
    predicted_slowdown: float
    units: list[UnitPlan]
    sample: tuple[int, ...]
    dtype: str
    notes: list[str] = field(default_factory=list)
    explanation: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module) -> nn.Module:
        """Let every unit of `model` keep what the plan says, whatever its strategy was, in place.

        Outputs and `state_dict` stay the same.

        Raises:
            PlanError: the plan was made for another model; the differences are listed.
        """
        from spikefit.engines.strategy import Strategy  # that module reads plans, so it imports this one

        found = {name: tuple(unit.synapse.weight.shape) for name, unit in planned_units(model)}
        wanted = {u.name: tuple(u.weight) for u in self.units}
        differences = [
            f"{name or '(model)'}: plan {wanted.get(name, 'none')}, model {found.get(name, 'none')}"
            for name in dict.fromkeys([*wanted, *found])
            if wanted.get(name) != found.get(name)
        ]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise PlanError(
                f"plan: it was made for another model; weights differ at {'; '.join(differences[:3])}{more}. "
                "Make one for this model with spikefit.plan."
            )
        keeps = {u.name: u.keep for u in self.units}
        for name, module in model.named_modules():
            if isinstance(module, SpikingUnit):
                # a current without a neuron is computed by the unit that adds it, and kept as that one says
                module.keep = keeps.get(name, "all" if set(keeps.values()) == {"all"} else "spikes")
            elif isinstance(getattr(module, "strategy", None), Strategy):
                module.strategy = Strategy("lean")  # a network that ran its units under another strategy
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        """Back to plain BPTT, in place."""
        for module in model.modules():
            if isinstance(module, Keeping):
                module.keep = "all"
        return model

    def explain(self) -> str:
        """One line per unit with the reason, then what sets the peak and what would come next."""
        width = max((len(u.name) for u in self.units), default=0)
        lines = [f"{u.name.ljust(width)}  {u.keep.ljust(6)}  {u.reason}" for u in self.units]
        return "\n".join([*lines, *self.explanation, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return {"schema": SCHEMA, "spikefit": version("spikefit"), "torch": torch.__version__, **asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON.

        Raises:
            PlanError: the place cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise PlanError(f"plan: cannot write {path} ({error.strerror}); choose another place.") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            PlanError: no such file, or not a plan.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["schema"] != SCHEMA:
                raise PlanError(f"plan: {path} has schema {content['schema']}, expected {SCHEMA}; make it again.")
            units = [UnitPlan(**{**u, "weight": tuple(u["weight"])}) for u in content.pop("units")]
            rest = {k: v for k, v in content.items() if k not in ("schema", "spikefit", "torch")}
            made = cls(**{**rest, "units": units, "sample": tuple(rest["sample"])})
        except PlanError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(f"plan: {path} is no saved plan ({type(error).__name__}: {error}).") from None
        unknown = [u.keep for u in units if u.keep not in KEEPS]
        if unknown:
            raise PlanError(f"plan: {path} keeps {unknown[0]!r}; expected one of {', '.join(KEEPS)}.")
        return made


def planned_units(model: nn.Module) -> list[tuple[str, SpikingUnit]]:
    """The units that fire, by path; a unit without a neuron belongs to the one that adds its current."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, SpikingUnit) and m.neuron is not None]
