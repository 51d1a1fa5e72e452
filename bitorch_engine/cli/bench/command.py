"""The command ``bitorch-engine bench``."""

import json
import os
from fnmatch import fnmatch

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bitorch_engine.cli.bench import gpu
from bitorch_engine.cli.bench.contest import HEADS, Result, run, table, verdicts
from bitorch_engine.cli.bench.contests import contests
from bitorch_engine.cli.bench.peers import has_onnxruntime
from bitorch_engine.cli.bench.timing import BUSY, load_average
from bitorch_engine.cli.errors import UsageError
from bitorch_engine.cli.info import collect

COLUMNS = (TextColumn("{task.description:32}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())


@click.command("bench")
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of ours and of the peers."
)
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(1), help="Each number is a median of so many."
)
@click.option("--only", default="*", help="Only contests whose work and shape fit the pattern, such as 'conv 64-*'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(threads: int, rounds: int, only: str, as_json: bool) -> None:
    """Time the kernels against torch's, and against onnxruntime's where that is installed. About a minute.

    On a computer with a GPU the GPU's kernels too.

    BITORCH_ENGINE_CPU=avx2 caps our instruction set; ONEDNN_MAX_CPU_ISA=AVX2 that of torch's peers.
    """
    known = [*contests(), *(gpu.contests() if torch.cuda.is_available() else ())]
    chosen = [c for c in known if fnmatch(f"{c.work} {c.shape}", only)]
    if not chosen:
        raise UsageError(f"no contest fits --only {only}; they are {', '.join(f'{c.work} {c.shape}' for c in known)}.")
    before, load = torch.get_num_threads(), load_average()
    torch.set_num_threads(threads)
    results: list[Result] = []
    try:
        with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(chosen))
            for contest in chosen:
                progress.update(task, description=f"{contest.work} {contest.shape}")
                results.append(run(contest, rounds=rounds))
                progress.advance(task)
    finally:
        torch.set_num_threads(before)
    if as_json:
        caps = {name: os.environ.get(name) for name in ("BITORCH_ENGINE_CPU", "ONEDNN_MAX_CPU_ISA")}
        facts = collect() | {"threads": threads, "load": load}
        click.echo(json.dumps({"machine": facts, "caps": caps, "results": [r.as_json() for r in results]}, indent=1))
        return
    show(results, threads, load)


def show(results: list[Result], threads: int, load: float) -> None:
    """Print the table of ratios, what could not be measured, and whether other work was in the way."""
    console = Console()
    title = f"Times as fast as the best peer, {threads} thread{'s' * (threads > 1)}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE)
    for head in HEADS:  # in a narrow window the names of the work fold, and no number does
        shown.add_column(head, justify="left" if head in HEADS[:2] else "right", no_wrap=head != "work")
    work = ""
    for row in table(verdicts(results)):
        shown.add_row("" if row[0] == work else row[0], *row[1:])
        work = row[0]
    console.print(shown)
    if load > BUSY:
        console.print(
            f"The machine was busy with other work (load {load:g} before this began): these numbers are not to be "
            "relied on.",
            style="bold",
        )
    for result in results:
        if result.missing:
            console.print(f"Not measured: {result.work} {result.shape}: {result.missing}", markup=False)
    if not torch.cuda.is_available():
        console.print("Not measured: the GPU's kernels; torch finds no CUDA device.")
    if not has_onnxruntime():
        hint = "onnxruntime is not installed: pip install 'bitorch_engine[bench]' compares with it too."
        console.print(hint, markup=False)
