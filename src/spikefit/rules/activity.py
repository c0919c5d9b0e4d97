"""How many spikes each step of a sequence has, from a pass that leaves nothing behind."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.layers.recompute import random_state, replayed, unchanged_buffers
from spikefit.models.network import plain_bptt
from spikefit.neurons.firing import FIRING, spikes_of
from spikefit.rules.sequence import Sequence
from spikefit.rules.step import Traces
from spikefit.rules.trace import StepRule


@torch.no_grad()
def spikes_per_step(
    model: nn.Module, rule: StepRule, x: Tensor, around: Callable[[], AbstractContextManager[Any]]
) -> Tensor:
    """Sum of the spikes of all neurons in each step.

    One more forward without a graph, under the rule's own treatment of weights, norms and dropout; statistics and
    random numbers are afterwards as they were.

    Args:
        model: with `init_state` and `step`.
        rule: what will run the sequence.
        x: [T, B, ...].
        around: entered around each step.

    Returns:
        counts [T], float64.
    """
    counts = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    now = [0]

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        counts[now[0]] += spikes_of(output).sum(dtype=torch.float64)

    with ExitStack() as stack:
        # units that pack spikes, or are run by a chain, do not call their neurons
        stack.enter_context(plain_bptt(model))
        stack.enter_context(unchanged_buffers([model]))
        stack.enter_context(replayed(random_state(x.device), x.device))
        for module in model.modules():
            if isinstance(module, FIRING):
                stack.callback(module.register_forward_hook(count).remove)
        sequence = Sequence(model, rule, x)
        sequence.begin(x, around)
        state, traces = cast(Any, model).init_state(x.shape[1], tuple(x.shape[2:])), Traces()
        for t in range(x.shape[0]):
            now[0] = t
            with around():
                _, state, traces = sequence.step(x[t], state, traces)
    # casts made here have no graph, and autocast around the whole loop would hand them to the steps
    torch.clear_autocast_cache()
    return counts
