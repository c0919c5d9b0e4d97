"""Strategies by name: how the gradient of a given model is obtained. The model and its forward do not depend on it."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spikefit.engines import depth, membranes, node, reversible, time
from spikefit.engines.plan import Plan
from spikefit.errors import StrategyError
from spikefit.layers.keeping import Keeping
from spikefit.layers.rebuild import Rebuild
from spikefit.ops.node.equation import SAFE_GROWTH

# What a network runs one after the other: blocks, and stages whose layers share a membrane.
Chain = list[Any]
# Runs a chain over a sequence: (chain, x, state, option) -> (output, state).
Runner = Callable[[Chain, Tensor, tuple[Any, ...], str | None], tuple[Tensor, tuple[Any, ...]]]


@dataclass(frozen=True)
class StrategyKind:
    """One row of the table of strategies.

    Attributes:
        summary: how backward gets each state back, in one line.
        exact: whether the gradient is that of plain BPTT.
        run: runs a chain of blocks.
        check: raises StrategyError for an option that makes no sense.
        keep: what a unit keeps under the strategy, for (unit, option); one of `layers.KEEPS`.
        check_chain: raises StrategyError for (chain, option) that the strategy cannot run, naming the layer.
        accepts: the error of a rebuilt u up to which a strategy that is not exact runs, for its option.
        rounds: whether a strategy that is exact otherwise is approximate on this chain.
    """

    summary: str
    exact: bool
    run: Runner
    check: Callable[[str | None], None]
    keep: Callable[[Keeping, str | None], str] = lambda unit, option: "all"
    check_chain: Callable[[Chain, str | None], None] = lambda chain, option: None
    accepts: Callable[[str | None], float] = lambda option: 0.0
    rounds: Callable[[Chain], bool] = lambda chain: False


@dataclass(frozen=True)
class Strategy:
    """A strategy and its option, as written `name` or `name:option`."""

    name: str = "bptt"
    option: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the gradient equals that of plain BPTT, on all chains but those of `exact_on`."""
        return STRATEGIES[self.name].exact

    def exact_on(self, chain: Chain) -> bool:
        """Whether the gradient of `chain` equals that of plain BPTT."""
        return self.exact and not STRATEGIES[self.name].rounds(chain)

    @property
    def accepts(self) -> float:
        """The error of a rebuilt u up to which it runs; 0 if it is exact."""
        return STRATEGIES[self.name].accepts(self.option)

    @property
    def by_unit(self) -> bool:
        """Whether every unit obtains its gradient by itself, so that no network has to run the chain."""
        return STRATEGIES[self.name].run is depth.run_plain

    def run(self, chain: Chain, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Run `chain` one after the other over the sequence `x`; returns (output, state)."""
        return STRATEGIES[self.name].run(chain, x, state, self.option)

    def check_chain(self, chain: Chain) -> None:
        """Raise StrategyError if the strategy cannot run `chain`; the layer and the way out are named."""
        STRATEGIES[self.name].check_chain(chain, self.option)

    def set_keeps(self, model: nn.Module) -> None:
        """Tell every unit of `model` what it keeps for backward.

        Raises:
            PlanError: the option names a plan that cannot be read or belongs to another model.
        """
        if self.name == "lean" and self.option is not None and self.option.endswith(".json"):
            Plan.load(self.option).apply(model)
            return
        for module in model.modules():
            if isinstance(module, Keeping):
                module.keep = STRATEGIES[self.name].keep(module, self.option)

    def __str__(self) -> str:
        return self.name if self.option is None else f"{self.name}:{self.option}"


STRATEGIES: dict[str, StrategyKind] = {
    "bptt": StrategyKind(
        "keep it: plain autograd holds every state", True, depth.run_plain, membranes.no_option("bptt")
    ),
    "lean": StrategyKind(
        "pack it: spikes as bits, the rest rebuilt in backward; option: what a unit keeps beside them, "
        "input | spikes | auto, or a saved plan (default: auto)",
        True,
        depth.run_plain,
        depth.check_keep,
        depth.keep_of,
        membranes.check_lean,
    ),
    "checkpoint": StrategyKind(
        "recompute it: keep the input of every run of units; option: units per run (default: square root of all)",
        True,
        depth.run_checkpointed,
        depth.check_count("checkpoint", "units per run"),
    ),
    "step_checkpoint": StrategyKind(
        "recompute it in time: keep the states in front of every piece of steps and run it again, for networks that "
        "can be stepped; option: steps per piece (default: 1)",
        True,
        time.run_step_checkpointed,
        depth.check_count("step_checkpoint", "steps per piece"),
        check_chain=time.check_stepped,
    ),
    "spike_bits": StrategyKind(
        "pack it in time: keep 2 bits of every state (spike and window), which give all gradients but those of gains "
        "to the bit, and some states for these; for steps coupled in time, and, as inverse, for units; option: steps "
        "between two kept states, or none (default), and the accepted error of a state, 4 or none,0.01",
        False,
        time.run_spike_bits,
        time.check_spike_bits_option,
        check_chain=time.check_spike_bits,
        accepts=lambda option: time.read_keep("spike_bits", option).tolerance,
    ),
    "replay": StrategyKind(
        "recompute it: keep spikes as bits, run weights and membranes forward again; for shared membranes too",
        True,
        membranes.run_replay,
        membranes.no_option("replay"),
        check_chain=lambda chain, option: membranes.check_rebuilt(chain, Rebuild("replay")),
    ),
    "inverse": StrategyKind(
        "invert it: keep spikes as bits and some membranes, run membranes backwards; option: calls between two kept "
        "membranes (default: as many as are safe), and the accepted error of u, 6 or 6,0.01 (default: 0.001)",
        False,
        membranes.run_inverse,
        membranes.check_inverse,
        check_chain=lambda chain, option: membranes.check_rebuilt(chain, membranes.read_inverse(option)),
        accepts=lambda option: membranes.read_inverse(option).tolerance,
    ),
    "integer": StrategyKind(
        "invert it to the bit: keep spikes and the digits that a call loses, for neurons on a grid (frac_bits)",
        True,
        membranes.run_integer,
        membranes.no_option("integer"),
        check_chain=lambda chain, option: membranes.check_rebuilt(chain, Rebuild("integer")),
    ),
    "reversible": StrategyKind(
        "invert it, in depth or in time: keep the last streams of two-stream blocks (option: check | off, whether "
        "backward compares checksums of them, default: check), or some states of steps coupled in time (option: steps "
        "between two kept states, or none, the default; the accepted error; raise | repair)",
        True,
        reversible.run_reversed,
        reversible.check_option,
        check_chain=reversible.check_chain,
        accepts=reversible.accepted_error,
        rounds=time.rounds,
    ),
    "streamlined": StrategyKind(
        "invert it, for two-group nodes: keep outputs and every K-th state, inverse and gradient in one pass; that of "
        "bptt up to rho^K roundings; backward refuses membranes that met the threshold (check of the node); option: K, "
        "or none (default: 4, or as many as are safe)",
        False,
        node.run_reversing("streamlined"),
        node.check_reversal("streamlined"),
        accepts=lambda option: SAFE_GROWTH,
        check_chain=node.check_two_group("streamlined"),
    ),
    "generic": StrategyKind(
        "the same as wrappers of reversible layers do it: inverse, forward again, gradient; the rival of streamlined",
        False,
        node.run_reversing("generic"),
        node.check_reversal("generic"),
        accepts=lambda option: SAFE_GROWTH,
        check_chain=node.check_two_group("generic"),
    ),
}


# Rules, which drive a model from outside (`spikefit.rules`); written in the same place, and no strategies of a model.
RULE_NAMES = ("sltt", "sltt_k", "ottt", "ndot", "tbptt", "rate")

# What the options are called where a strategy is written as a table, in the order in which a text has them.
OPTION_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "lean": (("keep",),),
    "checkpoint": (("every",),),
    "step_checkpoint": (("every",),),
    "inverse": (("anchor_every", "tol"),),
    "spike_bits": (("anchor_every", "tol"),),
    # in depth, or in time
    "reversible": (("check",), ("anchor_every", "tol", "on_flip")),
    "streamlined": (("anchor_every",),),
    "generic": (("anchor_every",),),
}


def parse_strategy(text: "str | dict[str, Any] | Strategy") -> Strategy:
    """Read "bptt", "lean:spikes", "checkpoint:3", or the same as a table, {"name": "lean", "keep": "spikes"}.

    Raises:
        StrategyError: unknown name or option; near names are listed.
    """
    if isinstance(text, Strategy):
        return text
    if isinstance(text, dict):
        rest = {k: v for k, v in text.items() if k != "name"}
        forms = OPTION_NAMES.get(text.get("name", ""), (("option",),))
        # an option can be left out only with those behind it
        keys = next((keys for keys in forms if set(rest) == set(keys[: len(rest)])), None)
        if keys is None or "name" not in text:
            wanted = ", or ".join(", ".join(f"{key} = ..." for key in keys) for keys in forms)
            raise StrategyError(f"strategy: expected {{ name = ..., {wanted} }}, got {text}.")
        text = text["name"] if not rest else f"{text['name']}:{','.join(str(rest[key]) for key in keys if key in rest)}"
    if not isinstance(text, str):
        raise StrategyError(f"strategy: expected a text such as 'lean:spikes', a table or a Strategy, got {text!r}.")
    name, _, option = text.partition(":")
    if name in RULE_NAMES:
        raise StrategyError(
            f"strategy: {name} is a rule, which drives a model from outside; train with strategy={name!r} in a recipe, "
            "or call spikefit.rules.parse_driver(...).run(model, x, y, loss)."
        )
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, (*STRATEGIES, *RULE_NAMES), n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join((*STRATEGIES, *RULE_NAMES))
        raise StrategyError(f"strategy: expected one of {known}, got {name!r}.{hint}")
    strategy = Strategy(name, option or None)
    STRATEGIES[name].check(strategy.option)
    return strategy
