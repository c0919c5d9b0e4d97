"""Errors: each message says who, what was expected, what came, and what to do next.

Every error a user can cause is a `SpikefitError`; the command line prints its one sentence instead of a traceback.
"""


class SpikefitError(Exception):
    """Base of all errors raised on purpose."""


class ShapeError(SpikefitError, ValueError):
    """A tensor has the wrong rank, size or dtype."""


class StateError(SpikefitError, ValueError):
    """A membrane handed in does not belong to this input or model."""


class RangeError(SpikefitError):
    """A number left the range in which its arithmetic is exact."""


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


class PlanError(SpikefitError, ValueError):
    """A plan does not belong to this model, or none can be made for it."""


class BudgetError(PlanError):
    """No plan fits the budget; the message says what would."""


class CheckpointError(SpikefitError):
    """A checkpoint is damaged or belongs to another model."""


class TrainingError(SpikefitError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""
