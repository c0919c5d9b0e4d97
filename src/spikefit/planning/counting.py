"""Operations and firing of one forward, by layer: from shapes alone, or with the values of a real run.

Units and read-outs get whole sequences, and read the weight of a module that they never call. A convolution or a linear
map that is called itself, as blocks of your own do, gets rows [B, C, ...] of one step, or [k B, C, ...] of k steps.
What a layer does in several calls adds up, so a layer that is called in every step counts like a unit. A recurrent
module has two entries: what it does with its input, and what it does with hidden values.

A block that cuts one step into parts, as into windows, says `parts_of_a_step = True`: all that its layers do in one
call of the block, in rows [k B, ...] or in several calls, is one step.

A first layer is one without a spike behind its input: it reads the data, or what other first layers made of them.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikefit.errors import ShapeError
from spikefit.layers import Readout, SpikingConv1d, SpikingUnit
from spikefit.layers.packed import dense
from spikefit.models.network import plain_bptt
from spikefit.neurons.firing import FIRING, spikes_of
from spikefit.planning.energy import Operations, of_rows
from spikefit.planning.membranes import Currents, watched_currents
from spikefit.planning.memory import predicted_bytes
from spikefit.planning.operations import operations, recurrent_operations
from spikefit.planning.target import with_targets


def counted_shapes(module: nn.Module, x: Tensor, autocast: bool) -> tuple[dict[str, Operations], Currents]:
    """Operations by layer and what the neurons get, from shapes alone."""
    currents: Currents = {}
    counter = _Counter(module, x, values=False)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        counter.close()  # what backward runs again is no part of the forward
        return logits.sum()

    # units that rebuild what they need do not call their neurons
    with counter, watched_currents(module, currents), plain_bptt(module):
        predicted_bytes(module, *with_targets(x), loss=loss, autocast=autocast)
    return counter.counted, currents


@torch.no_grad()
def counted_run(module: nn.Module, x: Tensor, autocast: bool) -> tuple[dict[str, Operations], dict[str, float]]:
    """Operations by layer and mean output of what fires, by path, of one real forward; buffers are put back."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    counter = _Counter(module, x, values=True)
    casts = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast)
    # the forward does not depend on the strategy, but units that pack do not call their neurons
    with counter, watched_firing(module) as fired, plain_bptt(module), casts:
        module(x)
    for name, b in module.named_buffers():
        b.copy_(buffers[name])
    sums = {name: pair.tolist() for name, pair in fired.items()}
    return counter.counted, {name: total / count for name, (total, count) in sums.items() if count}


@contextmanager
def watched_firing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect path -> [sum of outputs, their number] over all calls in the block, of everything in `model` that fires.

    Calls in several places, or step by step, are weighted by their elements: the quotient is the share that fires.
    """
    found: dict[str, Tensor] = {}
    handles = []

    def collect(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        spikes = spikes_of(output).detach()
        mean, count = spikes.mean(dtype=torch.float32).double(), spikes.numel()
        found[name] = found[name].to(mean.device) + torch.stack([mean * count, torch.full_like(mean, count)])

    for name, module in model.named_modules():
        if isinstance(module, FIRING):
            found[name] = torch.zeros(2, dtype=torch.float64)
            handles.append(module.register_forward_hook(partial(collect, name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Counter:
    """Counts the operations of every layer while it is entered.

    Args:
        module: the model.
        x: what it is called with, [T, B, ...].
        values: whether tensors have values; without them there are no rates, and first layers are not looked for.

    Attributes:
        counted: layer -> operations, in the order of the first calls.
    """

    def __init__(self, module: nn.Module, x: Tensor, *, values: bool) -> None:
        self.counted: dict[str, Operations] = {}
        self.x, self.values, self.origins = x, values, _Origins()
        self.modules = dict(module.named_modules())
        self.own = [name for name, m in self.modules.items() if getattr(m, "weights_per_step", False)]
        # block whose calls are one step each -> its calls; layer -> the call in which it was counted last
        self.calls = {name: 0 for name, m in self.modules.items() if getattr(m, "parts_of_a_step", False)}
        self.counted_in: dict[str, int] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> "_Counter":
        for name in self.calls:
            self.handles.append(self.modules[name].register_forward_pre_hook(partial(self._called, name)))
        for name, m in self.modules.items():
            if isinstance(m, SpikingUnit | Readout):
                self.handles.append(m.register_forward_pre_hook(partial(self._sequence, name)))
                self.handles.append(m.register_forward_hook(self._made))
            elif isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear):
                self.handles.append(m.register_forward_hook(partial(self._rows, name), with_kwargs=True))
            elif isinstance(m, nn.RNN | nn.GRU | nn.LSTM):
                self.handles.append(m.register_forward_hook(partial(self._recurrent, name), with_kwargs=True))
            elif isinstance(m, FIRING):
                self.handles.append(m.register_forward_hook(self._fired))
        self.mode = self.origins if self.values else nullcontext()
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self.close()

    def close(self) -> None:
        """Count nothing more."""
        while self.handles:
            self.handles.pop().remove()

    def _called(self, name: str, block: nn.Module, inputs: Any) -> None:
        self.calls[name] += 1

    def _made(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.origins.mark(output, LAYER)

    def _fired(self, neuron: nn.Module, inputs: Any, output: Any) -> None:
        self.origins.mark(output, SPIKES)

    @torch.no_grad()
    def _sequence(self, name: str, layer: SpikingUnit | Readout, inputs: Any) -> None:
        """A unit or a read-out gets a sequence; of windows [1, k B, ...] or [k, B, ...] where a block cuts a step."""
        x = dense(inputs[0]).detach()
        # a convolution over time is one step whose length is time
        sequence = x.permute(1, 2, 0).unsqueeze(0) if _over_time(layer) else x
        synapse = layer.linear if isinstance(layer, Readout) else layer.synapse
        cut, shape = _within(name, self.calls), _output_shape(layer, x)
        if cut:  # as many rows per sample as there are parts
            sequence = sequence.flatten(0, 1).unsqueeze(0)
        made = operations(synapse, sequence, shape, values=self.values)
        made = of_rows(made, sequence.shape[1], self.x.shape[1]) if cut else made
        self._add(name, x, replace(made, over_time=_over_time(layer)))

    @torch.no_grad()
    def _rows(self, name: str, layer: nn.Module, inputs: Any, options: dict[str, Any], output: Tensor) -> None:
        """A plain layer was called with rows; what it gives tells how often its weight was applied."""
        x = rows = (*inputs, *options.values())[0].detach()
        if rows.ndim == 1 + _space_axes(layer):
            rows, output = rows.unsqueeze(0), output.unsqueeze(0)
        if isinstance(layer, nn.Linear) and rows.ndim > 2 and rows.shape[:2] == self.x.shape[:2]:
            rows, output = rows.flatten(0, 1), output.flatten(0, 1)  # a whole sequence
        one = operations(layer, rows.unsqueeze(0), output.shape[1:], values=self.values)
        self._add(name, x, of_rows(one, rows.shape[0], self.x.shape[1]))
        self.origins.mark(output, LAYER)

    @torch.no_grad()
    def _recurrent(self, name: str, layer: nn.RNNBase, inputs: Any, options: dict[str, Any], output: Any) -> None:
        """A recurrent module was called with rows of sequences, or with one sequence [L, in]."""
        x = inputs[0] if inputs else options["input"]
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"profile: {name} is counted on a tensor [L, B, in], or [B, L, in] with batch_first=True, and got a "
                f"{type(x).__name__}. Give it sequences of one length."
            )
        x = x.detach()
        rows, tokens = (1, x.shape[0]) if x.ndim == 2 else x.shape[:2] if layer.batch_first else x.shape[1::-1]
        if x.ndim == 3 and not layer.batch_first and x.shape[:2] == self.x.shape[:2]:
            rows, tokens = rows * tokens, 1  # a whole sequence: a token is a step
        halves = recurrent_operations(layer, x, output[0], tokens, values=self.values)
        for half, one in zip(RECURRENT_HALVES, halves, strict=True):
            self._add(f"{name}.{half}", x, of_rows(one, rows, self.x.shape[1]))
        self.origins.mark(output, LAYER)

    def _add(self, name: str, x: Tensor, made: Operations) -> None:
        """Note a call of the layer `name` with `x`."""
        if made.binary and made.rate and self.origins.of(x) == LAYER:
            self.origins.mark(x, SPIKES)  # of a neuron that is no module of ours
        own = bool(_within(name, self.own))
        made = replace(made, first=self.values and self.origins.of(x) < SPIKES, own_steps=own)
        before, cut = self.counted.get(name), _within(name, self.calls)
        call = sum(self.calls[block] for block in cut[:1])  # of the outermost block that cuts a step
        if cut:
            made = replace(made, macs=made.total_macs, steps=1)
        if before is None:
            self.counted[name] = made
        else:
            part = bool(cut) and self.counted_in[name] == call
            self.counted[name] = before.joined(made) if part else before + made
        self.counted_in[name] = call


# The two entries of a recurrent module: what it does with its input, and with hidden values.
RECURRENT_HALVES = ("input", "recurrent")

# Where a tensor comes from: a layer has computed it, or spikes are behind it; 0 for data and weights.
LAYER, SPIKES = 1, 2


class _Origins(TorchDispatchMode):
    """Knows where tensors come from: what an operation makes comes from where the last of its inputs does."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        self.mark(out, max((self.of(t) for t in given if isinstance(t, Tensor)), default=0))
        return out

    def of(self, t: Tensor) -> int:
        """0, LAYER or SPIKES."""
        return self.known.get(t.untyped_storage()._cdata, 0) if t.layout == torch.strided else 0

    def mark(self, made: Any, origin: int) -> None:
        """All tensors in `made` come from `origin`, or from further on."""
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and t.layout == torch.strided and origin > self.of(t):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    # its place may be taken by another one later
                    weakref.finalize(storage, self.known.pop, storage._cdata, None)
                self.known[storage._cdata] = origin


def _within(name: str, blocks: Iterable[str]) -> list[str]:
    """Those of `blocks` that are `name` or contain it, outermost first if they come so."""
    return [block for block in blocks if not block or name == block or name.startswith(f"{block}.")]


def _output_shape(layer: SpikingUnit | Readout, x: Tensor) -> tuple[int, ...]:
    """Shape of one sample of the current, for the input sequence `x` of a unit or read-out."""
    if isinstance(layer, Readout):
        return (layer.linear.out_features,)
    if _over_time(layer):
        s = cast(nn.Conv1d, layer.synapse)
        reach = s.dilation[0] * (s.kernel_size[0] - 1) + 1
        return s.out_channels, (x.shape[0] + 2 * int(s.padding[0]) - reach) // s.stride[0] + 1
    return layer.output_shape(tuple(x.shape[2:]))


def _over_time(layer: nn.Module) -> bool:
    return isinstance(layer, SpikingConv1d) and layer.over == "time"


def _space_axes(layer: nn.Module) -> int:
    return 0 if isinstance(layer, nn.Linear) else 1 if isinstance(layer, nn.Conv1d) else 2
