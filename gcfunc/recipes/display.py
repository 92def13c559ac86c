"""What is shown while training."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gcfunc.recipes.train import Finished, Run


class Display:
    """A bar for all runs, one for the run under way, and a line for each that is done.

    Away from a terminal there are no bars, only the lines.
    """

    def __init__(self, console: Console, runs: int, epochs: int, batches: int) -> None:
        self._console = console
        self._runs, self._epochs, self._batches = runs, epochs, batches
        self._steps = epochs * batches
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._one = self._progress.add_task("", total=self._steps, note="")
        self._all = self._progress.add_task(
            "all", total=runs * self._steps, note="", visible=runs > 1
        )

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the bars."""
        if not self._console.is_terminal:
            yield
            return
        with self._progress:
            yield

    def started(self, run: Run, done: int) -> None:
        """Begin the bar of a run, after ``done`` others."""
        self._progress.reset(self._one, description=_name(run))
        self.stepped(run, done)

    def stepped(self, run: Run, done: int) -> None:
        """Show where the run is."""
        steps = run.epoch * self._batches + run.batch
        note = f"epoch {min(run.epoch + 1, self._epochs)}/{self._epochs}"
        if run.history:
            last = run.history[-1]
            note += f", loss {last.train_loss:.4f}, accuracy {100 * last.test_accuracy:.2f} %"
        self._progress.update(self._one, completed=steps, note=note)
        self._progress.update(
            self._all, completed=done * self._steps + steps, note=f"run {done + 1}/{self._runs}"
        )

    def finished(self, run: Finished) -> None:
        """Leave a line for a run that is done."""
        last = run.history[-1]
        self._console.print(
            f"{_name(run)}: train loss {last.train_loss:.4f}, test loss {last.test_loss:.4f}, "
            f"test accuracy {100 * last.test_accuracy:.2f} %"
        )


def _name(run: Run | Finished) -> str:
    return f"gc={run.gc} seed={run.seed}"
