"""Pictures of a run: its learning curves, and how its layers use their codes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitorch_engine.cli.errors import optional
from bitorch_engine.cli.layers import LayerRow
from bitorch_engine.cli.training import Epoch

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea580c", "#059669", "#9ca3af"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "lines.linewidth": 1.8,
}
MOST_COLUMNS = 4


def draw_curves(epochs: Sequence[Epoch], path: Path) -> None:
    """Write a picture of loss, accuracy and changed codes by epoch."""
    panels: dict[str, list[tuple[str, str, list[float]]]] = {
        "training loss": [("", BLUE, [epoch.loss for epoch in epochs])],
        "accuracy, %": [
            ("training, augmented", GREY, [100 * epoch.train_accuracy for epoch in epochs]),
            ("test", GREEN, [100 * epoch.accuracy for epoch in epochs]),
        ],
        "codes changed in an epoch, %": [("", ORANGE, [100 * epoch.flipped for epoch in epochs])],
    }
    with _figure(path, 10, 2.8) as figure:
        for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for label, color, values in lines:
                marker = "o" if len(epochs) == 1 else ""
                axes.plot([epoch.epoch for epoch in epochs], values, color=color, label=label, marker=marker)
            if len(lines) > 1:
                axes.legend(frameon=False, loc="lower right")
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.25)


def draw_weights(rows: Sequence[LayerRow], path: Path) -> None:
    """Write a picture with a histogram of the codes of every packed layer."""
    packed = [(row, row.histogram) for row in rows if row.histogram is not None]
    columns = max(1, min(MOST_COLUMNS, len(packed)))
    lines = max(1, -(-len(packed) // columns))
    with _figure(path, 10, 2.3 * lines) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in grid[len(packed) :]:
            axes.set_axis_off()
        for axes, (row, histogram) in zip(grid, packed, strict=False):
            total = max(1, sum(histogram))
            shares = [100 * count / total for count in histogram]
            axes.bar(list(row.codes), shares, width=0.85 * row.codes.step, color=BLUE)
            axes.set(title=f"{row.name}, {row.bits} bit", xlabel="code", ylabel="% of weights")


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure, in inches, that is written to ``path`` at the end; no display is needed."""
    matplotlib = optional("matplotlib")
    with matplotlib.rc_context(STYLE):
        figure = optional("matplotlib.figure").Figure(figsize=(width, height), dpi=130, layout="constrained")
        yield figure
        figure.savefig(path)
