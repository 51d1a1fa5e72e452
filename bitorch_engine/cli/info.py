"""``bitorch-engine info``: what this computer and installation offer."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bitorch_engine import __version__
from bitorch_engine.ops import calls, cpu, triton
from bitorch_engine.ops.library import defined, wanted_backend


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(as_json: bool) -> None:
    """Show versions, devices, and for each kernel and op what is in use and why."""
    facts = collect() | kernel_facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, _text(value))
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
        "triton": _triton_version(),
        "backends": ["reference", *(["cpu"] if _in_use() else []), *(["triton"] if not _why_no_triton() else [])],
    }


def kernel_facts() -> dict[str, Any]:
    """What computes the ops on a CPU and on a GPU, and why.

    "instruction set": the best one in use, with the reason.  "kernels": of each, the one in use, with those that it is
    written for.  "ops": of each, "kernels" or "plain PyTorch".  "GPU kernels": whether Triton's are in use, with the
    reason.  "GPU ops": of each, "Triton" or "plain PyTorch"; of none where there is no GPU.
    """
    in_use, no_triton = _in_use(), _why_no_triton()
    how = "interpreted on the CPU, slowly" if triton.interpreted() else "compiled at the first call"
    return {
        "instruction set": _instruction_set(),
        "layers' calls": _calls(),
        "kernels": {name: _used(isas) for name, isas in cpu.kernels().items()} if in_use else {},
        "ops": {op: "kernels" if in_use and op in cpu.IMPLEMENTATIONS else "plain PyTorch" for op in defined()},
        "GPU kernels": f"none: {no_triton}" if no_triton else f"Triton {_triton_version()}, {how}",
        "GPU ops": {
            op: "Triton" if not no_triton and op in triton.IMPLEMENTATIONS else "plain PyTorch"
            for op in (defined() if torch.cuda.device_count() else [])
        },
    }


def _in_use() -> bool:
    return not cpu.why_not_loaded() and wanted_backend() != "reference"


def _why_no_triton() -> str:
    """Why no op runs Triton's kernels; empty where they do."""
    if wanted_backend() == "reference":
        return "BITORCH_ENGINE_BACKEND=reference"
    if not torch.cuda.device_count() and not triton.interpreted():
        return "torch finds no CUDA device"
    return triton.why_not_available()


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    if reason := cpu.why_not_loaded():
        return f"none, everything runs in plain PyTorch: {reason}"
    if not _in_use():
        return "none, everything runs in plain PyTorch: BITORCH_ENGINE_BACKEND=reference"
    current, best = cpu.current_isa(), cpu.available_isas()[-1]
    if current == best:
        return f"{current}, the best that this processor has and the kernels know"
    return f"{current}, capped by BITORCH_ENGINE_CPU; without it {best}"


def _calls() -> str:
    if not _in_use():
        return "Python"
    return (
        "compiled"
        if calls.CALLS
        else "Python, 2 us slower each: compiled without Python's headers, or for another Python"
    )


def _used(isas: list[str]) -> str:
    """ "avx2 of scalar, avx2, avx512": the best of those that are there, known to the processor, and below the cap."""
    known = cpu.available_isas()
    allowed = known[: known.index(cpu.current_isa()) + 1]
    return f"{[isa for isa in allowed if isa in isas][-1]} of {', '.join(isas)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {what}" for name, what in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
