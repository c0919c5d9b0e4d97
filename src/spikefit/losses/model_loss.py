"""The loss of a model: one forward, and the loss called with what it reads."""

from collections.abc import Callable

from torch import Tensor, nn

from spikefit.errors import OptionError

# (logits [T, B, K], targets [B]) -> scalar; one that declares `reads_auxiliary` also gets auxiliary logits [n, B, K]
LossFunction = Callable[..., Tensor]


def auxiliary_heads(model: nn.Module) -> int:
    """How many auxiliary heads `model` has, or the model inside a data-parallel wrapper; 0 if it does not say."""
    inner = model if hasattr(model, "auxiliary_heads") else getattr(model, "module", model)
    heads = getattr(inner, "auxiliary_heads", 0)
    return heads if isinstance(heads, int) else 0


def loss_of(model: nn.Module, loss: LossFunction, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward and its loss, called with what it reads.

    Args:
        model: [T, B, ...] -> logits [T, B, K]; with auxiliary heads, `model(x, auxiliary=True)` gives the pair
            (logits, auxiliary logits [n, B, K]).
        loss: (logits, targets) -> scalar; with `reads_auxiliary`, (logits, targets, auxiliary logits) -> scalar.
        x, y: input [T, B, ...] and targets.

    Returns:
        (value, outputs); outputs are (logits,), or (logits, auxiliary logits) for a loss that reads them.

    Raises:
        OptionError: the loss reads auxiliary logits and the model has no auxiliary heads.
    """
    if not getattr(loss, "reads_auxiliary", False):
        logits = model(x)
        return loss(logits, y), (logits,)
    if not auxiliary_heads(model):
        raise OptionError(
            f"{type(loss).__name__}: expected a model with auxiliary heads, got {type(model).__name__} with none; use "
            "CrossEntropyMean, in a recipe loss=ce_mean."
        )
    logits, auxiliary = model(x, auxiliary=True)
    return loss(logits, y, auxiliary), (logits, auxiliary)
