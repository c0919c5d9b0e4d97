"""Whether a rule goes with a model and a loss: all that clashes in one error, and notes on what is approximate.

Traits are collected here, with the paths of what declares them; `verdicts.py` says which rule allows them.
"""

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn

from spikefit.errors import OptionError, RuleWarning, StrategyError
from spikefit.layers import Pool2d, SpikingUnit
from spikefit.losses.losses import LOSSES, Loss
from spikefit.models import SpikingNetwork
from spikefit.neurons import LeakyReadout, SpikingNeuron
from spikefit.rules.linear import linear_clashes
from spikefit.rules.sampler import AllSteps, TopActivity
from spikefit.rules.trace import StepRule, TraceRule
from spikefit.rules.verdicts import COLUMNS, TRAITS, Found
from spikefit.rules.wiring import Wiring, traced_clashes

if TYPE_CHECKING:
    from spikefit.rules.rate import RateRule

# Paths that a sentence writes out; of more it counts the rest.
NAMED = 3


@dataclass(frozen=True)
class Note:
    """What a rule that runs costs.

    Attributes:
        code: the trait, a key of `TRAITS`.
        path: of the first module that has it, or the name of what else has it.
        text: a sentence.
    """

    code: str
    path: str
    text: str

    def __str__(self) -> str:
        return self.text


def resolve(
    model: nn.Module,
    loss: Loss,
    rule: "StepRule | RateRule",
    *,
    timesteps: int | None = None,
    world_size: int = 1,
) -> list[Note]:
    """Check that a rule goes with a model and a loss, before the first step.

    It reads what parts declare, runs nothing and changes nothing. Parts of your own declare, as attributes:
    `consumes_time`, `time_scope` (norms), `stepwise = False` (neurons that see several steps at once), `lateral` (reads
    its own output of the step before), `multiplies_activations`; a model `reads_out_every_step`; a loss
    `splits_per_step` and `reads_mean`.

    Args:
        model: what is trained, in the mode (`train()`, `eval()`) and under the strategy in which it will run.
        loss: what is trained on.
        rule: `sltt()`, `ottt()`, `ndot()`, `tbptt(k)` or `rate()`.
        timesteps: T; None where it is not known yet.
        world_size: processes that train together.

    Returns:
        Notes on what is approximate or costs more than it seems.

    Raises:
        StrategyError: all that clashes, each with its paths and what to do.
        OptionError: a rule that the table does not have.

    Example:
        for note in resolve(model, create_loss("tet"), ottt(), timesteps=6):
            print(note)
    """
    column = column_of(rule)
    found = [*_in_model(model, timesteps, column), *_in_loss(loss), *_in_rule(rule, timesteps, world_size)]
    if rule.name == "rate":
        found += linear_clashes(model)
    if isinstance(rule, TraceRule) and rule.traced and hasattr(model, "step"):
        found += traced_clashes(model, Wiring(model), ratio=rule.mu == "ratio", skip_data=not rule.trace_first)
    clashes = [one for one in found if TRAITS[one.trait].verdict(column) == "no"]
    if clashes:
        raise StrategyError(_refusal(model, rule, column, _without_consequences(clashes)))
    noted = [one for one in found if TRAITS[one.trait].verdict(column) == "note"]
    if timesteps == 1:
        noted = [one for one in noted if not TRAITS[one.trait].through_time]
    return [Note(group[0].trait, group[0].path, _sentence(group, rule, column)) for group in _groups(noted)]


def column_of(rule: "StepRule | RateRule") -> str:
    """The column of the table that a rule belongs to.

    Raises:
        OptionError: there is none.
    """
    name: str = getattr(rule, "name", "")
    if name == "sltt" and isinstance(rule, TraceRule) and not isinstance(rule.sampler, AllSteps):
        name = "sltt_k"
    if name == "rate" and getattr(rule, "mode", "") == "sequence":
        name = "rate:sequence"
    if name not in COLUMNS:
        raise OptionError(
            f"resolve: expected a rule of spikefit.rules ({', '.join(COLUMNS)}), got {rule!r}; a rule of your own "
            "needs its column in spikefit.rules.verdicts."
        )
    return name


_shown: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, notes: Iterable[Note], who: str) -> None:
    """Warn of the notes that were not shown for this model yet; the line named is that of who called the library.

    Args:
        model: what the notes are about.
        notes: of `resolve`.
        who: the rule, in front of each sentence.
    """
    shown = _shown.setdefault(model, set())
    for note in notes:
        text = f"{who}: {note.text}"
        # Python's own memory of warnings is emptied whenever anyone changes filters, in the middle of a training
        if text not in shown:
            warnings.warn(text, RuleWarning, stacklevel=_calls_inside() + 1)
            shown.add(text)


def _calls_inside() -> int:
    """How many calls of the library, with that of the caller, lie behind the code that called it."""
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "spikefit":
        frame, count = frame.f_back, count + 1
    return count


def _in_model(model: nn.Module, timesteps: int | None, column: str) -> Iterator[Found]:
    name = type(model).__name__
    runs = "forward" if column == "rate:sequence" else "run"
    if not (hasattr(model, "step") and hasattr(model, "init_state")):
        yield Found("no_step", name)
    elif not isinstance(model, SpikingNetwork) or getattr(type(model), runs) is not getattr(SpikingNetwork, runs):
        yield Found("own_model", name)
    if not getattr(model, "reads_out_every_step", True):
        yield Found("late_readout", name)
    length = model.timesteps if isinstance(model, SpikingNetwork) else None
    if length is not None and timesteps not in (None, length):
        yield Found("other_length", name, (("length", str(length)), ("timesteps", str(timesteps))))
    modules = list(model.named_modules())
    yield from _in_networks(modules)
    shared = any(isinstance(m, SpikingNetwork) and m.share != "none" for _, m in modules)
    consumers = [(path, m) for path, m in modules if getattr(m, "consumes_time", False)]
    for path, module in consumers:
        # of nested ones the innermost, which is what to change
        if not any(other is not module and _within(inner, path) for inner, other in consumers):
            yield _found("consumes_time", path, module)
    for path, module in modules:
        if isinstance(module, SpikingNeuron):
            yield from _in_neuron(path, module, shared)
        else:
            yield from _in_part(path, module)


def _in_networks(modules: list[tuple[str, nn.Module]]) -> Iterator[Found]:
    for path, network in modules:
        if not isinstance(network, SpikingNetwork):
            continue
        where = path or type(network).__name__
        if network.share != "none":
            yield Found("shared_membrane", where, (("share", network.share),))
        if not network.strategy.by_unit:
            yield Found("chain_strategy", where, (("strategy", str(network.strategy)),))
        for i, block in enumerate(network.blocks):
            if not hasattr(block, "init_state"):
                yield _found("no_state", f"{path}.blocks.{i}".removeprefix("."), block)


def _in_part(path: str, module: nn.Module) -> Iterator[Found]:
    """What a module declares that is no neuron of the library."""
    scope = getattr(module, "time_scope", "none")
    if scope != "none" and module.training:
        yield _found("sequence_norm" if scope == "sequence" else "step_norm", path, module)
    if not getattr(module, "stepwise", True):
        yield _found("whole_neuron", path, module)
    if getattr(module, "lateral", False):
        yield _found("lateral", path, module)
    if getattr(module, "multiplies_activations", False):
        yield _found("product", path, module)
    if isinstance(module, LeakyReadout):
        yield Found("leaky_readout", path, (("tau", f"{module.tau:g}"),))
    if isinstance(module, Pool2d) and isinstance(module.pool, nn.MaxPool2d):
        yield Found("max_pool", path)
    if isinstance(module, SpikingUnit):
        if module.pool == "max":
            yield Found("max_pool", path)
        if module.keep != "all" and module.neuron is not None:
            yield Found("lean_unit", path)


def _in_neuron(path: str, neuron: SpikingNeuron, shared: bool) -> Iterator[Found]:
    if not getattr(neuron, "stepwise", True):
        yield _found("whole_neuron", path, neuron)
        return
    if type(neuron).forward is not SpikingNeuron.forward:
        yield _found("own_membrane", path, neuron, ("what", "a forward of its own"))
        return
    if neuron.groups > 1 and not shared:
        yield _found("own_membrane", path, neuron, ("what", f"groups={neuron.groups}"))
    if neuron.v_reset is not None:
        yield Found("hard_reset", path)
    elif neuron.reset and not neuron.detach_reset:
        yield Found("attached_reset", path)
    if neuron.frac_bits is not None:
        yield Found("grid", path, (("bits", str(neuron.frac_bits)),))
    if any(p.requires_grad for p in neuron.parameters()):
        yield _found("learned_leak", path, neuron)


def _in_loss(loss: Loss) -> Iterator[Found]:
    kind = getattr(loss, "__name__", type(loss).__name__)
    key = next((key for key, made in LOSSES.items() if made is type(loss)), None)
    name = f"the loss {kind}" if key is None else f"the loss {kind} ({key})"
    if not getattr(loss, "splits_per_step", False):
        yield Found("whole_loss", name)
    if not getattr(loss, "reads_mean", False):
        yield Found("loss_beyond_mean", name)


def _in_rule(rule: "StepRule | RateRule", timesteps: int | None, world_size: int) -> Iterator[Found]:
    if isinstance(rule, TraceRule) and isinstance(rule.sampler, TopActivity):
        yield Found("look_ahead" if rule.sampler.look_ahead else "top_activity", f"sampler={rule.sampler!r}")
    if isinstance(rule, StepRule) and rule.update_every == "step" and world_size > 1:
        yield Found("update_every_step", "update_every='step'", (("world_size", str(world_size)),))
    if isinstance(rule, TraceRule) and timesteps and rule.shortest > timesteps:
        facts = (("least", str(rule.shortest)), ("timesteps", str(timesteps)))
        yield Found("too_short", f"sampler={rule.sampler!r}", facts)
    if timesteps == 1:
        yield Found("one_step", "T = 1")


def _found(trait: str, path: str, module: nn.Module, *facts: tuple[str, str]) -> Found:
    kind = type(module).__name__
    return Found(trait, path or kind, (("kind", kind), *facts))


def _within(path: str, outer: str) -> bool:
    """Whether `path` is `outer` or inside of it."""
    return path == outer or outer == "" or path.startswith(f"{outer}.")


def _without_consequences(clashes: list[Found]) -> list[Found]:
    """Without those whose cause is refused for a reason of its own."""
    refused = [one.path for one in clashes if one.cause is None]
    return [one for one in clashes if one.cause is None or not any(_within(one.cause, path) for path in refused)]


def _groups(found: Iterable[Found]) -> list[list[Found]]:
    """Those of which one sentence speaks, in the order in which they were found."""
    made: dict[tuple[Any, ...], list[Found]] = {}
    for one in found:
        made.setdefault((one.trait, one.facts), []).append(one)
    return list(made.values())


def _sentence(group: list[Found], rule: "StepRule | RateRule", column: str) -> str:
    path, rest = group[0].path, [one.path for one in group[1:]]
    if rest:
        path += f" (and {', '.join(rest) if len(group) <= NAMED else f'{len(rest)} more'})"
    frees = f"frees each {'window of steps' if rule.name == 'tbptt' else 'step'} before the next"
    return (
        TRAITS[group[0].trait].sentence(column).format(path=path, rule=rule.name, frees=frees, **dict(group[0].facts))
    )


def _refusal(model: nn.Module, rule: "StepRule | RateRule", column: str, clashes: list[Found]) -> str:
    sentences = [_sentence(group, rule, column) for group in _groups(clashes)]
    if len(sentences) == 1:
        return f"rule {rule.name}: {sentences[0]}"
    listed = "".join(f"\n- {sentence}" for sentence in sentences)
    return f"rule {rule.name}: it does not go with {type(model).__name__}, for {len(sentences)} reasons:{listed}"
