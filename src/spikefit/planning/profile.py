"""`profile`: where the memory, the time and the operations of a training step go."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikefit.errors import OptionError
from spikefit.losses.model_loss import LossFunction
from spikefit.models import SpikingNetwork
from spikefit.neurons import SpikingNeuron, Threshold, TwoGroupNode
from spikefit.neurons.window import WindowLIF
from spikefit.ops.dispatch import installed, resolve, use_backend
from spikefit.ops.dtype import compute_dtype
from spikefit.planning.counting import RECURRENT_HALVES, counted_run, counted_shapes
from spikefit.planning.energy import Operations, energy_report
from spikefit.planning.held import SavedBytes
from spikefit.planning.measured import cuda_peak_bytes, measured_peak_bytes, measured_peak_bytes_of
from spikefit.planning.membranes import membrane_bytes
from spikefit.planning.memory import predicted_bytes, reliability
from spikefit.planning.target import Step, Target, in_training, mean_cross_entropy, training_step, with_targets
from spikefit.rules.table import WHOLE, Driver, parse_driver


@dataclass
class LayerProfile:
    """One row of a profile.

    Attributes:
        name, kind: path of the module, and its class.
        parameters: number of trainable values; 0 for the two halves of a recurrent module, whose own row has them.
        saved_bytes: category -> bytes held between forward and backward.
        spike_rate: mean of the neuron's output per neuron and step; None without a neuron or a run.
        macs: multiply-accumulates per sample and step, as if dense.
        steps: how many steps of a sequence the layer computes: T, or 1 for a step that is repeated, for a layer that
            is called once, and for all parts that a step is cut into.
        synops, synops_exact: accumulates per sample and sequence, see `Operations`.
        energy_pj: per sample and sequence.
    """

    name: str
    kind: str
    parameters: int
    saved_bytes: dict[str, int]
    spike_rate: float | None = None
    macs: float | None = None
    steps: int | None = None
    synops: float | None = None
    synops_exact: float | None = None
    energy_pj: float | None = None


@dataclass
class Profile:
    """What one training step costs.

    Attributes:
        predicted_peak_bytes: peak above the level before the step, from shapes alone; settings["prediction"] says
            whether that is a promise or an estimate.
        measured_peak_bytes: the same measured, on CPU in a fresh process; None if only predicted.
        saved_bytes: held between forward and backward, each storage once.
        step_seconds: median time of a step; None if only predicted.
        layers: one row per layer.
        energy: see `energy_report`.
        lif_forward_bytes, lif_backward_kept_bytes, lif_backward_peak_bytes: what neurons alone hold, the last two by
            strategy; see `MembraneBytes`. None and empty for a model that is no `SpikingNetwork`.
        categories: bytes of weights, gradients, buffers, input, and of what is held for backward by category.
        settings: T, batch, dtype, reset, leak ("learned" if it is), share, groups, strategy, backend (as asked for),
            threads, versions: what belongs beside every ratio; inverse_anchor_every and integer_assumes_grid are those
            of the bytes that neurons hold, see `MembraneBytes`.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    saved_bytes: int
    step_seconds: float | None
    layers: list[LayerProfile]
    energy: dict[str, Any]
    lif_forward_bytes: int | None
    lif_backward_kept_bytes: dict[str, int | None]
    lif_backward_peak_bytes: dict[str, int | None]
    categories: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)


def profile(
    model: nn.Module | str | Target | Step,
    sample: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    predict_only: bool = False,
    strategy: str | None = None,
    backend: str = "auto",
    loss: LossFunction = mean_cross_entropy,
    autocast: bool = False,
    repeats: int = 3,
    **target_options: Any,
) -> Profile:
    """Measure one training step: bytes by layer and category, peak, time, rates, operations, energy.

    Operations are those of units, of read-outs, and of the nn.Conv1d, nn.Conv2d and nn.Linear that blocks of your own
    call, with rows [B, C, ...] of one step, or [k B, C, ...] of k steps; calls of a layer add up. A block whose steps
    have weights of their own says `weights_per_step = True`: its steps are then layers of the ANN twin, which runs in
    each of them what several share, as the network does. A block that cuts one time step into parts, as into windows,
    says `parts_of_a_step = True`: whatever its layers do in one call of the block, in rows [k B, C, ...] or in several
    calls, is then one step, and the twin does it too.

    nn.RNN, nn.GRU and nn.LSTM have two entries: NAME.input for the products with their input, which are accumulates if
    that is 0 or 1, and NAME.recurrent for those with hidden values, of the layers above the first both products.
    Sequences [L, B, in] with L = T are steps; of any other length, or with batch_first, they are tokens of one step.
    Other modules of torch with weights (nn.LSTMCell, nn.Conv3d, nn.Bilinear) are not counted.

    Args:
        model: a module, the name of a zoo model, "package.module:factory", a `Target`, or the `Step` of a recipe
            (`spikefit.training.build_step`).
        sample: input [T, B, ...], or (input, targets); needed for a module, made at random for a name.
        predict_only: run on shapes alone; nothing is allocated, and there are no times, rates or energies.
        strategy: a strategy, set before profiling, or a rule ("sltt"); None leaves the model as it is.
        backend: of all operations.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        autocast: run under bfloat16 autocast.
        repeats: timed steps; the median counts.
        **target_options: for a name, words as on the command line: fields of `Target` (timesteps, batch, encoding,
            dtype), image="3x32x32", and options of the model (width=0.5).

    Returns:
        Profile.

    Raises:
        OptionError: a module without a sample, or an option that does not apply.
        SpikefitError: the model cannot run on fake tensors, or cannot be handed to a fresh process.

    Random numbers, gradients and buffers are afterwards as they were.

    Example:
        profile("vgg9", timesteps=4, batch=8, image="3x32x32", strategy="checkpoint").measured_peak_bytes
    """
    target: Target | None = None
    if isinstance(model, str):
        target = Target.named(model, strategy=strategy, backend=backend, **target_options)
    elif isinstance(model, Target):
        target = model
    if sample is not None and not isinstance(model, nn.Module):
        raise OptionError("profile: a named model makes its own sample; give timesteps, batch and input_shape in it.")
    if target_options and not isinstance(model, str):
        raise OptionError(
            f"profile: {', '.join(target_options)} apply to a model given by name; a module needs sample=x."
        )
    if target is not None:
        step = target.step(loss, shapes_only=predict_only)
    elif isinstance(model, Step):
        step = model
    else:
        if sample is None:
            raise OptionError(
                "profile: a module needs a sample, sample=x with x of shape [T, B, ...], or sample=(x, targets)."
            )
        step = Step(cast(nn.Module, model), *with_targets(sample), loss, backend, autocast)
    if strategy is not None and target is None:
        step = replace(step, driver=parse_driver(strategy))
        step.driver.apply(step.model)
    devices = [step.x.device] if step.x.is_cuda else []
    with use_backend(step.backend), torch.random.fork_rng(devices=devices):
        return _profile(step, target, predict_only, repeats)


def _profile(step: Step, target: Target | None, predict_only: bool, repeats: int) -> Profile:
    module, x, y, loss = step.model, step.x, step.y, step.loss
    autocast, driver = step.autocast, step.driver
    with in_training(module):
        predicted = predicted_bytes(module, x, y, loss=loss, autocast=autocast, device=step.device, driver=driver)
        counted, currents = counted_shapes(module, x, autocast)
        dtype = compute_dtype(next((p.dtype for p in module.parameters()), torch.float32))
        membranes = membrane_bytes(module, currents, dtype) if isinstance(module, SpikingNetwork) else None
        rates: dict[str, float] = {}
        seconds = peak = None
        if not predict_only:
            counted, rates = counted_run(module, x, autocast)
            seconds = _step_seconds(step, repeats)
            if x.is_cuda:
                peak = cuda_peak_bytes(module, x, y, loss, autocast=autocast, driver=driver)
            elif target is not None:
                peak = measured_peak_bytes(target, loss)
            else:
                peak = measured_peak_bytes_of(
                    module, x, y, loss, backend=step.backend, autocast=autocast, driver=driver
                )
    return Profile(
        predicted_peak_bytes=predicted.peak,
        measured_peak_bytes=peak,
        saved_bytes=predicted.saved.total,
        step_seconds=seconds,
        layers=_rows(module, predicted.saved, counted, rates),
        energy=energy_report(list(counted.values()), firing=_firing(module, rates)),
        lif_forward_bytes=None if membranes is None else membranes.forward,
        lif_backward_kept_bytes={} if membranes is None else membranes.kept,
        lif_backward_peak_bytes={} if membranes is None else membranes.peak,
        categories=_categories(module, x, predicted.saved),
        settings={
            **_settings(step),
            "notes": [str(note) for note in driver.notes(module, loss, timesteps=x.shape[0])],
            "inverse_anchor_every": [] if membranes is None else membranes.anchor_every,
            "integer_assumes_grid": membranes is not None and membranes.assumes_grid,
            "prediction": reliability(x, predicted, autocast=autocast, device=step.device, driver=driver),
        },
    )


def memory_against_timesteps(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    timesteps: Sequence[int] = (4, 8, 16, 32),
    loss: LossFunction = mean_cross_entropy,
    autocast: bool = False,
    driver: Driver = WHOLE,
) -> list[dict[str, int]]:
    """Predicted bytes of a training step for other numbers of time steps.

    Args:
        model: any module; a network of fixed length returns its own T only.
        x: input [T, B, ...]; its first step stands for all.
        y: targets [B].
        timesteps: the values of T; those that are too short for the driver are left out.
        loss: (logits, targets) -> scalar; one of `spikefit.losses` that reads auxiliary heads gets their logits too.
        autocast: under bfloat16 autocast.
        driver: what runs a step.

    Returns:
        One {timesteps, saved_bytes, predicted_peak_bytes} per T.
    """
    x, y = with_targets(x if y is None else (x, y))
    fixed = [m.timesteps for m in model.modules() if isinstance(m, SpikingNetwork) and m.timesteps is not None]
    repeated = x.stride(0) == 0 or x.shape[0] == 1
    rows = []
    for T in fixed[:1] or [T for T in timesteps if driver.shortest <= T]:
        sequence = x[:1].expand(T, *x.shape[1:])
        sequence = sequence if repeated else sequence.contiguous()
        predicted = predicted_bytes(model, sequence, y, loss=loss, autocast=autocast, driver=driver)
        rows.append({"timesteps": T, "saved_bytes": predicted.saved.total, "predicted_peak_bytes": predicted.peak})
    return rows


def _step_seconds(step: Step, repeats: int) -> float:
    """Median time of a training step after one that warms up; gradients and buffers are put back."""
    if repeats < 1:
        raise OptionError(f"profile: repeats must be at least 1, got {repeats}.")
    module, x = step.model, step.x
    gradients = {name: p.grad for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    seconds = []
    for i in range(repeats + 1):
        module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        training_step(module, x, step.y, step.loss, autocast=step.autocast, driver=step.driver)
        if x.is_cuda:
            torch.cuda.synchronize()
        if i > 0:
            seconds.append(time.perf_counter() - start)
    for name, p in module.named_parameters():
        p.grad = gradients[name]
    with torch.no_grad():
        for name, b in module.named_buffers():
            b.copy_(buffers[name])
    return statistics.median(seconds)


def _rows(
    module: nn.Module, saved: SavedBytes, counted: dict[str, Operations], rates: dict[str, float]
) -> list[LayerProfile]:
    """One row per layer that has a weight, keeps something or fires, in network order."""
    modules = dict(module.named_modules())
    halves = {
        f"{n}.{half}": n for n in modules for half in RECURRENT_HALVES if f"{n}.{half}" in counted.keys() - modules
    }
    alone = {n for n in rates if isinstance(modules[n], Threshold)}  # the rate of a neuron stands beside its unit
    names = []
    for n in modules:
        own = [half for half, whole in halves.items() if whole == n]
        if n and (own or n in counted or n in saved.layers or n in alone):
            names += [n, *own]
    names += [n for n in saved.layers if n not in names]
    rows = []
    for name in names:
        layer, ops = modules.get(name), counted.get(name)
        rows.append(
            LayerProfile(
                name=name,
                kind=f"{type(modules[halves[name]]).__name__} half" if name in halves else _kind(layer),
                parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad) if layer is not None else 0,
                saved_bytes=saved.layers.get(name, {}),
                spike_rate=rates.get(name, rates.get(f"{name}.neuron")),
                macs=ops.macs if ops else None,
                steps=ops.steps if ops else None,
                synops=ops.synops if ops else None,
                synops_exact=ops.synops_exact if ops else None,
                energy_pj=ops.energy_pj if ops else None,
            )
        )
    return rows


def _kind(layer: nn.Module | None) -> str:
    return "network" if layer is None else type(layer).__name__


def _firing(module: nn.Module, rates: dict[str, float]) -> list[float]:
    """The rates of what fires; the outputs of a two-group node are real values, and their mean is no rate."""
    modules = dict(module.named_modules())
    return [rate for name, rate in rates.items() if not isinstance(modules[name], TwoGroupNode)]


def _categories(module: nn.Module, x: Tensor, saved: SavedBytes) -> dict[str, int]:
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return {
        "weights": weights,
        "gradients": sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        "buffers": sum(b.numel() * b.element_size() for b in module.buffers()),
        "input": x.untyped_storage().nbytes(),
        **{f"kept: {name}": count for name, count in saved.categories().items()},
    }


def _settings(step: Step) -> dict[str, Any]:
    module, x = step.model, step.x
    neurons = [m for m in module.modules() if isinstance(m, SpikingNeuron)]
    resets = {"none" if not n.reset else "soft" if n.v_reset is None else f"hard to {n.v_reset:g}" for n in neurons}
    resets |= {"none" for m in module.modules() if isinstance(m, Threshold)}
    # what goes from window to window
    chained = [m for m in module.modules() if isinstance(m, WindowLIF) and m.fuse != "none"]
    resets |= {"hard to 0" if m.reset == "hard" else m.reset for m in chained}
    networks = [m for m in module.modules() if isinstance(m, SpikingNetwork)]
    exact = all(n.strategy.exact_on(n.chain) for n in networks)
    inside = ", ".join(sorted({str(n.strategy) for n in networks})) or "bptt"
    leaks = {n.coefficients()[0] for n in neurons} | {m.leak for m in chained}
    learned = any(isinstance(leak, Tensor) for leak in leaks)
    return {
        "timesteps": x.shape[0],
        "batch": x.shape[1],
        "sample_shape": list(x.shape[2:]),
        "repeated_input": x.shape[0] > 1 and x.stride(0) == 0,
        "dtype": "bfloat16 autocast" if step.autocast else str(x.dtype).removeprefix("torch."),
        "reset": ", ".join(sorted(resets)),
        "detach_reset": sorted({n.detach_reset for n in neurons}),
        "leak": [*sorted(leak for leak in leaks if isinstance(leak, float)), *(["learned"] if learned else [])],
        "share": ", ".join(sorted({n.share for n in networks})) or "none",
        "groups": sorted({n.groups for n in neurons}),
        "strategy": inside if step.driver.rule is None else str(step.driver),
        "gradient": "exact" if step.driver.rule is None and exact else "approximate",
        "rule": None if step.driver.rule is None else repr(step.driver.rule),
        # the strategy of each step of a rule
        "inside": None if step.driver.rule is None else inside,
        "backend": resolve("auto"),
        "device": str(x.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numba": installed("numba"),
    }
