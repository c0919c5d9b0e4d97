"""Strategies and rules by name: how one batch is trained."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.engines import STRATEGIES, Strategy, parse_strategy
from spikefit.engines.strategy import RULE_NAMES
from spikefit.errors import OptionError, StrategyError, check_choice
from spikefit.losses.model_loss import LossFunction, loss_of
from spikefit.models import use_strategy
from spikefit.models.network import SpikingNetwork
from spikefit.rules.driver import drive, world_size
from spikefit.rules.rate import RateRule, drive_rate, rate
from spikefit.rules.resolve import Note, column_of, resolve
from spikefit.rules.sampler import AllSteps, EveryK, GivenSteps, RandomK, Sampler, TopActivity
from spikefit.rules.trace import StepRule, TraceRule, ndot, ottt, sltt, tbptt

Rule = StepRule | RateRule
Backward = Callable[[Tensor], Any]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Driver:
    """How one batch is trained: a whole sequence at once under a strategy, or by a rule.

    Attributes:
        strategy: of the whole sequence, or of each step of a rule; None for that with which the model is made.
        rule: None for the whole sequence.

    Its text is the rule as recipes write it, "tbptt:4", and in brackets what that leaves out, "sltt (grad_scale=2.0)".
    """

    strategy: Strategy | None = None
    rule: Rule | None = None

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of plain BPTT, as far as the strategy says."""
        return self.rule is None and (self.strategy is None or self.strategy.exact)

    @property
    def each_step(self) -> bool:
        """Whether weights move behind every step that calls backward."""
        return isinstance(self.rule, StepRule) and self.rule.update_every == "step"

    @property
    def shortest(self) -> int:
        """The least T of a sequence that it can run."""
        return self.rule.shortest if isinstance(self.rule, TraceRule) else 1

    def apply(self, model: nn.Module) -> nn.Module:
        """Set the strategy on `model`; any torch module runs under plain bptt, which is what it does anyway.

        Raises:
            StrategyError: the strategy does not apply to the model.
        """
        if self.strategy is None:
            return model
        plain = self.strategy.name == "bptt"
        if plain and not any(isinstance(m, SpikingNetwork) for m in model.modules()):
            return model
        return use_strategy(model, self.strategy)

    def notes(self, model: nn.Module, loss: LossFunction, *, timesteps: int | None = None) -> list[Note]:
        """What is approximate, or costs more than it seems; see `resolve`.

        Raises:
            StrategyError: the rule does not go with model and loss; all that clashes is named.
        """
        if self.rule is None:
            return []
        return resolve(model, cast(Any, loss), self.rule, timesteps=timesteps, world_size=world_size())

    def drawn(self, timesteps: int, generator: torch.Generator | None = None) -> "Driver":
        """The same with the choice of steps made, for a run on tensors without values.

        Args:
            timesteps: T.
            generator: of the random choice, on the CPU; None takes torch's global one.
        """
        if not isinstance(self.rule, TraceRule) or isinstance(self.rule.sampler, AllSteps):
            return self
        if isinstance(self.rule.sampler, TopActivity):
            # as many steps, whichever they are
            steps = self.rule.sampler.most_active(torch.zeros(timesteps))
        else:
            steps, _ = self.rule.draw(timesteps, generator)
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, sampler=GivenSteps(steps)))

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: LossFunction,
        *,
        backward: Backward = torch.autograd.backward,
        update: Callable[[], Any] | None = None,
        around: Context = nullcontext,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Forward, loss and backward of one batch; gradients are added to `.grad`. Returns the loss, detached.

        Args:
            model: [T, B, ...] -> logits [T, B, K]; a rule needs `init_state` and `step`.
            x, y: input [T, B, ...] and targets.
            loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits
                too.
            backward: called with a loss to be differentiated; a rule calls it several times.
            update: steps the optimiser and clears the gradients; called for `each_step` alone, where it is needed.
            around: entered around forward and loss; `lambda: torch.autocast("cpu")`.
            generator: of the random choice of steps, on the CPU; None takes torch's global one.

        Raises:
            StrategyError, OptionError, ShapeError: the rule cannot run the model, the loss or the shapes.
        """
        if isinstance(self.rule, RateRule):
            return drive_rate(model, x, y, cast(Any, loss), self.rule, backward=backward, around=around).loss
        if self.rule is not None:
            outcome = drive(
                model,
                x,
                y,
                cast(Any, loss),
                self.rule,
                backward=backward,
                update=update if self.each_step else None,
                around=around,
                generator=generator,
            )
            return outcome.loss
        with around():
            value = loss_of(model, loss, x, y)[0]
        backward(value)
        return value.detach()

    def __str__(self) -> str:
        if self.rule is None:
            return str(self.strategy or Strategy())
        name, kind = rule_name(self.rule), RULES[rule_name(self.rule)]
        option = "" if kind.option is None else kind.option_of(self.rule)
        short = f"{name}{option and ':'}{option}"
        usual, own = (vars(rule) for rule in (parse_driver(short).rule, self.rule))
        changed = ", ".join(f"{key}={value}" for key, value in own.items() if value != usual[key])
        return f"{short} ({changed})" if changed else short


# A whole sequence, as the model is made.
WHOLE = Driver()


@dataclass(frozen=True)
class RuleKind:
    """One row of the table of rules.

    Attributes:
        summary: what stands in the place of the path through time, in one line.
        make: keyword options -> the rule.
        options: names of the options and their types, as a recipe writes them.
        option: the one of them that can stand behind the name, as in "tbptt:4".
        option_of: that option of a rule, as text; "" for none.
    """

    summary: str
    make: Callable[..., Rule]
    options: Mapping[str, type]
    option: str | None = None
    option_of: Callable[[Any], str] = lambda rule: ""


COMMON: dict[str, type] = {"grad_scale": float, "update_every": str}
LOSS: dict[str, type] = {**COMMON, "loss_norm": str}
TRACED: dict[str, type] = {**LOSS, "trace_first": bool, "trace_dtype": str}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLERS: dict[str, Callable[[int], Sampler]] = {"random": RandomK, "every": EveryK}


def _traced(make: Callable[..., TraceRule]) -> Callable[..., TraceRule]:
    """`make` with the dtype of traces as text."""

    def made(*, trace_dtype: str | None = None, **options: Any) -> TraceRule:
        if trace_dtype is not None:
            check_choice(make.__name__, "trace_dtype", trace_dtype, DTYPES)
            options["trace_dtype"] = DTYPES[trace_dtype]
        return make(**options)

    return made


def _sltt_k(*, k: int | None = None, p: float | None = None, sampler: str = "random", **options: Any) -> TraceRule:
    check_choice("sltt_k", "sampler", sampler, (*SAMPLERS, "top_activity"))
    ranked = sampler == "top_activity"
    if (k if ranked else p) is not None:
        wrong, right = ("k", "p, a share of the steps,") if ranked else ("p", "k, a number of steps,")
        raise OptionError(f"sltt_k: {right} goes with sampler={sampler!r}, got {wrong}; leave {wrong} out.")
    if ranked:
        return sltt(sampler=TopActivity(0.25 if p is None else p, look_ahead=True), **options)
    return sltt(sampler=SAMPLERS[sampler](2 if k is None else k), **options)


def _tbptt(*, k: int = 2, **options: Any) -> Rule:
    return tbptt(k, **options)


RULES: dict[str, RuleKind] = {
    "sltt": RuleKind("do without it: gradients within a step alone (mu = 0)", sltt, LOSS),
    "sltt_k": RuleKind(
        "the same for K of the T steps; option: K (default: 2); sampler = random | every (every K-th) | "
        "top_activity (the share p, default 0.25, of the steps with the most spikes, which a first forward counts)",
        _sltt_k,
        {**LOSS, "k": int, "p": float, "sampler": str},
        "k",
        lambda rule: str(getattr(rule.sampler, "k", "")),
    ),
    "ottt": RuleKind(
        "carry it forward: weights read a trace of their input that decays with the leak of what they feed",
        _traced(ottt),
        TRACED,
    ),
    "ndot": RuleKind(
        "the same with the ratio of two membranes of what they read from, a heuristic",
        _traced(ndot),
        {**TRACED, "lag": int},
    ),
    "tbptt": RuleKind(
        "keep k steps of it: exact within windows of k steps, nothing across; option: k (default: 2)",
        _tbptt,
        {**COMMON, "k": int},
        "k",
        lambda rule: str(rule.k),
    ),
    "rate": RuleKind(
        "do without it: gradients of firing rates, by one backward without time, for networks linear in rates; option: "
        "step | sequence, how the pass over time runs (default: step)",
        rate,
        {"grad_scale": float, "mode": str},
        "mode",
        lambda rule: "" if rule.mode == "step" else rule.mode,
    ),
}
assert tuple(RULES) == RULE_NAMES, "the names that strategies know are those of the rules"


def rule_name(rule: Rule) -> str:
    """The name of a rule in recipes."""
    return column_of(rule).partition(":")[0]


def parse_driver(text: "str | dict[str, Any] | Strategy | Driver | None") -> Driver:
    """Read how a batch is trained.

    Args:
        text: a strategy or a rule, "lean:spikes", "sltt", "tbptt:4"; the same as a table, {"name": "sltt",
            "inside": "lean", "grad_scale": 2.0}; None for the strategy with which a model is made.

    Raises:
        StrategyError: unknown name, with near ones, or an option behind the name that makes no sense.
        OptionError: an unknown option of a rule, with near ones, of the wrong type or out of range.
    """
    if text is None:
        return Driver()
    if isinstance(text, Driver):
        return text
    written = text.get("name", "") if isinstance(text, dict) else text
    name, _, option = written.partition(":") if isinstance(written, str) else ("", "", "")
    if name not in RULES:
        if isinstance(text, dict) and "inside" in text and name in STRATEGIES:
            raise StrategyError(
                f"strategy {name}: inside is the strategy of each step of a rule ({', '.join(RULES)}), and {name} is "
                "no rule; leave inside out."
            )
        return Driver(parse_strategy(text))
    options = {k: v for k, v in text.items() if k != "name"} if isinstance(text, dict) else {}
    inside = options.pop("inside", None)
    kind = RULES[name]
    if option:
        if kind.option is None or kind.option in options:
            why = "takes no option behind its name" if kind.option is None else f"has its {kind.option} given twice"
            raise StrategyError(f"strategy {name}: it {why}, got {written!r}; write {name!r} alone.")
        options[kind.option] = _read(name, kind, option)
    _check_options(name, kind, options)
    strategy = None if inside is None else _inside(name, inside)
    return Driver(strategy, kind.make(**options))


def _inside(name: str, text: Any) -> Strategy:
    if not isinstance(text, str) or text.partition(":")[0] not in STRATEGIES:
        near = difflib.get_close_matches(str(text), STRATEGIES, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise StrategyError(
            f"strategy {name}: inside names the strategy of one step ({', '.join(STRATEGIES)}), got {text!r}.{hint}"
        )
    return parse_strategy(text)


def _read(name: str, kind: RuleKind, text: str) -> Any:
    assert kind.option is not None
    wanted = kind.options[kind.option]
    try:
        return wanted(text)
    except ValueError:
        raise StrategyError(
            f"strategy {name}: expected {name}:{kind.option.upper()} with a whole number, got {name}:{text}."
        ) from None


def _check_options(name: str, kind: RuleKind, options: dict[str, Any]) -> None:
    known = {**kind.options, "inside": str}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"strategy {name}: unknown option {key!r}; known: {', '.join(known)}.{hint}")
        wanted = (int, float) if known[key] is float else known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and known[key] is not bool):
            raise OptionError(
                f"strategy {name}: {key}: expected {known[key].__name__}, got {value!r} ({type(value).__name__})."
            )
