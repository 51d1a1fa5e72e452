"""How a run shows that it goes on: a live bar on a terminal, one plain line an epoch elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bitorch_engine.cli.training import Epoch, Progress


class Display:
    """Shows the steps and epochs of a run that it is told of. Nothing at all on a quiet console."""

    def __init__(self, console: Console, epochs: int, steps_per_epoch: int, done: Progress) -> None:
        self.console, self.epochs, self.steps_per_epoch = console, epochs, steps_per_epoch
        self._last = ""
        self._live = console.is_terminal and not console.quiet
        self._bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=epochs * steps_per_epoch, epoch="", status="")
        self.step(done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, progress: Progress) -> None:
        """Show the loss so far in this epoch, with what the last one ended with."""
        epoch = f"{min(progress.epoch + 1, self.epochs)}/{self.epochs}"
        loss = f"loss {progress.loss / progress.step:.3f}" if progress.step else ""
        done = progress.epoch * self.steps_per_epoch + progress.step
        self._bar.update(self._task, completed=done, epoch=epoch, status=f"{loss}{self._last}")

    def epoch(self, epoch: Epoch) -> None:
        """Show what an epoch gave."""
        self._last = f"  accuracy {epoch.accuracy:.1%}  codes changed {epoch.flipped:.1%}"
        if not self._live:
            width = len(str(self.epochs))
            self.console.print(
                f"epoch {epoch.epoch:{width}}/{self.epochs}  loss {epoch.loss:.4f}{self._last}  {epoch.seconds:.1f} s",
                highlight=False,
            )
