"""Evaluation and prediction with trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spikefit.data import Dataset, batches
from spikefit.encoding import Encoding
from spikefit.errors import CheckpointError, DataError
from spikefit.losses.losses import UNLABELLED, Loss
from spikefit.losses.model_loss import loss_of
from spikefit.models.network import plain_bptt
from spikefit.neurons.lif import SpikingNeuron
from spikefit.ops.dispatch import use_backend
from spikefit.planning.counting import watched_firing
from spikefit.training.build import build_encoding, build_loss, build_model, derive_seed, load_split, make_fabric
from spikefit.training.checkpoint import Checkpoint, fill_model, load_checkpoint
from spikefit.training.recipe import Recipe, load_recipe


class Prediction(NamedTuple):
    """Answers for a batch: class index [B] int64, probabilities [B, K], and the names of the classes."""

    classes: Tensor
    probabilities: Tensor
    names: list[str]


def evaluate(
    checkpoint: str | Path, recipe: str | Path | Mapping[str, Any] | Recipe | None = None, *, split: str = "test"
) -> dict[str, Any]:
    """Accuracy, loss and spike rates of trained weights on a split.

    Args:
        checkpoint: a checkpoint, or the folder that `train(out=...)` wrote, which means its newest.
        recipe: another recipe for the same model (other data, precision, ...); None takes the one trained with.
        split: "test" or "train".

    Returns:
        {"accuracy" (share), "loss", "spike_rate", "spike_rates" (layer -> share per step), "samples", "split",
        "checkpoint"}; with averaged weights if the run kept any.

    Raises:
        CheckpointError: damaged, none there, or of another model.
        DataError, RecipeError: the data cannot be read.
        TrainingError: this machine lacks the device or precision of the recipe.

    Example:
        spikefit.evaluate("runs/demo")["accuracy"]
    """
    found = open_checkpoint(checkpoint)
    chosen = load_recipe(recipe if recipe is not None else found.state["recipe"])
    dataset = load_split(chosen, split)
    fabric, model = restored("evaluate", found, chosen, dataset)
    with use_backend(chosen.backend):
        loss, size = build_loss(chosen, model), chosen.data.batch_size
        result = measure(model, dataset, fabric, build_encoding(chosen), loss, size, chosen.seed)
    return {**result, "split": split, "checkpoint": str(found.path)}


def predict(
    checkpoint: str | Path, inputs: Any, recipe: str | Path | Mapping[str, Any] | Recipe | None = None
) -> Prediction:
    """Classes and probabilities of samples, softmax of the logits averaged over time.

    Args:
        checkpoint: as in `evaluate`.
        inputs: samples as the batches of the data set have them: images [B, C, H, W] scaled and normalised alike,
            sequences [B, T, C], or a list of event arrays.
        recipe: as in `evaluate`; its encoding makes sequences of the samples.

    Raises:
        CheckpointError: as in `evaluate`.
        ShapeError: samples of another shape than the model was trained with.
        DataError: no sample.
    """
    found = open_checkpoint(checkpoint)
    chosen = load_recipe(recipe if recipe is not None else found.state["recipe"])
    fabric, model = restored("predict", found, chosen, None)
    if isinstance(inputs, np.ndarray) and inputs.dtype.names is None:
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, Tensor):
        inputs = inputs.float() if not inputs.is_floating_point() else inputs
    if len(inputs) == 0:
        raise DataError("predict: expected at least one sample, got none.")
    encoding, size, parts = build_encoding(chosen), chosen.data.batch_size, []
    with use_backend(chosen.backend), torch.no_grad(), fabric.autocast():
        for index, start in enumerate(range(0, len(inputs), size)):
            x = to_sequence(encoding, inputs[start : start + size], fabric, derive_seed(chosen.seed, "encode", index))
            with draws_of(fabric, chosen.seed, index):
                parts.append(model(x).float().mean(0).softmax(-1).cpu())
    probabilities = torch.cat(parts)
    return Prediction(probabilities.argmax(-1), probabilities, list(found.state["classes"]))


def to_sequence(encoding: Encoding, inputs: Any, fabric: Fabric, seed: int) -> Tensor:
    """Encode samples into [T, B, ...] on the device of `fabric`; all randomness comes from `seed`."""
    # moved before encoding: a repeated sequence then stays a view of one step
    inputs = inputs.to(fabric.device) if isinstance(inputs, Tensor) else inputs
    sequence = encoding(inputs, torch.Generator().manual_seed(seed)).to(fabric.device)
    return fabric.strategy.precision.convert_input(sequence)


@contextmanager
def draws_of(fabric: Fabric, seed: int, index: int) -> Iterator[None]:
    """Within the block, a network that draws random numbers in evaluation draws those of batch `index` under `seed`."""
    with torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "draws", index))
        yield


@torch.no_grad()
def measure(
    model: nn.Module, dataset: Dataset, fabric: Fabric, encoding: Encoding, loss: Loss, batch_size: int, seed: int
) -> dict[str, Any]:
    """Accuracy, loss and spike rates of `model` in evaluation mode; processes share the batches.

    Labels of single steps are compared step by step, labels of samples with the mean over time; -1 counts nowhere.
    """
    was_training = model.training
    model.eval()
    # loss x labels, correct, labels, samples
    sums = torch.zeros(4, dtype=torch.float64)
    with _spike_rates(model) as rates, fabric.autocast():
        for index, inputs, targets in batches(dataset, batch_size):
            if index % fabric.world_size != fabric.global_rank:
                continue
            x = to_sequence(encoding, inputs, fabric, derive_seed(seed, "encode", index))
            targets = time_first(targets).to(fabric.device)
            with draws_of(fabric, seed, index):
                value, outputs = loss_of(model, loss, x, targets)
            logits = outputs[0].float()
            answers = logits.argmax(-1) if targets.ndim == 2 else logits.mean(0).argmax(-1)
            labelled = targets != UNLABELLED
            count = int(labelled.sum())
            if count:
                correct = int((answers == targets)[labelled].sum())
                sums += torch.tensor([float(value) * count, correct, count, 0.0], dtype=torch.float64)
            sums[3] += len(inputs)
    model.train(was_training)
    names = list(rates)
    values = torch.stack([rates[n].cpu() for n in names]) if names else torch.zeros(0, 2)
    if fabric.world_size > 1:
        sums = _summed(fabric, sums)
        values = _summed(fabric, values)
    samples, labels = int(sums[3]), max(1.0, float(sums[2]))
    # what no process called has no rate
    per_layer = {_layer_of(model, n): float(v[0] / v[1]) for n, v in zip(names, values, strict=True) if v[1]}
    return {
        "accuracy": float(sums[1]) / labels,
        "loss": float(sums[0]) / labels,
        "spike_rate": sum(per_layer.values()) / len(per_layer) if per_layer else None,
        "spike_rates": per_layer,
        "samples": samples,
    }


def time_first(targets: Tensor) -> Tensor:
    """Labels of every step come as [B, T] from the data and go as [T, B] to losses."""
    return targets.T if targets.ndim == 2 else targets


@contextmanager
def _spike_rates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """`watched_firing` of `model` under plain BPTT."""
    # the forward does not depend on the strategy, but units that pack do not call their neurons
    with watched_firing(model) as fired, plain_bptt(model):
        yield fired


def _layer_of(model: nn.Module, path: str) -> str:
    """How the layer of what fires is called: a unit stands for its neuron, a threshold for itself."""
    return path.removesuffix(".neuron") if isinstance(model.get_submodule(path), SpikingNeuron) else path


def _summed(fabric: Fabric, values: Tensor) -> Tensor:
    reduced = fabric.all_reduce(values.to(fabric.device), reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced.cpu()


def open_checkpoint(checkpoint: str | Path) -> Checkpoint:
    if Path(checkpoint).suffix == ".toml":
        raise CheckpointError(
            f"checkpoint {checkpoint}: a recipe has no weights; give the folder that train(out=...) wrote."
        )
    return load_checkpoint(checkpoint)


def restored(who: str, found: Checkpoint, recipe: Recipe, dataset: Dataset | None) -> tuple[Fabric, nn.Module]:
    """A model of `recipe` with the weights of `found`, ready on its device."""
    fabric = make_fabric(who, recipe)
    model = build_model(recipe, dataset, learns=False)
    fill_model(model, found.tensors.get("ema", found.tensors["model"]), found.path)
    model = fabric.strategy.precision.convert_module(model)
    return fabric, fabric.to_device(model).eval()
