"""What the parts of `gradient_rules.py` compare: rows (a rule or strategy, and its loss) and networks with a batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import ROOT
from torch import Tensor, nn

from spikefit import create_model
from spikefit.losses import create_loss
from spikefit.planning import random_sample
from spikefit.reporting.measure import FirstBatch
from spikefit.reporting.study_file import Cell, make_cells, read_study
from spikefit.rules import Driver, parse_driver
from spikefit.training import load_recipe

# row -> its loss, which decides what BPTT it is compared with
STEPS, MEAN = "ce_steps", "ce_mean"
TWIN = {STEPS: "bptt", MEAN: "bptt, loss of the mean"}
ROWS = {
    "bptt": STEPS,
    "bptt, loss of the mean": MEAN,
    "sltt": STEPS,
    "sltt_k": STEPS,
    "ottt": STEPS,
    "ndot": STEPS,
    "tbptt:2": STEPS,
    "rate": MEAN,
    "rate:sequence": MEAN,
    "sltt over lean:spikes": STEPS,
    "ottt over lean:spikes": STEPS,
    "lean:spikes": STEPS,
    "checkpoint": STEPS,
}
# the rules whose gradients differ from each other
RULES = ("sltt", "sltt_k", "ottt", "ndot", "tbptt:2", "rate")
STUDIES = ("uci_har", "nmnist", "cifar10")
BATCHES = (8, 16, 32, 64)  # of VGG6
VGG6: dict[str, Any] = {"pool": "avg", "input_shape": (3, 32, 32)}


class Network(NamedTuple):
    """A network with a batch.

    Attributes:
        make: the network under bptt, in training mode, with the same weights in every call; options of a neuron
            ("detach_reset") change it.
        x, y: input [T, B, ...] and classes [B].
        smoothing: of the labels in the loss.
    """

    make: Callable[..., nn.Module]
    x: Tensor
    y: Tensor
    smoothing: float = 0.0


def zoo(name: str, timesteps: int, batch: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> Network:
    """A network of the zoo with statistics of each step, and random input."""

    def make(**neuron: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = create_model(name, norm="step_bn", neuron={"name": "lif", **neuron}, **options)
            return made.to(dtype).train()

    x, _ = random_sample(make().input_shape, timesteps, batch, dtype=dtype)
    return Network(make, x, torch.arange(batch) % 6)


def in_batches(batch: int) -> str:
    """What records call VGG6 with samples in batches."""
    return f"vgg6, batch {batch}"


def baseline(study: str, *, quick: bool) -> Cell:
    """The run of a study that trains with bptt and the loss of every step, its first seed; on less data if `quick`."""
    source = read_study(ROOT / "studies" / f"gradient_rules_{study}.toml")
    cell = next(cell for cell in make_cells(source, load_recipe) if cell.variant == "bptt")
    small = {"data.limit": 32, "data.batch_size": 8}
    return replace(cell, recipe=cell.recipe.override(small)) if quick else cell


def studied(cell: Cell, batch: FirstBatch, weights: Path | None = None) -> Network:
    """The network of a study on its first batch, with initial weights or those of a checkpoint."""

    def make(**neuron: Any) -> nn.Module:
        recipe = cell.recipe.override({f"neuron.{key}": value for key, value in neuron.items()})
        return batch.plain_model(recipe, weights)

    return Network(make, batch.x, batch.y, cell.recipe.loss.options().get("label_smoothing", 0.0))


def driver_of(row: str, timesteps: int) -> Driver:
    """What runs a row; sltt_k takes a quarter of the steps, as in the studies."""
    if row.startswith("bptt"):
        return parse_driver("bptt")
    if row == "sltt_k":
        return parse_driver(f"sltt_k:{max(1, timesteps // 4)}")
    name, _, inside = row.partition(" over ")
    return parse_driver({"name": name, "inside": inside} if inside else name)


def step_of(network: Network, row: str, **neuron: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network as a row runs it, and its training step without the optimiser, which returns the loss."""
    model, driver = network.make(**neuron), driver_of(row, len(network.x))
    driver.apply(model)
    loss = create_loss(ROWS.get(row, STEPS), label_smoothing=network.smoothing)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        return driver.run(model, network.x, network.y, loss)

    return model, step


def gradients(network: Network, row: str, **neuron: Any) -> dict[str, Tensor]:
    """Gradients of one step by parameter."""
    model, step = step_of(network, row, **neuron)
    step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
