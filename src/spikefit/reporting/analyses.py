"""What studies ask of trained weights: how they do in another variant, and with part of them set to zero.

Source of both questions: Kim et al. 2023, arXiv:2305.18360, "Sharing leaky-integrate-and-fire neurons for
memory-efficient spiking neural networks".
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spikefit.data import Dataset, batches
from spikefit.encoding import Encoding
from spikefit.engines.membranes import stages_of
from spikefit.errors import OptionError, RecipeError
from spikefit.layers import BatchNorm
from spikefit.layers.rebuild import neuron_of
from spikefit.layers.shared import SharedStage
from spikefit.models import SpikingNetwork
from spikefit.models.network import plain_bptt
from spikefit.neurons import SpikingNeuron
from spikefit.ops.dispatch import use_backend
from spikefit.ops.dtype import compute_dtype
from spikefit.reporting.study_file import Cell
from spikefit.training import (
    Data,
    ProgressEvent,
    Recipe,
    build_augmentation,
    build_data,
    build_encoding,
    build_loss,
    build_model,
    derive_seed,
    load_checkpoint,
    save_checkpoint,
    train,
)
from spikefit.training.checkpoint import latest
from spikefit.training.evaluation import measure, restored, to_sequence

# Samples of the test split whose neurons are watched, from the first one on.
FIRING_SAMPLES = 256


def has_weights(folder: Path) -> bool:
    """Whether `train_and_keep` has finished into `folder`."""
    return latest(folder) is not None


def train_and_keep(
    recipe: Recipe, folder: Path, listen: Callable[[ProgressEvent], None], progress: bool
) -> dict[str, Any]:
    """Train, leave the final weights in `folder` as a checkpoint without an optimiser, and return the record.

    Averaged weights are kept where the run has any. A run that was stopped goes on where it stopped.
    """
    run = folder.with_name(f"{folder.name}.run")
    record = train(recipe, out=run, resume=True, on_progress=listen, progress=progress)
    tensors = load_checkpoint(run).tensors
    state = {"recipe": record.recipe, "classes": record.classes}
    save_checkpoint(folder, record.steps, state, {"model": tensors.get("ema", tensors["model"])})
    shutil.rmtree(run, ignore_errors=True)
    return {**record.to_dict(), "checkpoint": None}


def check_transfer(cells: Sequence[Cell]) -> None:
    """Check that weights of all variants of a data row fit each other.

    Raises:
        RecipeError: they differ in a name or shape; the first one is told.
    """
    first: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {}
    for cell in {(cell.data, cell.variant): cell for cell in cells}.values():
        shapes = {name: tuple(t.shape) for name, t in build_model(cell.recipe).state_dict().items()}
        variant, expected = first.setdefault(cell.data, (cell.variant, shapes))
        differing = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
        if differing:
            name = differing[0]
            raise RecipeError(
                f"study: transfer = true needs variants with the same weights, and in {cell.data} {name} is "
                f"{expected.get(name, 'missing')} in {variant!r} and {shapes.get(name, 'missing')} in "
                f"{cell.variant!r}. Give them the same layers and widths, or remove transfer."
            )


def check_pruning(cells: Sequence[Cell]) -> None:
    """Refuse models whose weights do not stay zero.

    Raises:
        OptionError: a variant standardises its weights.
    """
    for cell in cells:
        if cell.recipe.norm.name == "ws":
            raise OptionError(
                f"study: {cell.variant} / {cell.data}: pruning sets weights to zero, and norm 'ws' moves their mean, "
                "which makes something of zeros; use another norm, or remove pruning."
            )


class Trained:
    """Weights of a study in the models of its cells; the data read last stay in memory."""

    def __init__(self) -> None:
        self.section: Any = None
        self.data: Data | None = None

    def transfer(self, weights: Path, recipe: Recipe) -> dict[str, float | None]:
        """Test accuracy of weights in the model of `recipe`.

        Returns:
            accuracy, with the running statistics of the norms as trained; reestimated, with those of one pass over the
            training data, None for a model without any.
        """
        fabric, model, data = self._open(weights, recipe)
        with use_backend(recipe.backend):
            accuracy = _accuracy(model, data.test, fabric, recipe)
            renewed = reestimate_statistics(model, data.train, fabric, recipe)
            return {
                "accuracy": accuracy,
                "reestimated": _accuracy(model, data.test, fabric, recipe) if renewed else None,
            }

    def prune(self, weights: Path, recipe: Recipe, share: float) -> dict[str, Any]:
        """Test accuracy and firing neurons with `share` of the weights set to zero; nothing is trained further.

        Returns:
            accuracy, weights and weights_left (numbers in convolutions and linear layers), and what `firing` gives.
        """
        fabric, model, data = self._open(weights, recipe)
        with use_backend(recipe.backend):
            total, left = prune_weights(model, share)
            found = firing(model, data.test, fabric, build_encoding(recipe), recipe.data.batch_size, recipe.seed)
            accuracy = _accuracy(model, data.test, fabric, recipe)
        return {"accuracy": accuracy, "weights": total, "weights_left": left, **found}

    def _open(self, weights: Path, recipe: Recipe) -> tuple[Fabric, nn.Module, Data]:
        section = (recipe.data, recipe.encoding)
        if self.data is None or self.section != section:
            self.section, self.data = section, build_data(recipe)
        fabric, model = restored("study", load_checkpoint(weights), recipe, self.data.train)
        return fabric, model, self.data


def _accuracy(model: nn.Module, dataset: Dataset, fabric: Fabric, recipe: Recipe) -> float:
    encoding, loss = build_encoding(recipe), build_loss(recipe, model)
    return measure(model, dataset, fabric, encoding, loss, recipe.data.batch_size, recipe.seed)["accuracy"]


@torch.no_grad()
def reestimate_statistics(model: nn.Module, dataset: Dataset, fabric: Fabric, recipe: Recipe) -> bool:
    """Replace the running statistics of all norms by their plain mean over one pass, in place.

    Batches are those of the first epoch of training, with its augmentation; all but the norms is in evaluation mode.

    Returns:
        whether there is any norm with running statistics.
    """
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    norms = [cast(Any, m) for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.num_batches_tracked.zero_()
        norm.momentum = None
        norm.train()
    encoding = build_encoding(recipe)
    passes = batches(
        dataset,
        recipe.data.batch_size,
        seed=recipe.seed,
        shuffle=True,
        drop_last=recipe.data.drop_last,
        augment=build_augmentation(recipe, dataset),
    )
    with plain_bptt(model), fabric.autocast():
        for index, inputs, targets in passes if norms else ():
            # one sample has no variance, and training leaves it out as well
            if len(targets) > 1:
                model(to_sequence(encoding, inputs, fabric, derive_seed(recipe.seed, "encode", 0, index)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return bool(norms)


@torch.no_grad()
def prune_weights(model: nn.Module, share: float) -> tuple[int, int]:
    """Set the smallest magnitudes to zero, in place: `share` of all weights of convolutions and linear layers together.

    Returns:
        (number of weights, number of those that are left).
    """
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    weights = list({id(m.weight): m.weight for m in model.modules() if isinstance(m, kinds)}.values())
    total = sum(w.numel() for w in weights)
    count = round(share * total)
    if count:
        sizes = torch.cat([w.abs().flatten() for w in weights])
        mask = torch.ones_like(sizes)
        mask[sizes.topk(count, largest=False).indices] = 0
        for weight, kept in zip(weights, mask.split([w.numel() for w in weights]), strict=True):
            weight.mul_(kept.view_as(weight))
    return total, total - count


@torch.no_grad()
def firing(
    model: nn.Module,
    dataset: Dataset,
    fabric: Fabric,
    encoding: Encoding,
    batch_size: int,
    seed: int,
    *,
    samples: int = FIRING_SAMPLES,
) -> dict[str, Any]:
    """How many neurons fire at least once in a sequence, on the first samples of `dataset`.

    Returns:
        firing: share of all neurons, mean over samples; firing_per_layer: layer -> the same.
        membranes_used: share of the numbers in membranes that a firing neuron uses, where several may use one;
        lif_forward_bytes: bytes of membranes for one sample; both None unless the model is a `SpikingNetwork`.
        firing_samples: number of samples.
    """
    neurons = {n.removesuffix(".neuron"): m for n, m in model.named_modules() if isinstance(m, SpikingNeuron)}
    fired: dict[nn.Module, Tensor] = {}
    seen, layers = 0, {name: [0, 0] for name in neurons}
    membranes = [0, 0]

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        now = (output[0] != 0).any(0)
        # a stage that shares a membrane calls its neurons step by step
        fired[module] = fired[module] | now if module in fired else now

    handles = [module.register_forward_hook(collect) for module in neurons.values()]
    with plain_bptt(model), fabric.autocast():
        for index, inputs, targets in batches(dataset, batch_size):
            fired.clear()
            model(to_sequence(encoding, inputs[: samples - seen], fabric, derive_seed(seed, "encode", index)))
            seen += min(len(targets), samples - seen)
            for name, neuron in neurons.items():
                _add(layers[name], fired[neuron])
            for mask in _used(model, fired):
                _add(membranes, mask)
            if seen >= samples:
                break
    for handle in handles:
        handle.remove()
    active, total = (sum(pair[i] for pair in layers.values()) for i in range(2))
    each = compute_dtype(next((p.dtype for p in model.parameters()), torch.float32)).itemsize
    return {
        "firing": active / total if total else None,
        "firing_per_layer": {name: on / all_ for name, (on, all_) in layers.items() if all_},
        "membranes_used": membranes[0] / membranes[1] if membranes[1] else None,
        "lif_forward_bytes": membranes[1] // seen * each if membranes[1] else None,
        "firing_samples": seen,
    }


def _add(pair: list[int], mask: Tensor) -> None:
    pair[0] += int(mask.sum())
    pair[1] += mask.numel()


def _used(model: nn.Module, fired: dict[nn.Module, Tensor]) -> list[Tensor]:
    """Per membrane, which of its numbers [B, C/n, ...] belong to a neuron that fired."""
    masks: list[Tensor] = []
    for stage in stages_of(model.chain) if isinstance(model, SpikingNetwork) else []:
        if not isinstance(stage, SharedStage):
            continue
        found: dict[int, Tensor] = {}
        for layer, membrane in zip(stage.layers, stage.membranes, strict=True):
            neuron = neuron_of(layer)
            mask = fired[neuron].unflatten(1, (neuron.groups, -1)).any(1)
            found[membrane] = found[membrane] | mask if membrane in found else mask
        masks += found.values()
    return masks
