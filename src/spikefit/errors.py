"""Errors: each message says who, what was expected, what came, and what to do next.

Every error a user can cause is a `SpikefitError`; the command line prints its one sentence instead of a traceback.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SpikefitError(Exception):
    """Base of all errors raised on purpose."""


class ShapeError(SpikefitError, ValueError):
    """A tensor has the wrong rank, size or dtype."""


class StateError(SpikefitError, ValueError):
    """A membrane handed in does not belong to this input or model."""


class OptionError(SpikefitError, ValueError):
    """An option has an unknown name or a value outside its range."""


class RecipeError(SpikefitError, ValueError):
    """A recipe or study file has an unknown key, a missing key or a wrong type."""


class DataError(SpikefitError):
    """A data file is missing, truncated, unsafe or empty."""


class BackendError(SpikefitError, RuntimeError):
    """A backend that was asked for by name cannot run this call."""


class StrategyError(SpikefitError, ValueError):
    """A strategy does not apply to this model."""


class RangeError(SpikefitError, ValueError):
    """A number has left the range in which arithmetic on a grid is exact."""


class ReconstructionError(SpikefitError, RuntimeError):
    """Backward did not get back what forward had, so that its gradient would be wrong."""


class PlanError(SpikefitError, ValueError):
    """A plan does not belong to this model, or none can be made for it."""


class BudgetError(PlanError):
    """No plan fits the budget; the message says what would."""


class CheckpointError(SpikefitError):
    """A checkpoint is damaged or belongs to another model."""


class TrainingError(SpikefitError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class RuleWarning(UserWarning):
    """A rule runs, and its gradient is further from BPTT, or costs more, than one may think."""


def check_choice(who: str, name: str, value: object, known: Iterable[object]) -> None:
    """Raise OptionError, in the name of `who`, unless the option `name` has one of the `known` values."""
    known = list(known)
    if value not in known:
        raise OptionError(f"{who}: {name} must be one of {', '.join(map(str, known))}, got {value!r}.")


@contextmanager
def named(who: str) -> Iterator[None]:
    """Errors raised on purpose within the block begin with `who`: the layer, where an operation does not know it."""
    try:
        yield
    except SpikefitError as error:
        raise type(error)(f"{who}: {error}") from None
