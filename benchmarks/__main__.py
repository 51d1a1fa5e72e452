"""``python -m benchmarks``: run every benchmark and rewrite ``results/``; or one of them, whole or quick."""

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import gpu, kernels, learning, memory
from benchmarks.machine import RESULTS, facts
from benchmarks.runs import PARTIAL, Measurement, measure
from bitorch_engine.ops.cpu import available_isas

JOBS = click.option("--jobs", default=2, show_default=True, help="Processes of one thread each.")
QUICK = click.option("--quick", is_flag=True, help="A few epochs of one seed, to see that all works; prints only.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Measure what the library reaches. Without a command: everything."""
    if context.invoked_subcommand is None:
        context.invoke(run_learning, tuning=True)
        context.invoke(run_learning)
        context.invoke(run_memory)
        context.invoke(run_kernels)
        if torch.cuda.is_available():
            context.invoke(run_gpu)


@main.command("learning")
@JOBS
@QUICK
@click.option("--tuning", is_flag=True, help="Try learning rates instead, on seeds and test images of their own.")
@click.option("--only", default="*", help="Only rows whose name fits the pattern; others stay as they are in results/.")
def run_learning(jobs: int = 2, quick: bool = False, tuning: bool = False, only: str = "*") -> None:
    """Test accuracy of low-bit training against float32 and against quantization-aware training."""
    name = "tuning" if tuning else "learning"
    every = list(learning.tuning_rows()) if tuning else [*learning.MAIN, *learning.FURTHER]
    rows = [row for row in every if fnmatch(row.name, only)]
    runs = learning.runs(rows, tuning=tuning, quick=quick)
    if quick:
        text = learning.table(learning.summarize(measure("quick", learning.train, runs, jobs=jobs)))
        Console().print(Markdown(text))
        (PARTIAL / "quick.jsonl").unlink()
        return
    measured = measure(name, learning.train, runs, jobs=jobs)
    seeds = learning.TUNING_SEEDS if tuning else learning.REPORTED_SEEDS
    keep(name, measured, order=learning.runs(every, tuning=tuning), seeds=seeds)
    write_tables()


@main.command("memory")
@JOBS
@QUICK
@click.option("--only", default="*", help="Only settings whose name fits; others stay as they are in results/.")
def run_memory(jobs: int = 2, quick: bool = False, only: str = "*") -> None:
    """Peak memory of a training step, by kind, against float32 with AdamW."""
    every = list(memory.settings())
    chosen = [setting for setting in every if fnmatch(setting.name, only)]
    memory.prepare_processes()
    if quick:
        runs = memory.runs(chosen, quick=True)
        text = memory.table(measure("quick", memory.step_memory, runs, jobs=jobs, fresh_process=True))
        Console().print(Markdown(text))
        (PARTIAL / "quick.jsonl").unlink()
        return
    measured = measure("memory", memory.step_memory, memory.runs(chosen), jobs=jobs, fresh_process=True)
    keep("memory", measured, order=memory.runs(every))
    write_tables()


@main.command("kernels")
@click.option("--quick", is_flag=True, help="Fewer rounds and one thread only; prints, and writes nothing.")
@click.option("--only", default="*", help="Only settings whose name fits; others stay as they are in results/.")
@click.option("--at-once", is_flag=True, help="All settings together, each on cores of its own: needs 5 idle cores.")
def run_kernels(quick: bool = False, only: str = "*", at_once: bool = False) -> None:
    """Speed of kernels, layers and a whole network against the best peers; a table for each best instruction set."""
    names = [name for name in kernels.settings_here() if fnmatch(name, only)][: 1 if quick else None]
    record = kernels.measure_settings(names, quick=quick, at_once=at_once)
    if quick:
        Console().print(Markdown(kernels.report(record)))
        return
    name = f"kernels-{available_isas()[-1]}"
    former = read(name) or {"settings": {}}
    known = former["settings"] | record["settings"]
    record["settings"] = {name: known[name] for name in kernels.SETTINGS if name in known}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_tables()


@main.command("gpu")
def run_gpu() -> None:
    """Speed and memory on a GPU: update, convolutions, linear layers, a training step."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA device; results/gpu.md stays as it is.")
    (RESULTS / "gpu.json").write_text(json.dumps(gpu.measure(), indent=1) + "\n", encoding="utf-8")
    write_tables()


@main.command("tables")
def run_tables() -> None:
    """Write and show results/*.md anew, from the measurements in results/*.json."""
    write_tables()


def write_tables() -> None:
    """What the command ``tables`` does."""
    texts = {}
    if (record := read("learning")) is not None:
        texts["learning"] = learning.report(record, read("tuning"))
    if (record := read("memory")) is not None:
        texts["memory"] = memory.report(record)
    texts["gpu"] = gpu.report(read("gpu"))
    for path in sorted(RESULTS.glob("kernels-*.json")):
        texts[path.stem] = kernels.report(read(path.stem))
    for name, text in texts.items():
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
        Console().print(Markdown(text))


def keep(name: str, measured: Iterable[Measurement], *, order: list[dict[str, Any]], **more: Any) -> None:
    """Write ``results/<name>.json``: these measurements, and of the former ones those that are still asked for."""
    former = read(name) or {"measurements": []}
    known = {json.dumps(m["run"], sort_keys=True): m for m in (*former["measurements"], *measured)}
    keys = [json.dumps(run, sort_keys=True) for run in order]
    kept = [known[key] for key in keys if key in known]
    record = {"machine": facts(), "sources": sorted({m["sources"] for m in kept}), **more, "measurements": kept}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (PARTIAL / f"{name}.jsonl").unlink(missing_ok=True)


def read(name: str) -> Any:
    """``results/<name>.json``, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
