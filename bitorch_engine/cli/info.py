"""``bitorch-engine info``: what this computer and installation offer."""

import json
import os
import platform
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from bitorch_engine import __version__


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(as_json: bool) -> None:
    """Show versions, devices and backends."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


def collect() -> dict[str, str | int | list[str]]:
    """Versions, computer and backends, by name."""
    cuda = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return {
        "bitorch_engine": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])],
        "backends": ["reference"],
    }


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
