"""Speed of the kernels through Python, as a user calls them: layers and optimizer, against the best peers.

Ratios of medians: the time of the fastest peer of a kind, in that run and process, divided by ours. All functions of a
contest take turns, and every other round goes backwards. Our convolutions and linear layers take and give float32
(quantizing activations is in the time); *int8* peers take and give uint8, so they do less. Our linear layers have one
scale an output channel, the int4 peers one a group of 32 or 128. *cold*: weights of 128 MiB take turns. *must* is for
every shape, *aim* for the geometric mean; a row without them is for comparison.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import kernels_network
from benchmarks.machine import ROOT, caption, facts, library_fingerprint
from bitorch_engine.cli.bench.contest import HEADS, Contest, Result, Verdict, run, table, verdicts
from bitorch_engine.cli.bench.contests import contests as kernel_contests
from bitorch_engine.cli.bench.contests import sizes
from bitorch_engine.cli.bench.timing import BUSY, Function, load_average
from bitorch_engine.cli.info import kernel_facts
from bitorch_engine.ops.cpu import available_isas

SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "one thread": (1, {}),
    "two threads": (2, {}),
    "one thread, ours and torch capped at AVX2": (1, {"BITORCH_ENGINE_CPU": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "one thread, ours and torch capped at AVX-512 VNNI": (
        1,
        {"BITORCH_ENGINE_CPU": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    ),
}
"""Name: threads and environment. onnxruntime and torch's own loops know no cap, so the caps leave onnxruntime out, and
bfloat16, which torch then computes many times as slowly as float32."""

GOAL_HEADS = (*HEADS[:-1], "must", "aim", "reached", HEADS[-1])


def settings_here() -> list[str]:
    """The settings that say something here: a cap caps what is better, which this processor must have."""
    caps = {None, *available_isas()[:-1]}
    return [name for name, (_, environment) in SETTINGS.items() if environment.get("BITORCH_ENGINE_CPU") in caps]


def every_contest(setting: str, *, quick: bool) -> Iterator[Contest]:
    """Kernels and network in every setting; growing sizes in the first one."""
    yield from kernel_contests()
    main = setting == next(iter(SETTINGS))
    yield from kernels_network.contests(8 if main and not quick else 4)
    if main:
        yield from sizes()


def measure_settings(names: list[str], *, quick: bool, at_once: bool = False) -> dict[str, Any]:
    """Each setting in a process of its own: the caps are read when the libraries load.

    at_once: all together, each on cores of its own, for a machine that has enough of them.
    """
    load = load_average()  # before we add to it
    cores = sorted(os.sched_getaffinity(0)) if at_once else []
    if at_once and len(cores) < sum(SETTINGS[name][0] for name in names):
        raise click.ClickException(f"There are too few cores to measure {', '.join(names)} at once.")

    def start(name: str) -> "subprocess.Popen[bytes]":
        threads, environment = SETTINGS[name]
        command = [sys.executable, "-m", "benchmarks.kernels", name, *(["--quick"] if quick else [])]
        if at_once:
            command += ["--cores", ",".join(str(cores.pop()) for _ in range(threads))]
        more = environment | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(command, env=os.environ | more, cwd=ROOT, stdout=subprocess.PIPE)

    started: Iterable[subprocess.Popen[bytes]] = map(start, names)  # each when the one before has ended
    if at_once:
        started = list(started)
    found = {}
    for name, process in zip(names, started, strict=True):
        text, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        found[name] = json.loads(text) | {"load": load, "sources": library_fingerprint(), "at_once": at_once}
    return {"machine": facts(), "kernels": kernel_facts(), "settings": found}


def report(record: dict[str, Any]) -> str:
    """results/kernels-<the machine's best instruction set>.md."""
    isa = record["kernels"]["instruction set"].split(",")[0]
    parts = [f"# Kernels, best instruction set {isa}", *(__doc__ or "").strip().split("\n\n")]
    for setting, kept in record["settings"].items():
        known = list(every_contest(setting, quick=kept["quick"]))
        results = [Result.of_json(result, known) for result in kept["results"]]
        measured = [result for result in results if not result.work.endswith(" sizes")]
        parts += [f"## {setting.capitalize()}", markdown(GOAL_HEADS, goal_table(verdicts(measured)))]
        parts.append(
            f"Medians of {kept['rounds']} rounds. Instruction set: {kept['isa']}. Load before it began: {kept['load']}."
        )
        if kept.get("at_once"):
            parts.append("Measured while the other settings were, each on cores of its own.")
        if kept["load"] > BUSY:
            parts.append("**The machine was busy with other work: these numbers are not to be relied on.**")
        if lost := list(lost_shapes(measured)):
            parts += ["The peer wins:", "\n".join(lost)]
        if missing := [f"- {r.work} {r.shape}: {r.missing}" for r in results if r.missing]:
            parts += ["Not measured:", "\n".join(missing)]
        if growing := [result for result in results if result.work.endswith(" sizes")]:
            parts += [
                "### Smallest shape at which the kernel wins",
                "Square shapes of growing size, through Python, overhead included. *Wins from*: the smallest of "
                "the shapes tried from which on ours is the faster one.",
                markdown(("work", "wins from", "ratio there", "largest tried", "ratio there"), list(smallest(growing))),
            ]
        parts += ["### Microseconds", *times(measured)]
    sources = sorted({kept["sources"] for kept in record["settings"].values()})
    return "\n\n".join([*parts, caption(record | {"sources": sources})]) + "\n"


def goal_table(found: list[Verdict]) -> list[list[str]]:
    """Cells under GOAL_HEADS: how many times as fast as the peer, and what that should be."""
    rows = []
    for verdict, row in zip(found, table(found), strict=True):
        wanted = ["" if want is None else f"{want:g}" for want in (verdict.goal.must, verdict.goal.aim)]
        rows.append([*row[:-1], *wanted, verdict.word, row[-1]])
    return rows


def lost_shapes(results: list[Result]) -> Iterator[str]:
    """One line for each shape and goal where the peer is the faster one."""
    for verdict in verdicts(results):
        for ratio in verdict.peer_wins:
            peer = ratio.peer.partition(": ")[2]
            yield f"- {verdict.goal.row}, {ratio.shape}: {verdict.goal.kind} {peer}, {1 / ratio.value:.2f}x"


def smallest(results: list[Result]) -> Iterator[list[str]]:
    """Rows of the table of the smallest shapes. The shapes come in the order of their work."""
    for verdict in verdicts(results):
        ratios = sorted(verdict.ratios, key=lambda ratio: ratio.theirs)
        last_lost = max((i for i, ratio in enumerate(ratios) if ratio.value < 1), default=-1)
        largest = ratios[-1]
        first = ratios[last_lost + 1] if last_lost + 1 < len(ratios) else None
        start = [first.shape, f"{first.value:.2f}"] if first else ["none of them", ""]
        yield [verdict.goal.row, *start, largest.shape, f"{largest.value:.2f}"]


def times(results: list[Result]) -> Iterator[str]:
    """A table for each kind of work: shapes down, functions across."""
    for work in dict.fromkeys(result.work for result in results):
        rows = [result for result in results if result.work == work and result.seconds]
        names = list(dict.fromkeys(name for result in rows for name in result.seconds))
        cells = [[r.shape, *(f"{r.seconds[n] * 1e6:.1f}" if n in r.seconds else "" for n in names)] for r in rows]
        yield markdown((work, *names), cells)


def markdown(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


@click.command()
@click.argument("setting", type=click.Choice(list(SETTINGS)))
@click.option("--quick", is_flag=True)
@click.option("--cores", default="", help="Numbers of the cores to run on, with commas between.")
def measure_here(setting: str, quick: bool, cores: str) -> None:
    """Print the results of one setting, in whose environment this process runs, as JSON."""
    threads, environment = SETTINGS[setting]
    if cores:
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rounds, results = (7 if setting == next(iter(SETTINGS)) and not quick else 5), []
    known = list(every_contest(setting, quick=quick))
    if "ONEDNN_MAX_CPU_ISA" in environment:
        known = [replace(contest, prepare=partial(_capped, contest)) for contest in known]
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr()) as progress:
        task = progress.add_task(setting, total=len(known))
        for contest in known:
            results.append(run(contest, rounds=rounds).as_json())
            progress.advance(task)
    isa = kernel_facts().get("instruction set", "none: the kernels are not compiled")
    click.echo(json.dumps({"quick": quick, "rounds": rounds, "isa": isa, "results": results}))


def _capped(contest: Contest) -> dict[str, Function]:
    """The functions of a contest that a cap holds for."""
    functions = contest.prepare()
    return {name: functions[name] for name in functions if "onnxruntime" not in name and not name.startswith("bf16")}


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    measure_here()
