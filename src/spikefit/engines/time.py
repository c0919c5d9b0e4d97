"""Chains in time: networks run step by step, and how backward gets their states back.

Any network that can be stepped has `step_checkpoint`. Steps that are coupled in time (`CoupledSteps`) own their
backward, one function over the whole sequence: see `spikefit.layers.coupled_function`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from spikefit.engines import membranes
from spikefit.engines.depth import modules_of, names_of, run_plain
from spikefit.errors import StrategyError, named
from spikefit.layers.chain import State, run_blocks
from spikefit.layers.coupled_function import run_coupled
from spikefit.layers.coupled_keep import Keep, check_keep
from spikefit.layers.coupled_steps import CoupledSteps
from spikefit.layers.norm import needs_whole_calls
from spikefit.layers.rebuild import TOLERANCE, Rebuild
from spikefit.layers.repeat import repeated


def run_step_checkpointed(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Run the chain over pieces of `option` steps; the state in front of every piece is kept, and the input.

    Backward runs the pieces again, the last one first. Random numbers, autocast and backend are those of the first
    pass, and running statistics stay alone.
    """
    if not torch.is_grad_enabled():
        return run_plain(chain, x, state)
    if option in (None, "1") and has_coupled(chain):
        # pieces of one step each are what the function keeps, and it frees graphs stage by stage
        return _run_coupled(chain, x, state, Keep("states"))
    steps, outs = 1 if option is None else int(option), []
    leaves, spec = tree_flatten(state)
    for t in range(0, x.shape[0], steps):
        out, spec, *leaves = repeated(modules_of(chain), _piece, chain, spec, x[t : t + steps], *leaves)
        outs.append(out)
    return torch.cat(outs), tree_unflatten(leaves, spec)


def _piece(chain: list[Any], spec: TreeSpec, x: Tensor, *leaves: Tensor | None) -> tuple[Any, ...]:
    """(output, structure of the state, its tensors...): flat, so that what is kept shows as kept."""
    out, state = run_plain(chain, x, tree_unflatten(list(leaves), spec))
    leaves_after, spec = tree_flatten(state)
    return out, spec, *leaves_after


def check_stepped(chain: list[Any], option: str | None = None) -> None:
    """Raise StrategyError unless the chain can be run piece by piece in time."""
    for name, block in zip(names_of(chain), chain, strict=True):
        if getattr(block, "consumes_time", False):
            raise StrategyError(
                f"strategy step_checkpoint: {name} ({type(block).__name__}) needs all time steps at once; use "
                "strategy='checkpoint', which runs whole sequences."
            )
        norms = [(path, m) for module in modules_of([block]) for path, m in module.named_modules()]
        found = [path for path, m in norms if needs_whole_calls(m)]
        if found:
            raise StrategyError(
                f"strategy step_checkpoint: {'.'.join(filter(None, (name, found[0])))} needs the whole "
                "sequence; use norm='step_bn' ('ws', 'none'), or strategy='checkpoint'."
            )


def run_spike_bits(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Keep the bits of spikes; what else backward needs of a state comes from the inverse, from kept states on."""
    keep = read_keep("spike_bits", option)
    if has_coupled(chain):
        return _run_coupled(chain, x, state, keep)
    return membranes.run_stages(chain, x, state, _as_rebuild(keep))


def run_reversed_in_time(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Run coupled steps, which backward runs from the last to the first; other blocks are under plain autograd."""
    return _run_coupled(chain, x, state, read_keep("reversible", option))


def _run_coupled(chain: list[Any], x: Tensor, state: State, keep: Keep) -> tuple[Tensor, State]:
    """Run the chain; what is around the coupled steps is under plain autograd."""
    after: list[Any] = []
    for block, before, name in zip(chain, state, names_of(chain), strict=True):
        if isinstance(block, CoupledSteps):
            with named(name):
                x, s = run_coupled(block, x, before, keep=keep)
        else:
            x, (s,) = run_blocks([block], x, (before,), [name])
        after.append(s)
    return x, tuple(after)


def has_coupled(chain: list[Any]) -> bool:
    """Whether there are steps coupled in time."""
    return any(isinstance(block, CoupledSteps) for block in chain)


def rounds(chain: list[Any]) -> bool:
    """Whether steps coupled in time come back with rounding, as their states are on no grid."""
    return any(isinstance(block, CoupledSteps) and block.state_grid is None for block in chain)


def read_keep(name: str, option: str | None) -> Keep:
    """What `spike_bits` or `reversible` in time keep: "4", "4,0.01" or "none,0.01", "4,0.001,repair".

    The distance of kept states in steps, counted from the last ("none": the last alone), the accepted error of a state,
    and for `reversible` what follows on spikes that come back otherwise, raise or repair.

    Raises:
        StrategyError: anything else.
    """
    kind = "bits" if name == "spike_bits" else "anchors"
    parts = [] if option is None else option.split(",")
    try:
        every = None if not parts or parts[0] == "none" else int(parts[0])
        tolerance = float(parts[1]) if len(parts) > 1 else TOLERANCE
        on_flip = parts[2] if len(parts) > 2 else "raise"
        known = on_flip in ("raise", "repair") and len(parts) <= (3 if kind == "anchors" else 2)
        if known and (every is None or every >= 1) and 0 < tolerance < float("inf"):
            return Keep(kind, every, tolerance, on_flip)
    except ValueError:
        pass
    further = ", and by raise or repair, for spikes that come back otherwise" if kind == "anchors" else ""
    raise StrategyError(
        f"strategy {name}: the option is anchor_every, the steps between two kept states, 1 or more, or none for the "
        f"last state alone; it may be followed by the accepted error of a state{further}, as in {name}:4 or "
        f"{name}:none,0.01, got {option!r}."
    )


def _as_rebuild(keep: Keep) -> Rebuild:
    return Rebuild("inverse", keep.anchor_every, keep.tolerance)


def check_spike_bits_option(option: str | None) -> None:
    """Raise StrategyError unless the option of `spike_bits` can be read."""
    read_keep("spike_bits", option)


def check_spike_bits(chain: list[Any], option: str | None) -> None:
    """Raise StrategyError unless bits of spikes are enough for the chain, or its membranes can be run backwards."""
    keep = read_keep("spike_bits", option)
    if not has_coupled(chain):
        membranes.check_rebuilt(chain, _as_rebuild(keep))
    check_coupled(chain, keep)


def check_coupled(chain: list[Any], keep: Keep) -> None:
    """Raise StrategyError unless all coupled steps of the chain can be run with what `keep` keeps."""
    for name, block in zip(names_of(chain), chain, strict=True):
        if isinstance(block, CoupledSteps):
            with named(name):
                check_keep(block, keep)
