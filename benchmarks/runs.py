"""Running many independent measurements in processes of their own, so that none is lost when one is interrupted."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import ROOT, library_fingerprint

Measurement = dict[str, Any]
"""``{"run": what was asked for, "result": what came out, "sources": fingerprint of the library}``"""

PARTIAL = ROOT / "runs" / "benchmarks"


def measure(
    name: str,
    function: Callable[[dict[str, Any]], dict[str, Any]],
    runs: Iterable[dict[str, Any]],
    *,
    jobs: int,
    fresh_process: bool = False,
) -> list[Measurement]:
    """``function(run)`` for each run, in their order, and what else was done before; ``jobs`` processes of one thread.

    Each measurement is written to ``runs/benchmarks/<name>.jsonl`` as it arrives; one that is there already is not
    repeated. Delete the file to begin anew. fresh_process: each run in a process that did nothing else.
    """
    runs = list(runs)
    path = PARTIAL / f"{name}.jsonl"
    done = {_key(measured["run"]): measured for measured in read_partial(path)}
    missing = [run for run in runs if _key(run) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, path.open("a", encoding="utf-8") as file:
        task = progress.add_task(name, total=len(runs), completed=len(runs) - len(missing))
        with context.Pool(jobs, _start, maxtasksperchild=1 if fresh_process else None) as pool:
            work = ((function, run) for run in missing)
            for run, result, sources in pool.imap_unordered(_measure_one, work):
                measured = {"run": run, "result": result, "sources": sources}
                done[_key(run)] = measured
                file.write(json.dumps(measured) + "\n")
                file.flush()
                progress.advance(task)
    asked = {_key(run): done[_key(run)] for run in runs}
    return list((asked | done).values())


def read_partial(path: Path) -> list[Measurement]:
    """The measurements of a file, whole lines only: the last one may have been cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _start() -> None:
    torch.set_num_threads(1)
    library_fingerprint()  # of what this process imports, not of what is there when it is done


def _measure_one(work: tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]) -> tuple[Any, Any, str]:
    function, run = work
    return run, function(run), library_fingerprint()


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
