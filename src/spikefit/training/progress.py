"""A live progress bar for a training run."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spikefit.training.record import ProgressEvent


class ProgressBar:
    """Draws events on standard error: `with ProgressBar("bptt") as bar: train(recipe, on_progress=bar)`.

    Args:
        label: text in front of the bar.
        console: where to draw; None means standard error.
    """

    def __init__(self, label: str = "training", *, console: Console | None = None) -> None:
        self.label = label
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=console or Console(file=sys.stderr),
        )
        self.task: TaskID | None = None
        self.accuracy: float | None = None

    def __call__(self, event: ProgressEvent) -> None:
        """Show one event."""
        if self.task is None:
            self.task = self.bar.add_task(self.label, total=event.steps, numbers="")
        self.accuracy = event.accuracy if event.accuracy is not None else self.accuracy
        numbers = [f"epoch {event.epoch}/{event.epochs}"]
        if event.loss is not None:
            numbers.append(f"loss {event.loss:.4f}")
        if self.accuracy is not None:
            numbers.append(f"test {100 * self.accuracy:.2f} %")
        self.bar.update(self.task, completed=event.step, total=event.steps, numbers="  ".join(numbers))

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()
