"""Where and with what a benchmark ran: the facts that stand beside every result."""

import datetime
import hashlib
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

from bitorch_engine.cli.info import collect

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("bits", "ops", "quantizers", "parameters", "layers", "optim", "convert")
"""Folders of the library that decide the numbers, with csrc/."""


def facts() -> dict[str, Any]:
    """Machine, versions, date and the command that was typed. Names no path of this machine."""
    known = collect()
    kept = ("cpu", "cores", "python", "torch", "triton", "bitorch_engine")
    return {
        **{name: known[name] for name in kept},
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


@cache
def library_fingerprint() -> str:
    """Eight digits that change where a source file that decides the numbers does."""
    digest = hashlib.sha256()
    folders = [*(ROOT / "bitorch_engine" / folder for folder in SOURCES), ROOT / "csrc"]
    for path in [path for folder in folders for path in sorted(folder.rglob("*.*"))]:
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def caption(record: dict[str, Any]) -> str:
    """One line of markdown that says where a result comes from."""
    machine = record["machine"]
    return (
        f"{machine['date']}, `{machine['command']}`, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, torch {machine['torch']}, "
        f"bitorch_engine {machine['bitorch_engine']} (sources {', '.join(record['sources'])})."
    )
