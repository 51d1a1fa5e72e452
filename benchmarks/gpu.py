"""Speed and memory on one GPU, through Python, as a user calls it: layers and optimizer, against the best peers there.

Ratios of medians: the peer's time divided by ours. CUDA events around one call, the L2 cache overwritten before it.
*copy* is a copy of as many bytes as the work has to move at the least, so that this ratio is the share of the
bandwidth that is reached. *must* and *aim* are for the geometric mean of the shapes; of the update for every one.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.kernels import GOAL_HEADS, goal_table, lost_shapes, markdown, times
from benchmarks.machine import caption, facts, library_fingerprint
from benchmarks.resnet50 import resnet50
from bitorch_engine import compress_saved_tensors, quantize_
from bitorch_engine.cli.bench import gpu
from bitorch_engine.cli.bench.contest import Contest, Goal, Result, run, verdicts
from bitorch_engine.cli.bench.timing import Function
from bitorch_engine.optim import DiodeMix

BATCH, SIDE = 256, 224
MEMORY = (0.6, 0.35)
"""Peak of ours over that of the peer: must, aim."""

STEP_GOALS = (Goal(f"GPU: training step, ResNet-50 w4a8g8, batch {BATCH}", "w4a8g8", "bf16", 1.0, 1.3),)


def contests() -> Iterator[Contest]:
    """Kernels, and a training step of a whole network."""
    yield from gpu.contests()
    yield Contest("GPU network", f"training step, batch {BATCH}", STEP_GOALS, _steps, measure=gpu.medians, trains=True)


def measure(*, rounds: int = 30) -> dict[str, Any]:
    """Everything, on the first GPU."""
    results = []
    for contest in contests():
        results.append(run(contest, rounds=rounds).as_json())
        torch.cuda.empty_cache()
    return {
        "machine": facts() | _gpu_facts(),
        "sources": [library_fingerprint()],
        "rounds": rounds,
        "results": results,
        "steps": {name: _one_step(make) for name, make in STEPS.items()},
    }


def report(record: dict[str, Any] | None) -> str:
    """results/gpu.md; rows that no GPU has measured yet say so."""
    known = list(contests())
    parts = ["# Kernels on a GPU", *(__doc__ or "").strip().split("\n\n")]
    results = [Result.of_json(result, known) for result in record["results"]] if record else []
    found = verdicts(results)
    rows = goal_table(found)
    missing = [goal for goal in dict.fromkeys(g for c in known for g in c.goals) if goal not in [v.goal for v in found]]
    rows += [
        [goal.row, goal.kind, *["not measured"] * 2, f"{goal.must:g}", f"{goal.aim:g}", "", ""] for goal in missing
    ]
    parts.append(markdown(GOAL_HEADS, rows))
    parts.append(_memory(record["steps"] if record else None))
    if record is None:
        return "\n\n".join([*parts, "No GPU has run it yet: `python -m benchmarks gpu`."]) + "\n"
    if lost := list(lost_shapes(results)):
        parts += ["The peer wins:", "\n".join(lost)]
    if failed := [f"- {result.work} {result.shape}: {result.missing}" for result in results if result.missing]:
        parts += ["Failed:", "\n".join(failed)]
    machine = record["machine"]
    where = f"{machine['gpu']}, driver {machine['driver']}, clocks {machine['clocks']}, Triton {machine['triton']}."
    return "\n\n".join([*parts, "## Microseconds", *times(results), where, caption(record)]) + "\n"


def _gpu_facts() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        driver, *clocks = [part.strip() for part in told.split(",")]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver, clocks = "unknown", []
    names = ("now", "most", "memory")
    told = ", ".join(f"{name} {clock}" for name, clock in zip(names, clocks, strict=False))
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "clocks": told or "unknown"}


def _memory(steps: dict[str, dict[str, float]] | None) -> str:
    """A table of the peaks, and of what they cost in time."""
    heads = ("that training step", "peak memory", "of bf16's", "must", "aim", "seconds")
    if steps is None:
        return markdown(heads, [[name, *["not measured"] * 2, *(f"{goal:g}" for goal in MEMORY), ""] for name in STEPS])
    rows = []
    for name, found in steps.items():
        goals = ["", ""] if name == "bf16" else [f"{goal:g}" for goal in MEMORY]
        share = f"{found['peak'] / steps['bf16']['peak']:.2f}"
        rows.append([name, f"{found['peak'] / 2**30:.2f} GiB", share, *goals, f"{found['seconds']:.2f}"])
    return markdown(heads, rows)


def _steps() -> dict[str, Function]:
    return {"w4a8g8": STEPS["w4a8g8"](), "bf16: torch autocast, fused AdamW": STEPS["bf16"]()}


def _step(*, packed: bool, compress: bool = False) -> Function:
    """One training step: ours with codes in forward and backward, or float32 weights under bf16 autocast."""
    torch.backends.cudnn.benchmark = True
    model: nn.Module = resnet50()
    if packed:
        head = str(len(list(model.children())) - 1)
        quantize_(model, 4, 8, 8, skip=head, overrides={"0": {"a_bit": None}})
    model = model.cuda().to(memory_format=torch.channels_last).train()
    x = torch.randn(BATCH, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(1000, (BATCH,), device="cuda")
    optimizer: torch.optim.Optimizer = (
        DiodeMix(model.parameters(), lr=1e-4, memory="channel")
        if packed
        else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    )

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16), compress_saved_tensors(8) if compress else nullcontext():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[[], Function]] = {
    "w4a8g8": partial(_step, packed=True),
    "w4a8g8, saved tensors in 8 bits": partial(_step, packed=True, compress=True),
    "bf16": partial(_step, packed=False),
}


def _one_step(make: Callable[[], Function]) -> dict[str, float]:
    """Bytes at the peak of a step, the model with it, and how long it took."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = make()
    step()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "seconds": time.perf_counter() - begin}
