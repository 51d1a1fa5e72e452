"""``bitorch-engine inspect``: what a model file holds, layer by layer."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bitorch_engine.cli.layers import LayerRow, layer_rows
from bitorch_engine.cli.result import kilobytes
from bitorch_engine.cli.stored_model import restore

BLOCKS = " ▁▂▃▄▅▆▇█"
BARS = 16


@click.command("inspect")
@click.argument("source", metavar="FILE_OR_RUN", type=click.Path(path_type=Path))
@click.option("--model", help="The network, package.module:callable; needed where it is not a built-in one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(source: Path, model: str | None, as_json: bool) -> None:
    """Show the layers of a model file: shape, bits, bytes, multiply-adds, and how often each code is used."""
    network, card, path = restore(source, model)
    rows = layer_rows(network, card.input_shape)
    if as_json:
        facts = asdict(card) | {"file": str(path), "file_bytes": path.stat().st_size}
        click.echo(json.dumps(facts | {"layers": [asdict(row) for row in rows]}, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(_table(rows))
    shape = " x ".join(map(str, card.input_shape))
    console.print(
        f"{card.model} for {len(card.classes)} classes, images of {shape}; file {kilobytes(path.stat().st_size)}"
    )


def bars(histogram: tuple[int, ...]) -> str:
    """A histogram as one line of block characters, at most 16; neighbouring codes are added up to fit."""
    width = max(1, len(histogram) // BARS)
    sums = [sum(histogram[start : start + width]) for start in range(0, len(histogram), width)]
    top = max(1, *sums)
    # Rounded up: what is not zero can be seen.
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // top)] for count in sums)


def _table(rows: list[LayerRow]) -> Table:
    table = Table("layer", "kind", "shape", box=None, header_style="bold", footer_style="bold", show_footer=True)
    table.columns[0].footer = "total"
    for column in table.columns:
        column.overflow = "fold"
    totals = {
        "bits": "",
        "bytes": f"{sum(row.stored_bytes for row in rows):,}",
        "MACs": f"{sum(row.macs for row in rows):,}",
    }
    for heading, total in totals.items():
        table.add_column(heading, total, justify="right")
    table.add_column("codes, from the lowest", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            row.kind,
            "x".join(map(str, row.shape)),
            str(row.bits),
            f"{row.stored_bytes:,}",
            f"{row.macs:,}" if row.macs else "",
            bars(row.histogram) if row.histogram else "",
        )
    return table
