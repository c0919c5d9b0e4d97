"""One training run: what it is made of, where it stands, and the steps that move it.

Everything random derives from (seed, epoch, batch index): the order of the data, augmentation, random encodings and
dropout. So strategies meet the same batches, and a resumed run makes the same updates as one that never stopped.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from spikefit.data import batches
from spikefit.data.batches import count_batches
from spikefit.errors import CheckpointError, OptionError, TrainingError
from spikefit.losses.losses import UNLABELLED
from spikefit.losses.model_loss import LossFunction
from spikefit.rules import RULES, Driver
from spikefit.training.build import (
    Data,
    build_augmentation,
    build_driver,
    build_encoding,
    build_loss,
    build_model,
    build_optimizer,
    check_classes,
    derive_seed,
    has_batch_statistics,
    written_out,
)
from spikefit.training.checkpoint import (
    clean_up,
    fill_model,
    fill_optimizer,
    latest,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from spikefit.training.evaluation import measure, time_first, to_sequence
from spikefit.training.optimisation import AveragedWeights, learning_rate
from spikefit.training.options import fixed_parts
from spikefit.training.recipe import Recipe
from spikefit.training.record import ProgressEvent, TrainRecord, environment, write_record

OnProgress = Callable[[ProgressEvent], None]

# Keys that may differ between a run and its continuation, because the weights do not depend on them.
FREE_KEYS = {
    ("status",),
    ("backend",),
    ("strategy",),
    ("data", "root"),
    ("train", "checkpoint_every"),
    ("train", "devices"),
}


class Run:
    """One training run: what it is made of, where it stands, and the steps that move it."""

    def __init__(
        self, recipe: Recipe, data: Data, fabric: Fabric, out: str | Path | None, listeners: list[OnProgress]
    ) -> None:
        self.recipe, self.data, self.fabric = written_out(recipe, data.train), data, fabric
        self.out = None if out is None else Path(out)
        self.listeners = listeners
        # classes that follow from the training data have to do for the test data too
        check_classes(self.recipe, data.test)
        self.augmentation = build_augmentation(recipe, data.train)
        self.encoding = build_encoding(recipe)
        self.model = build_model(self.recipe, data.train)
        self.loss = build_loss(recipe, self.model)
        self.driver = build_driver(recipe)
        if self.driver.each_step and recipe.train.accumulate > 1:
            raise OptionError(
                "strategy: update_every='step' moves the weights behind every step of a batch, got "
                f"train.accumulate={recipe.train.accumulate}; use accumulate=1, or update_every='sequence'."
            )
        self.optimizer = build_optimizer(recipe, self.model)
        # what clashes is told before the first batch; T may be that of the data, which only a batch has
        self.driver.notes(self.model, self.loss, timesteps=recipe.encoding.timesteps)
        self.sizes = self._batch_sizes()
        self.wrapped, self.wrapped_optimizer = fabric.setup(self.model, self.optimizer)
        self.average = AveragedWeights(self.model, recipe.train.ema) if recipe.train.ema > 0 else None
        self.updates_per_epoch = math.ceil(len(self.sizes) / recipe.train.accumulate)
        # position: finished epochs, batches and updates, and the sums of the epoch begun
        self.epoch, self.batch, self.update = 0, 0, 0
        self.loss_sum, self.labels, self.elapsed = 0.0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.spike_rates: dict[str, float] = {}
        self.step_seconds: list[float] = []

    def finish(self) -> TrainRecord:
        """Train all epochs that are left and return the record."""
        self._tell("start")
        while self.epoch < self.recipe.train.epochs:
            self._train_epoch()
        self._tell("end", loss=self.history[-1]["train_loss"], accuracy=self.history[-1]["test_accuracy"])
        newest = None if self.out is None else latest(self.out)
        record = TrainRecord(
            recipe=self.recipe.to_dict(),
            environment=environment(self.fabric.device),
            history=self.history,
            accuracy=self.history[-1]["test_accuracy"],
            loss=self.history[-1]["test_loss"],
            spike_rates=self.spike_rates,
            steps=self.update,
            step_seconds=statistics.median(self.step_seconds),
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            classes=self.data.train.classes,
            note=" ".join(filter(None, (self.data.train.note, self._remark()))),
            checkpoint=None if newest is None else str(newest),
        )
        if self.out is not None and self.fabric.is_global_zero:
            write_record(self.out, record)
        return record

    def _remark(self) -> str:
        """What must be said of the gradients."""
        rule = self.driver.rule
        return "" if rule is None else f"Gradients are those of the rule {self.driver}, approximate."

    def restore(self) -> None:
        """Go to where the newest checkpoint was taken; stay at the start if there is none."""
        assert self.out is not None
        if self.fabric.is_global_zero and self.out.is_dir():
            clean_up(self.out)
        path = latest(self.out)
        if path is None:
            return
        found = load_checkpoint(path)
        fill_model(self.model, found.tensors["model"], path)
        self._check_same_run(found.state["recipe"], path)
        fill_optimizer(self.model, self.optimizer, found.tensors["optimizer"], path)
        if self.average is not None:
            fill_model(self.average.model, found.tensors["ema"], path)
        state = found.state
        self.epoch, self.batch, self.update = state["epoch"], state["batch"], state["update"]
        self.loss_sum, self.labels, self.elapsed = state["loss_sum"], state["labels"], state["elapsed"]
        self.history, self.spike_rates = state["history"], state["spike_rates"]
        self.step_seconds = state["step_seconds"]
        self.fabric.strategy.precision.load_state_dict(state["precision"])

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        if self.out is None or not self.fabric.is_global_zero:
            return
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.average is not None:
            tensors["ema"] = self.average.model.state_dict()
        state = {
            "recipe": self.recipe.to_dict(),
            "classes": self.data.train.classes,
            "epoch": self.epoch,
            "batch": self.batch,
            "update": self.update,
            "loss_sum": self.loss_sum,
            "labels": self.labels,
            "elapsed": self.elapsed,
            "history": self.history,
            "spike_rates": self.spike_rates,
            # enough for a median, and bounded
            "step_seconds": self.step_seconds[-101:],
            "precision": self.fabric.strategy.precision.state_dict(),
        }
        save_checkpoint(self.out, self.update, state, tensors)

    def _train_epoch(self) -> None:
        section, last = self.recipe.train, len(self.sizes)
        started = time.perf_counter() - self.elapsed
        self.model.train()
        source = batches(
            self.data.train,
            self.recipe.data.batch_size,
            seed=self.recipe.seed,
            epoch=self.epoch,
            shuffle=True,
            drop_last=self.recipe.data.drop_last,
            start=self.batch,
            augment=self.augmentation,
        )
        while self.batch < last:
            group = list(islice(source, min(section.accumulate, last - self.batch)))
            rate = learning_rate(section, self.update, self.updates_per_epoch)
            value = self._make_update(group, rate)
            self.batch += len(group)
            self.update += 1
            self.elapsed = time.perf_counter() - started
            self._tell("step", loss=value, rate=rate)
            # the end of the epoch writes its own, with the evaluation in it
            if section.checkpoint_every and self.update % section.checkpoint_every == 0 and self.batch < last:
                self.save()
        self._end_epoch(rate, started)

    def _make_update(self, group: list[tuple[int, Any, Tensor]], rate: float) -> float:
        """One step of the optimiser on the mean loss over all labels of the batches in `group`; returns that loss."""
        started, fabric = time.perf_counter(), self.fabric
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        labels = sum(_labels(targets) for _, _, targets in group)
        # without any label the loss is 0, whatever it is divided by
        total = max(1, labels)
        summed = torch.zeros((), device=fabric.device)
        for i, (index, inputs, targets) in enumerate(group):
            x, y, weight = self._share(index, inputs, targets)
            # processes average their gradients, hence the number of them
            factor, skip = weight * fabric.world_size / total, fabric.world_size > 1 and i + 1 < len(group)
            with fabric.no_backward_sync(self.wrapped, enabled=skip):
                summed += self._run(x, y, factor, index) * weight
        if fabric.world_size > 1:
            summed = fabric.all_reduce(summed, reduce_op="sum")  # type: ignore[assignment]
        value = float(summed) / total
        self._check_finite(value, "loss", group[-1][0])
        if not self.driver.each_step:
            self._move_weights(group[-1][0])
        if self.average is not None:
            self.average.update(self.model, self.update)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        self.loss_sum += value * labels
        self.labels += labels
        self.step_seconds.append(time.perf_counter() - started)
        return value

    def _run(self, x: Tensor, y: Tensor, factor: float, batch: int) -> Tensor:
        """Forward, loss and backward of a batch; the loss, detached."""
        return run_batch(
            self.fabric,
            self.wrapped,
            self.driver,
            x,
            y,
            self.loss,
            backward=lambda loss: self.fabric.backward(loss * factor),
            update=lambda: self._move_weights(batch),
            # without the rank in it: processes that update behind every step have to choose the same ones
            generator=torch.Generator().manual_seed(derive_seed(self.recipe.seed, "steps", self.epoch, batch)),
        )

    def _move_weights(self, batch: int) -> None:
        if self.driver.rule is not None and self.fabric.world_size > 1:
            self._average_gradients()
        self._clip(batch)
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()

    def _average_gradients(self) -> None:
        """Means of the gradients of all processes, in one message; what none of them reached keeps no gradient."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        reached = torch.tensor([float(p.grad is not None) for p in trained], device=self.fabric.device)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        mean = cast(
            Tensor, self.fabric.all_reduce(torch.cat([reached, *(g.flatten() for g in found)]), reduce_op="mean")
        )
        counts, *means = mean.split([len(trained), *(p.numel() for p in trained)])
        for p, count, g in zip(trained, counts.tolist(), means, strict=True):
            p.grad = g.view_as(p).to(p.dtype) if count else None

    def _clip(self, batch: int) -> None:
        """Clip the gradient and check it: spikes hide a membrane that is NaN, the gradient of the weight shows it."""
        clip_norm = self.recipe.train.clip_norm
        norm: Tensor | None
        if clip_norm > 0:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.wrapped_optimizer, max_norm=clip_norm, error_if_nonfinite=False
            )
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        # a scaler expects overflows and skips the update itself
        if norm is not None and self.recipe.train.precision != "16-mixed":
            self._check_finite(float(norm), "gradient", batch)

    def _share(self, index: int, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """This process's rows of a batch: sequence [T, b, ...], targets, and how many labels they count for."""
        fabric, seed = self.fabric, self.recipe.seed
        x = to_sequence(self.encoding, inputs, fabric, derive_seed(seed, "encode", self.epoch, index))
        torch.manual_seed(derive_seed(seed, "dropout", self.epoch, index, fabric.global_rank))
        y, weight = time_first(targets).to(fabric.device), _labels(targets)
        if fabric.world_size > 1:
            rows = torch.arange(fabric.global_rank, len(targets), fabric.world_size, device=fabric.device)
            weight = _labels(targets[fabric.global_rank :: fabric.world_size])
            # a process without a row still has to take part; its row counts nothing
            rows = slice(fabric.global_rank, None, fabric.world_size) if len(rows) else slice(0, 1)  # type: ignore[assignment]
            x, y = x[:, rows], y[..., rows]
        return x, y, float(weight)

    def _end_epoch(self, rate: float, started: float) -> None:
        model = self.model if self.average is None else self.average.model
        if self.fabric.world_size > 1:
            # running statistics are those of each process; the first one's count
            for tensor in model.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        result = measure(
            model,
            self.data.test,
            self.fabric,
            self.encoding,
            self.loss,
            self.recipe.data.batch_size,
            self.recipe.seed,
        )
        self._check_finite(result["loss"], "test loss", len(self.sizes) - 1)
        self.spike_rates = result["spike_rates"]
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "train_loss": self.loss_sum / max(1, self.labels),
                "test_loss": result["loss"],
                "test_accuracy": result["accuracy"],
                "seconds": time.perf_counter() - started,
                "learning_rate": rate,
                "spike_rate": result["spike_rate"],
            }
        )
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.labels, self.elapsed = 0.0, 0, 0.0
        self.save()
        self._tell("epoch", loss=self.history[-1]["train_loss"], accuracy=result["accuracy"], rate=rate)

    def _batch_sizes(self) -> list[int]:
        """Samples per batch; a last batch of one sample has no statistics, so models with a batch norm leave it out."""
        data, size = self.data.train, self.recipe.data.batch_size
        count = count_batches(data, size, drop_last=self.recipe.data.drop_last)
        sizes = [min(size, len(data) - i * size) for i in range(count)]
        if sizes[-1] == 1 and has_batch_statistics(self.model):
            sizes.pop()
        if not sizes or (sizes[0] == 1 and has_batch_statistics(self.model)):
            others = "" if "norm" in fixed_parts(self.recipe.model.name) else ", or norm=ws or norm=none"
            raise TrainingError(
                f"train: norm {self.recipe.norm.name!r} takes statistics over the batch and needs 2 samples in it, "
                f"got batch_size {size} and {len(data)} samples; use a larger batch{others}."
            )
        return sizes

    def _check_finite(self, value: float, what: str, batch: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"train: expected a finite {what}, got {value} in epoch {self.epoch + 1}, batch {batch + 1} of "
                f"{len(self.sizes)}; try a smaller train.lr, train.clip_norm=1 or train.precision=32-true."
            )

    def _check_same_run(self, before: dict[str, Any], path: Path) -> None:
        a, b = _flat(before), _flat(self.recipe.to_dict())
        # rules give gradients of their own
        ruled = any(str(c.get(("strategy", "name"))).partition(":")[0] in RULES for c in (a, b))
        free = FREE_KEYS - ({("strategy",)} if ruled else set())
        changed = [k for k in {**a, **b} if a.get(k) != b.get(k) and not {k[:1], k} & free]
        if changed:
            told = ", ".join(f"{'.'.join(k)} was {a.get(k)} and is {b.get(k)}" for k in changed[:3])
            raise CheckpointError(
                f"checkpoint {path}: it belongs to another run; {told}. Resume with the same recipe, or start anew."
            )

    def _tell(
        self, kind: Any, *, loss: float | None = None, accuracy: float | None = None, rate: float | None = None
    ) -> None:
        epochs = self.recipe.train.epochs
        # after an epoch its number still counts as the current one
        current = min(self.epoch + (0 if kind in ("epoch", "end") else 1), epochs)
        event = ProgressEvent(kind, current, epochs, self.update, epochs * self.updates_per_epoch, loss, accuracy, rate)
        for listener in self.listeners:
            listener(event)


def run_batch(
    fabric: Fabric,
    wrapped: Any,
    driver: Driver,
    x: Tensor,
    y: Tensor,
    loss: LossFunction,
    *,
    backward: Callable[[Tensor], Any],
    update: Callable[[], Any],
    generator: torch.Generator | None = None,
) -> Tensor:
    """`driver.run` in the precision of `fabric`, on a model that it has set up."""
    if driver.rule is None:
        return driver.run(wrapped, x, y, loss, backward=backward)
    # on the model itself, because a data-parallel wrapper would sum gradients in every step
    x = fabric.strategy.precision.convert_input(x)
    return driver.run(
        wrapped.module,
        x,
        y,
        loss,
        backward=backward,
        update=update,
        around=fabric.autocast,
        generator=generator,
    )


def _labels(targets: Tensor) -> int:
    """How many of `targets` are labels."""
    return int((targets != UNLABELLED).sum())


def _flat(values: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {(key, inner): v for inner, v in value.items()}
        else:
            flat[(key,)] = value
    return flat
