"""What `compare` measures besides training: gradients against bptt, step times side by side, memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikefit.data import batches
from spikefit.errors import OptionError, TrainingError
from spikefit.ops.dispatch import use_backend
from spikefit.planning import memory_against_timesteps, profile
from spikefit.planning.target import Step
from spikefit.rules.table import WHOLE, Driver
from spikefit.training import (
    Recipe,
    build_augmentation,
    build_data,
    build_driver,
    build_encoding,
    build_loss,
    build_model,
    derive_seed,
)
from spikefit.training.build import STEP_PRECISIONS, make_fabric
from spikefit.training.checkpoint import fill_model, load_checkpoint
from spikefit.training.evaluation import time_first, to_sequence
from spikefit.training.options import fixed_parts
from spikefit.training.run import run_batch

# below the smallest normal float32 a gradient is zero for all purposes
TINY = torch.finfo(torch.float32).tiny


class FirstBatch:
    """The first batch of a training run, on its device, and training steps on it that change no weight.

    Args:
        recipe: decides data, encoding, loss, device and precision.

    Attributes:
        x: sequence [T, B, ...].
        y: targets [B], or [T, B].

    Raises:
        RecipeError, OptionError, DataError, TrainingError: as `spikefit.train`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.fabric = make_fabric("compare", recipe)
        self.dataset = build_data(recipe).train
        # as the training loop draws it: epoch 0, batch 0
        index, inputs, targets = next(
            batches(
                self.dataset,
                recipe.data.batch_size,
                seed=recipe.seed,
                shuffle=True,
                drop_last=recipe.data.drop_last,
                augment=build_augmentation(recipe, self.dataset),
            )
        )
        self.x = to_sequence(build_encoding(recipe), inputs, self.fabric, derive_seed(recipe.seed, "encode", 0, index))
        self.y = time_first(targets).to(self.fabric.device)
        self.recipe = recipe
        self.dropout_seed = derive_seed(recipe.seed, "dropout", 0, index, 0)

    def model(self, recipe: Recipe) -> Any:
        """The model of `recipe` with its initial weights, in training mode, wrapped for device and precision."""
        return self.fabric.setup_module(build_model(recipe, self.dataset)).train()

    def plain_model(self, recipe: Recipe, checkpoint: Path | None = None) -> nn.Module:
        """The model of `recipe` itself, with its initial weights or those of the newest checkpoint in a folder."""
        model = build_model(recipe, self.dataset)
        if checkpoint is not None:
            tensors = load_checkpoint(checkpoint).tensors
            fill_model(model, tensors.get("ema", tensors["model"]), checkpoint)
        return self.fabric.to_device(self.fabric.strategy.precision.convert_module(model)).train()

    def step(self, model: nn.Module, driver: Driver = WHOLE) -> None:
        """Forward, loss and backward as `driver` runs them; the gradients are left in the parameters."""
        model.zero_grad(set_to_none=True)
        devices = [self.x.device] if self.x.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.dropout_seed)
            loss = build_loss(self.recipe, model)
            run_batch(
                self.fabric,
                model,
                driver,
                self.x,
                self.y,
                loss,
                backward=self.fabric.backward,
                update=lambda: None,
            )

    def gradients(self, model: Any, driver: Driver = WHOLE) -> dict[str, Tensor]:
        """Gradients by parameter name after one step."""
        self.step(model, driver)
        return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def settings_of(recipe: Recipe, *, timesteps: int | None, device: str) -> dict[str, Any]:
    """What belongs beside every ratio: timesteps (None: those of the data), batch, reset, dtype, device."""
    neuron = recipe.neuron
    if "neuron" in fixed_parts(recipe.model.name):
        reset = "reset of the model"
    elif not neuron.reset:
        reset = "no reset"
    else:
        kind = "soft reset" if neuron.v_reset == "soft" else f"hard reset to {neuron.v_reset:g}"
        reset = f"{kind} ({'detached' if neuron.detach_reset else 'with gradient'})"
    precision = recipe.train.precision
    dtype = {"32-true": "float32", "64-true": "float64", "bf16-mixed": "bfloat16 autocast"}.get(precision, precision)
    batch = recipe.data.batch_size
    return {"timesteps": timesteps, "batch": batch, "reset": reset, "dtype": dtype, "device": device}


def gradient_error(got: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest relative difference of any parameter's gradient.

        error = max over parameters p of  max |g_p - r_p| / max |r_p|

    Args:
        got, reference: gradients by parameter name, equal names and shapes.

    Returns:
        0.0 if all are equal bit for bit.

    Raises:
        TrainingError: other names, or a gradient that is not finite; the parameter is named.
    """
    if got.keys() != reference.keys():
        odd = sorted(got.keys() ^ reference.keys())
        raise TrainingError(f"compare: the strategies give gradients to different parameters: {', '.join(odd)}.")
    worst = 0.0
    for name, r in reference.items():
        g, r = got[name].double(), r.double()
        if not (g.isfinite().all() and r.isfinite().all()):
            raise TrainingError(f"compare: the gradient of {name} is not finite on the first batch; lower train.lr.")
        worst = max(worst, float((g - r).abs().max() / r.abs().max().clamp_min(TINY)))
    return worst


def interleaved_seconds(
    steps: dict[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    budget: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each step, in rounds where the steps take turns.

    A machine that slows down slows all of them, which a measurement one after the other would blame on one. The first
    round warms up and does not count; every round starts with another step.

    Args:
        steps: functions by name.
        rounds: rounds that count, 1 or more.
        budget: no further round starts after this many seconds, once 3 have counted.
        clock: seconds.

    Returns:
        seconds by name.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    for i in range(rounds + 1):
        if i > 3 and clock() - start > budget:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            before = clock()
            steps[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append(clock() - before)
    return {name: statistics.median(values) for name, values in seconds.items()}


def check_measurable(who: str, recipe: Recipe) -> None:
    """Refuse what a step cannot be measured with.

    Raises:
        OptionError: several devices, or a precision whose bytes are not known.
    """
    if recipe.train.devices > 1:
        raise OptionError(
            f"{who}: expected train.devices=1, got {recipe.train.devices}; every further process would start the whole "
            f"{who} again. Train on several devices with spikefit train."
        )
    if recipe.train.precision not in STEP_PRECISIONS:
        raise OptionError(
            f"{who}: expected train.precision as one of {', '.join(STEP_PRECISIONS)}, got "
            f"{recipe.train.precision!r}; the memory of a step is known for these only."
        )


def measure_memory(recipe: Recipe) -> dict[str, Any]:
    """saved_bytes, peak_bytes and predicted_peak_bytes of a training step of `recipe`, from its initial weights.

    Raises:
        SpikefitError: as `spikefit.profile`.
    """
    with use_backend(recipe.backend):
        batch = FirstBatch(recipe)
        found = profile_of(recipe, batch, batch.plain_model(recipe))
    return {key: found[key] for key in ("saved_bytes", "peak_bytes", "predicted_peak_bytes")}


def profile_of(recipe: Recipe, batch: FirstBatch, model: nn.Module) -> dict[str, Any]:
    """Bytes, layers and energy of a training step of `model` on `batch`, and its bytes for other numbers of steps.

    Returns:
        saved_bytes, peak_bytes (measured in a fresh process), predicted_peak_bytes, layers, categories, energy, and
        memory_against_T: [{timesteps, saved_bytes, predicted_peak_bytes}].
    """
    # one class per sample, as T varies: what a label of every step adds to memory is nothing beside the network
    y = (batch.y if batch.y.ndim == 1 else batch.y[-1]).clamp_min(0)
    driver = build_driver(recipe)
    step = Step(
        model, batch.x, y, build_loss(recipe, model), recipe.backend, STEP_PRECISIONS[recipe.train.precision][1]
    )
    found = profile(replace(step, driver=driver), repeats=1).to_dict()
    own = int(batch.x.shape[0])
    with use_backend(recipe.backend):
        against = memory_against_timesteps(
            model,
            batch.x,
            y,
            timesteps=sorted({4, 8, 16, 32, own}),
            loss=step.loss,
            autocast=step.autocast,
            driver=driver,
        )
    kept = {key: found[key] for key in ("saved_bytes", "predicted_peak_bytes", "layers", "categories", "energy")}
    return {**kept, "peak_bytes": found["measured_peak_bytes"], "memory_against_T": against}
