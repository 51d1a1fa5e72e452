"""Memory that one training step takes, of a network of ResNet-18's size at batch 32, 224 x 224 pixels, 1000 classes.

torch's profiler records every allocation and release of tensor memory from before the network is built: a first step,
on two small images, which makes the optimizer's state, and a second one, which is reported. All convolutions have few
bits; the linear head (513 000 weights), normalization and biases are float32, and the first convolution keeps its float
input. As a check by other means, in some rows a third step without the profiler gives the growth of the process's
resident memory.
"""

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.learning import state_bytes, width_name
from benchmarks.machine import caption
from benchmarks.resnet18 import resnet18
from benchmarks.runs import Measurement
from bitorch_engine import compress_saved_tensors, quantize_
from bitorch_engine.optim import DiodeMix

BATCH, SIDE, CLASSES = 32, 224, 1000


@dataclass(frozen=True)
class Setting:
    """One way to train the network."""

    w_bit: int | None = None
    """None: float32 weights and torch.optim.AdamW."""
    a_bit: int | None = None
    memory: str = "8bit"
    in_backward: bool = False
    saved_bits: int | None = None

    @property
    def name(self) -> str:
        parts = ["float32, AdamW" if self.w_bit is None else width_name(self.w_bit, {"a_bit": self.a_bit})]
        if self.memory != "8bit":
            parts.append(f"memory='{self.memory}'")
        parts += ["step in backward"] * self.in_backward
        parts += [f"saved in {self.saved_bits} bits"] * (self.saved_bits is not None)
        return ", ".join(parts)


def settings() -> Iterator[Setting]:
    """What is measured: float32, then 4 bits in every variant, then quantized activations in those that matter."""
    yield Setting()
    yield Setting(4)
    yield Setting(4, in_backward=True)
    for memory in ("8bit", "channel"):
        for saved_bits in (8, 4):
            yield Setting(4, None, memory, in_backward=True, saved_bits=saved_bits)
    for w_bit, a_bit in ((4, 8), (2, 4)):
        yield Setting(w_bit, a_bit)
        for saved_bits in (None, 8, 4):
            yield Setting(w_bit, a_bit, "channel", in_backward=True, saved_bits=saved_bits)
    for saved_bits in (8, 4):
        yield Setting(saved_bits=saved_bits)


def runs(chosen: Iterable[Setting], *, quick: bool = False) -> list[dict[str, Any]]:
    """What ``step_memory`` takes."""
    size = {"batch": 2, "side": 64} if quick else {"batch": BATCH, "side": SIDE}
    return [{"setting": asdict(s), **size, "resident": s.a_bit is None and s.memory == "8bit"} for s in chosen]


# Measuring one setting -----------------------------------------------------------------------------------------------


def step_memory(run: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one training step of a setting, by kind and at the peak. To be called in a fresh process."""
    setting = Setting(**run["setting"])
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        training = Training(setting, run["batch"], run["side"])
        training.step(2, 64)  # makes the optimizer's state
        training.most_gradients = 0
        with record_function("measured step"):
            training.step(run["batch"], run["side"])
    trace = Trace.of(recorded)
    step, forward = trace.spans["measured step"][-1], trace.spans["forward"][-1]
    before, peak = trace.total_at(step[0]), trace.peak(*step)
    return {
        "weights": tensor_bytes(training.model.parameters()),
        "buffers": tensor_bytes(training.model.buffers()),
        "state": sum(state_bytes(state) for state in training.optimizer.state.values()),
        "gradients": training.most_gradients,
        "saved": trace.total_at(forward[1]) - trace.total_at(forward[0]),
        "batch": training.images.nbytes + training.labels.nbytes,
        "before": before,
        "peak": trace.events[peak].total,
        "peak_at": trace.events[peak].where,
        "peak_blocks": trace.largest_blocks(peak),
        "resident_growth": resident_growth(training, run) if run["resident"] else None,
    }


class Training:
    """The network, its optimizer and one batch of noise; ``most_gradients``: the most bytes of them at any one time."""

    def __init__(self, setting: Setting, batch: int, side: int) -> None:
        self.setting, self.most_gradients = setting, 0
        self.model = resnet18()
        if setting.w_bit is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            classifier = str(len(self.model) - 1)
            quantize_(self.model, setting.w_bit, setting.a_bit, skip=classifier, overrides={"0": {"a_bit": None}})
            self.optimizer = DiodeMix(self.model.parameters(), lr=1e-3, memory=setting.memory)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._count_gradients)
        if setting.in_backward:
            self.optimizer.step_in_backward()
        self.images, self.labels = torch.randn(batch, 3, side, side), torch.randint(CLASSES, (batch,))

    def step(self, batch: int, side: int) -> None:
        """One training step as anyone would write it, on the first images of the batch, cut to that side."""
        bits = self.setting.saved_bits
        images, labels = self.images[:batch, :, :side, :side], self.labels[:batch]
        compression = compress_saved_tensors(bits, keep=[self.images]) if bits else nullcontext()
        self.optimizer.zero_grad()
        with record_function("forward"), compression:
            loss = F.cross_entropy(self.model(images), labels)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            self.optimizer.step()

    def _count_gradients(self, parameter: Tensor) -> None:
        alive = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.most_gradients = max(self.most_gradients, alive)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors store; a packed one counts its codes, scales and residual."""
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Event:
    """One allocation (or release, negative) of tensor memory."""

    time: int
    size: int
    total: int
    """Bytes in use after it."""
    address: int
    where: str
    """The operators that were running, outermost first."""


@dataclass
class Trace:
    """All allocations since the profiler was started, in order, and when each named span began and ended."""

    events: list[Event] = field(default_factory=list)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, recorded: profile) -> "Trace":
        trace = cls()
        roots = recorded.profiler.kineto_results.experimental_event_tree()
        stack: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in roots]
        while stack:
            node, path = stack.pop()
            if node.tag.name == "Allocation":
                what = node.extra_fields
                where = " > ".join(path[-5:])
                trace.events.append(Event(node.start_time_ns, what.alloc_size, what.total_allocated, what.ptr, where))
                continue
            if node.name in ("measured step", "forward"):
                trace.spans.setdefault(node.name, []).append((node.start_time_ns, node.end_time_ns))
            stack += [(child, (*path, node.name)) for child in node.children]
        trace.events.sort(key=lambda event: event.time)
        for spans in trace.spans.values():
            spans.sort()
        return trace

    def total_at(self, time: int) -> int:
        """Bytes in use at that time."""
        return next((event.total for event in reversed(self.events) if event.time <= time), 0)

    def peak(self, begin: int, end: int) -> int:
        """Index of the event after which most memory was in use."""
        inside = [index for index, event in enumerate(self.events) if begin <= event.time <= end]
        return max(inside, key=lambda index: self.events[index].total)

    def largest_blocks(self, last: int, count: int = 8) -> list[list[Any]]:
        """The largest blocks in use after event ``last``: bytes, and where they were allocated."""
        alive: dict[int, Event] = {}
        for event in self.events[: last + 1]:
            if event.size > 0:
                alive[event.address] = event
            else:
                alive.pop(event.address, None)
        blocks = sorted(alive.values(), key=lambda event: -event.size)[:count]
        return [[event.size, event.where] for event in blocks]


def resident_growth(training: Training, run: dict[str, Any]) -> int | None:
    """How far the process's resident memory rises in a step above where it stood; None where it cannot be told."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes(status, "VmRSS")
        reset.write_text("5")  # forget the highest resident size so far
        training.step(run["batch"], run["side"])
        return _status_bytes(status, "VmHWM") - before
    return None


def _status_bytes(status: Path, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024


def prepare_processes() -> None:
    """For those started from now on: glibc gives blocks of 4 MiB back once they are free; the profiler is quiet."""
    os.environ["KINETO_LOG_LEVEL"] = "5"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(4 << 20)


# The tables ----------------------------------------------------------------------------------------------------------


def table(measurements: Iterable[Measurement]) -> str:
    """The settings as a markdown table, in MB (10**6 bytes); ratios to the first one, float32 with AdamW."""
    measurements = list(measurements)
    first = measurements[0]["result"]
    lines = [
        "| | weights | state | gradients | together | saved activations | **all four** | **peak** | peak, resident |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for measured in measurements:
        r = measured["result"]
        name = Setting(**measured["run"]["setting"]).name
        resident = "" if r["resident_growth"] is None else f"{(r['before'] + r['resident_growth']) / 1e6:.0f}"
        lines.append(
            f"| {name} | {r['weights'] / 1e6:.1f} | {r['state'] / 1e6:.1f} | {r['gradients'] / 1e6:.1f} | "
            f"{together(r) / 1e6:.1f} ({_share(together(r), together(first))}) | {r['saved'] / 1e6:.0f} | "
            f"{all_four(r) / 1e6:.0f} ({_share(all_four(r), all_four(first))}) | "
            f"{r['peak'] / 1e6:.0f} ({_share(r['peak'], first['peak'])}) | {resident} |"
        )
    return "\n".join(lines)


def together(result: dict[str, Any]) -> int:
    """Weights, optimizer state and gradients."""
    return result["weights"] + result["state"] + result["gradients"]


def all_four(result: dict[str, Any]) -> int:
    """Weights, optimizer state, gradients and saved activations: what a step holds, without what comes and goes."""
    return together(result) + result["saved"]


def _share(part: int, whole: int) -> str:
    return "1" if part == whole else f"1/{whole / part:.1f}"


def goals(measurements: Iterable[Measurement]) -> str:
    """What was set out to be reached, and whether it was, by the best setting, as a markdown table."""
    first, *others = list(measurements)
    wanted: list[tuple[str, float, Callable[[Setting], bool], Callable[[dict[str, Any]], int]]] = [
        ("weights + state + gradients", 8, lambda s: True, together),
        ("these and activations saved in 8 bits", 3, lambda s: s.saved_bits == 8, all_four),
        ("these and activations saved in 4 bits", 5, lambda s: s.saved_bits == 4, all_four),
        ("peak of the step, temporaries included, 8 bits", 3, lambda s: s.saved_bits == 8, lambda r: r["peak"]),
        ("peak of the step, temporaries included, 4 bits", 5, lambda s: s.saved_bits == 4, lambda r: r["peak"]),
    ]
    lines = ["| goal | best setting | measured | |", "|---|---|---|---|"]
    for what, parts, fits, size in wanted:
        candidates = [m for m in others if m["run"]["setting"]["w_bit"] and fits(Setting(**m["run"]["setting"]))]
        if candidates:
            best = min(candidates, key=lambda m: size(m["result"]))
            reached = size(first["result"]) / size(best["result"])
            name = Setting(**best["run"]["setting"]).name
            verdict = "met" if reached >= parts else "missed"
            lines.append(f"| {what}: 1/{parts} | {name} | 1/{reached:.1f} | {verdict} |")
    return "\n".join(lines)


def peak_place(result: dict[str, Any]) -> str:
    """The operator of the peak, without what it calls to allocate, and the largest blocks."""
    path = [name for name in result["peak_at"].split(" > ") if not name.startswith("aten::empty")]
    blocks = ", ".join(f"{size / 1e6:.0f}" for size, _ in result["peak_blocks"][:5])
    return f"`{path[-1]}`; {blocks}"


def report(record: dict[str, Any]) -> str:
    """results/memory.md."""
    measurements = record["measurements"]
    first = measurements[0]["result"]
    parts = [
        "# Memory",
        *__doc__.strip().split("\n\n"),
        "In MB (10^6 bytes). *Weights*: codes, residual and scales, float parameters. *Gradients*: the most that exist "
        "at a time. *Saved activations*: what forward leaves for backward. *All four*: their sum. *Peak*: the most "
        "tensor memory in use at any moment of the step, with temporaries, buffers and the batch of images "
        f"({first['batch'] / 1e6:.0f}). *Peak, resident*: what was in use before the third step plus the growth of the "
        "process in it. Ratios are to the first row.",
        table(measurements),
        "## Goals",
        goals(measurements),
        "## Where the peaks are",
        "The operator in which most memory is in use, and the largest blocks at that moment, in MB.",
        "\n".join(f"- {Setting(**m['run']['setting']).name}: {peak_place(m['result'])}" for m in measurements),
    ]
    return "\n\n".join([*parts, caption(record)]) + "\n"
