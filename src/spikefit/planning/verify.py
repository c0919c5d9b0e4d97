"""`verify`: proof, on the user's own model, that a strategy gives the outputs and gradients of plain BPTT.

One training step runs as the model is set up, and one with plain autograd on the reference operations (neuron, norm and
packing in plain torch), from the same weights, buffers and random numbers. The second runs twice, with two scales of
the loss: spikes that differ show a model whose forward cannot be repeated, gradients that differ show what rounding
alone does to them. That is all there is where the true gradient is zero: of a bias in front of a batch norm, or behind
a norm that sees one value.
"""

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from spikefit.errors import SpikefitError
from spikefit.layers import SpikingUnit
from spikefit.layers.packed import PackedSpikes
from spikefit.layers.stage_function import Watcher, watched
from spikefit.losses.model_loss import LossFunction, loss_of
from spikefit.models.network import SpikingNetwork, plain_bptt
from spikefit.neurons import Threshold
from spikefit.neurons.window import WindowLIF
from spikefit.ops.dispatch import use_backend
from spikefit.planning.target import check_model, in_training, mean_cross_entropy, with_targets

# Scale of the loss of the second run; not a power of two, so that every product is rounded anew.
RESCALED = 0.7
# Times the rounding of the oracle that a difference may always be.
ROUNDINGS = 4

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        passed: all of the following hold.
        spikes_equal: logits (those of auxiliary heads too, if the loss reads them) and the spikes of every unit,
            threshold and neuron of windows are equal bit for bit.
        buffers_equal: buffers after the step are equal, counters exactly and running statistics to a few roundings.
        random_equal: the random number generator stands where it stood after the oracle.
        max_gradient_error: largest |difference| over all gradients, each over its own largest absolute value, or over
            the value at which four times its rounding is the tolerance, if that is larger.
        worst: name of that gradient.
        tolerance: what the error may be.
        noise: largest rounding of a gradient, |difference| between two runs of the oracle over its largest value.
        spikes_differing: unit, threshold or neurons of windows -> spikes that differ.
        approximate: name of the strategy if it is not exact, else None.
        accepts: the error of a rebuilt u up to which that strategy runs.
        zero_gradients: what has a gradient of 0 everywhere in the oracle, so that little is shown for it.
    """

    passed: bool
    spikes_equal: bool
    buffers_equal: bool
    random_equal: bool
    max_gradient_error: float
    worst: str
    tolerance: float
    noise: float
    spikes_differing: dict[str, int]
    approximate: str | None = None
    accepts: float = 0.0
    zero_gradients: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        word = "equal" if self.passed else "NOT equal"
        accepted = f", as its error of u stays below {self.accepts:g}" if self.accepts else ""
        found = (
            f"{word} to plain BPTT: largest gradient error {self.max_gradient_error:.1e} at {self.worst} (allowed "
            f"{self.tolerance:.1e}{accepted})."
        )
        first = found if self.approximate is None else f"{self.approximate} is approximate, {found}"
        lines = [
            first,
            f"spikes {_word(self.spikes_equal)}, buffers {_word(self.buffers_equal)}, random numbers "
            f"{_word(self.random_equal)}.",
        ]
        lines += [f"  {name}: {count} spikes differ" for name, count in self.spikes_differing.items()]
        if self.zero_gradients:
            count = len(self.zero_gradients)
            lines.append(
                f"{count} gradient{'s are' if count > 1 else ' is'} 0 everywhere ({', '.join(self.zero_gradients[:3])}"
                f"{', ...' if count > 3 else ''}), which shows little for {'them' if count > 1 else 'it'}: a head that "
                "starts at 0 or silent layers stop them. Verify trained weights."
            )
        return "\n".join(lines)


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFER"


@dataclass
class _Step:
    """Everything one step leaves behind."""

    outputs: tuple[Tensor, ...]  # logits, and those of auxiliary heads where the loss reads them
    spikes: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor


def verify(
    model: nn.Module,
    sample: Tensor | tuple[Tensor, Tensor],
    *,
    loss: LossFunction = mean_cross_entropy,
    tolerance: float | None = None,
    backend: str = "auto",
    autocast: bool = False,
) -> Verdict:
    """Compare one training step of `model`, as it is set up, with plain BPTT on the reference operations.

    Weights, gradients, buffers, mode and random numbers are afterwards as they were.

    Args:
        model: a network of spikefit units with its strategy or plan applied.
        sample: input [T, B, ...], or (input, targets).
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        tolerance: allowed gradient error; None for 1e-10 in float64, 1e-5 in float32, 2e-2 in half precision or
            autocast, and under a strategy that is not exact for the error of u it accepts, if that is larger; four
            times the rounding between two runs of the oracle is always allowed.
        backend: backend of the step that is verified.
        autocast: run under bfloat16 autocast.

    Returns:
        Verdict.

    Raises:
        OptionError: the model or the sample is of another kind.
        SpikefitError: two equal runs of the model differ in their spikes, so nothing can be compared or recomputed.
    """
    check_model("verify", model)
    options = (*with_targets(sample), loss, autocast)
    with in_training(model):
        oracle = _run(model, *options, plain=True, backend="reference")
        again = _run(model, *options, plain=True, backend="reference", scale=RESCALED)
        if _differing(again, oracle) or not _same_outputs(again, oracle):
            names = [*_differing(again, oracle), "the logits"]
            raise SpikefitError(
                f"verify: two runs of {type(model).__name__} from the same random state differ at {names[0]}, so its "
                "forward cannot be repeated; draw random numbers from torch's generators only, and keep no state "
                "between calls."
            )
        got = _run(model, *options, plain=False, backend=backend)
    dtype = torch.bfloat16 if autocast else next(iter(oracle.gradients.values())).dtype
    networks = [m for m in model.modules() if isinstance(m, SpikingNetwork)]
    approximate = [m.strategy for m in networks if not m.strategy.exact_on(m.chain)]
    accepts = max((strategy.accepts for strategy in approximate), default=0.0)
    allowed = max(TOLERANCE.get(dtype, 1e-5), accepts) if tolerance is None else tolerance
    noise, _ = _error(again, oracle)
    floors = {k: ROUNDINGS * _distance(g, again.gradients[k]) / allowed for k, g in oracle.gradients.items() if allowed}
    error, worst = _error(got, oracle, floors)
    differing = _differing(got, oracle)
    spikes_equal = not differing and _same_outputs(got, oracle)
    buffers_equal = all(_same_buffer(t, oracle.buffers[k]) for k, t in got.buffers.items())
    random_equal = torch.equal(got.random, oracle.random)
    passed = spikes_equal and buffers_equal and random_equal and error <= allowed
    return Verdict(
        passed,
        spikes_equal,
        buffers_equal,
        random_equal,
        error,
        worst,
        allowed,
        noise,
        differing,
        ", ".join(sorted({strategy.name for strategy in approximate})) or None,
        accepts,
        [name for name, g in oracle.gradients.items() if not g.any()],
    )


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: LossFunction,
    autocast: bool,
    *,
    plain: bool,
    backend: str,
    scale: float = 1.0,
) -> _Step:
    """One step whose traces are removed again; its gradients are those of `scale` times the loss, over `scale`."""
    # a step that is shown T times is one input, whose gradient is the sum over the steps
    leaf = (x[:1] if x.stride(0) == 0 else x).detach().requires_grad_()
    x = leaf.expand_as(x)
    units = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, SpikingUnit) and module.neuron is not None
    }
    thresholds = {module: name for name, module in model.named_modules() if isinstance(module, Threshold)}
    of_windows = {module: name for name, module in model.named_modules() if isinstance(module, WindowLIF)}
    names = (*units.values(), *thresholds.values(), *of_windows.values())
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    random = torch.get_rng_state()
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    held = {p: p.grad for p in model.parameters()}
    outputs: list[Tensor] = []

    class Notes(Watcher):
        def fired(self, unit: SpikingUnit, spikes: Any) -> None:
            if not outputs:  # what runs again in backward comes later
                with torch.no_grad():
                    packed = isinstance(spikes, PackedSpikes)
                    dense = spikes.steps(0, spikes.shape[0]) if packed else spikes.detach()
                    pieces[units[unit]].append(dense.clone())

    notes = Notes()

    seen = {threshold: WeakTensorKeyDictionary() for threshold in thresholds}

    def noted(threshold: Any, inputs: Any, spikes: Tensor) -> None:
        # a state handed from one piece of a sequence to the next may be asked by both
        again = any(seen[threshold].get(v) == v._version for v in inputs)
        if outputs or again:
            return
        seen[threshold].update({v: v._version for v in inputs})
        # one that is called in several places gives several shapes
        pieces[thresholds[threshold]].append(spikes.detach().flatten().clone())

    handles = [unit.register_forward_hook(lambda unit, inputs, output: notes.fired(unit, output[0])) for unit in units]
    handles += [threshold.register_forward_hook(noted) for threshold in thresholds]

    def noted_windows(neuron: Any, inputs: Any, output: Any) -> None:
        if not outputs:
            pieces[of_windows[neuron]].append(output[0].detach().flatten().clone())

    handles += [neuron.register_forward_hook(noted_windows) for neuron in of_windows]
    try:
        for p in held:
            p.grad = None
        strategy = plain_bptt(model) if plain else contextlib.nullcontext()
        with strategy, use_backend(backend), watched(notes):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
                value, found = loss_of(model, loss, x, y)
            outputs += [out.detach().clone() for out in found]
            del found
            (value * scale).backward()
        gradients = {"input": leaf.grad} | {k: p.grad for k, p in model.named_parameters()}
        return _Step(
            tuple(outputs),
            {name: torch.cat(parts) for name, parts in pieces.items() if parts},
            {k: g / scale for k, g in gradients.items() if g is not None},
            {k: b.clone() for k, b in model.named_buffers()},
            torch.get_rng_state(),
        )
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in held.items():
            p.grad = grad
        with torch.no_grad():
            for k, b in model.named_buffers():
                b.copy_(buffers[k])
        torch.set_rng_state(random)


def _same_outputs(a: _Step, b: _Step) -> bool:
    return all(map(torch.equal, a.outputs, b.outputs))


def _differing(a: _Step, b: _Step) -> dict[str, int]:
    """Unit, threshold or neurons of windows -> number of spikes that differ."""
    counts = {}
    for name, wanted in b.spikes.items():
        got = a.spikes.get(name)
        if got is None or got.shape != wanted.shape:
            counts[name] = wanted.numel()
        else:
            counts[name] = int((got != wanted).sum())
    return {k: n for k, n in counts.items() if n}


def _same_buffer(got: Tensor, wanted: Tensor) -> bool:
    """Equal; floating point ones to a few roundings, as backends add float64 sums in another order."""
    if not wanted.is_floating_point():
        return torch.equal(got, wanted)
    few = 16 * torch.finfo(wanted.dtype).eps
    return torch.allclose(got, wanted, rtol=few, atol=few)


def _error(a: _Step, b: _Step, floors: dict[str, float] | None = None) -> tuple[float, str]:
    """(largest difference of the gradients over the scale of each, its name)."""
    worst, name = 0.0, next(iter(b.gradients))
    for key, wanted in b.gradients.items():
        got = a.gradients.get(key)
        if got is None or got.shape != wanted.shape:
            return float("inf"), key
        scale = max(float(wanted.abs().max()), (floors or {}).get(key, 0.0))
        error = _distance(got, wanted) / (scale if scale > 0 else 1.0)
        if not error <= worst:
            worst, name = error, key
    return worst, name


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
