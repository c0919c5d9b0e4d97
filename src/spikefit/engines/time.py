"""Chains in time: the network run piece by piece in time, with the states between pieces kept."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from spikefit.engines.depth import modules_of, names_of, repeated, run_plain
from spikefit.errors import StrategyError
from spikefit.layers.chain import State


def run_step_checkpointed(chain: list[Any], x: Tensor, state: State, option: str | None) -> tuple[Tensor, State]:
    """Run the chain over pieces of `option` steps; the state in front of every piece is kept, and the input.

    Backward runs the pieces again, the last one first. Random numbers, autocast and backend are those of the first
    pass, and running statistics stay alone.
    """
    if not torch.is_grad_enabled():
        return run_plain(chain, x, state)
    steps, outs = 1 if option is None else int(option), []
    leaves, spec = tree_flatten(state)
    for t in range(0, x.shape[0], steps):
        out, spec, *leaves = repeated(chain, _piece, chain, spec, x[t : t + steps], *leaves)
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
        found = [path for path, m in norms if getattr(m, "time_scope", "none") == "sequence"]
        if found:
            raise StrategyError(
                f"strategy step_checkpoint: {'.'.join(filter(None, (name, found[0])))} normalises over the whole "
                "sequence; use norm='step_bn' ('ws', 'none'), or strategy='checkpoint'."
            )
