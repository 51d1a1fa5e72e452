"""How well low-bit weights learn: a small network on augmented digits, against float and quantization-aware training.

The task: scikit-learn's 8x8 digits, every training image rotated, scaled, sheared, shifted, with other contrast and
noise at each step; tested on 360 held-out digits, each warped in four fixed ways. Of the network's three convolutions
the second and third (55 296 weights) have few bits; the first, normalization and head are float, with lr 3e-3.
Rows are compared within a seed: same initial weights, same images in the same order.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import caption
from benchmarks.qat import QATConv2d
from benchmarks.runs import Measurement
from bitorch_engine import compress_saved_tensors, quantize_
from bitorch_engine.cli.augment import Augmentation
from bitorch_engine.cli.data import load_digits
from bitorch_engine.cli.models import small_cnn
from bitorch_engine.layers.qconv.nbit import nBitConv2d
from bitorch_engine.optim import DiodeMix

BATCH = 64
WARPS = 4
FLOAT_LR = 3e-3
"""Of the first convolution, normalization and head, in every row."""

REPORTED_SEEDS, REPORTED_WARPS = (101, 102, 103, 104, 105), 20261
TUNING_SEEDS, TUNING_WARPS = (0, 1), 777
"""Learning rates are chosen on these seeds and test images, which no reported row has seen."""
EARLIER = (
    "Learning rates were taken over from an earlier study of this task, on seeds 0 and 1 and other warps of the test "
    "images (three values each; `python -m benchmarks learning --tuning` repeats it), none on the seeds above. "
    "Those of torch.optim.SGD, GaLore and the rows without normalization were not tuned at all."
)


@dataclass(frozen=True)
class Row:
    """One setting: what the two middle convolutions are, and how they are trained."""

    section: str
    name: str
    w_bit: int | None = None
    """None: float weights."""
    a_bit: int | None = None
    g_bit: int | None = None
    lr: float = 1e-2
    """Of the two middle convolutions."""
    optimizer: str = "DiodeMix"
    memory: str = "8bit"
    master: bool = False
    """Quantization-aware training with a float master copy instead of packed weights."""
    saved_bits: int | None = None
    """Bits of what autograd saves in forward; None: as it is."""
    rank: int | None = None
    """GaLore's."""
    norm: bool = True
    learn_scale: bool = False
    seeds: int = 5


def float_row(lr: float, **settings: Any) -> Row:
    return Row("float32", f"float32, AdamW, lr {lr:g}", lr=lr, optimizer="AdamW", **settings)


def packed_row(w_bit: int, section: str = "ours", extra: str = "", **settings: Any) -> Row:
    return Row(section, f"ours, {width_name(w_bit, settings)}{extra}", w_bit=w_bit, **settings)


def master_row(w_bit: int, lr: float = 3e-3, **settings: Any) -> Row:
    name = f"master copy, {width_name(w_bit)}"
    return Row("quantization-aware", name, w_bit=w_bit, lr=lr, optimizer="AdamW", master=True, **settings)


def width_name(w_bit: int, settings: dict[str, Any] | None = None) -> str:
    """w4a8g8 and the like."""
    settings = settings or {}
    return f"w{w_bit}" + "".join(f"{k}{settings[k + '_bit']}" for k in "ag" if settings.get(k + "_bit"))


BITS = (8, 4, 3, 2, 1)
MAIN = [
    float_row(1e-2),
    float_row(3e-3),
    *(packed_row(bits) for bits in BITS),
    *(master_row(bits) for bits in BITS),
    *(packed_row(bits, "1 byte a weight", ", memory='channel'", memory="channel") for bits in (4, 2, 1)),
    packed_row(4, "activations", a_bit=8),
    packed_row(4, "activations", a_bit=8, g_bit=8),
    packed_row(2, "activations", a_bit=4),
    *(
        packed_row(bits, "saved tensors", f", saved in {saved} bits", a_bit=a_bit, saved_bits=saved)
        for bits, a_bit in ((4, None), (4, 8), (2, 4))
        for saved in (8, 4)
    ),
]
FURTHER = [
    packed_row(4, "any optimizer", ", torch.optim.AdamW", optimizer="AdamW"),
    packed_row(4, "any optimizer", ", torch.optim.SGD", optimizer="SGD", lr=1.0),
    *(packed_row(2, "GaLore", f", rank {rank}", rank=rank, seeds=3) for rank in (32, 16)),
    replace(float_row(1e-2, norm=False, seeds=3), section="no normalization", name="float32, AdamW"),
    *(
        packed_row(2, "no normalization", f", {name} scale", norm=False, learn_scale=learn, seeds=3)
        for name, learn in (("fixed", False), ("learned", True))
    ),
]
"""Rows beside the main ones."""


def tuning_rows() -> Iterator[Row]:
    """The candidates from which the learning rates above were chosen."""
    rows = [float_row(1), *(row for row in FURTHER if row.section == "no normalization")]
    for bits in (4, 1):
        rows += [packed_row(bits), packed_row(bits, extra=", memory='channel'", memory="channel")]
    candidates = dict.fromkeys(rows, (3e-3, 1e-2, 3e-2))
    candidates |= {master_row(bits): (1e-3, 3e-3, 1e-2) for bits in (4, 1)}
    candidates |= {row: (0.1, 0.3, 1.0) for row in FURTHER if row.optimizer == "SGD"}
    for row, rates in candidates.items():
        for lr in rates:
            name = f"{row.name.removesuffix(', lr 1')}, lr {lr:g}"
            yield replace(row, lr=lr, name=name, section="tuning", seeds=len(TUNING_SEEDS))


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Train one row with one seed. run: ``row`` (a Row as a dict), ``seed``, ``warps`` and ``epochs``."""
    started, row, seed, epochs = time.perf_counter(), Row(**run["row"]), run["seed"], run["epochs"]
    images, labels, test_images, test_labels = task(run["warps"])
    torch.manual_seed(1000 + seed)
    model = network(row)
    middle = convolutions(model)[1:]
    optimizer = make_optimizer(model, middle, row)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (steps * epochs)))
    )
    before = [codes(layer) for layer in middle]
    generator = torch.Generator().manual_seed(seed)
    augment = Augmentation()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: steps * BATCH].split(BATCH):
            x = augment(images[batch], generator)
            with compress_saved_tensors(row.saved_bits, keep=[x]) if row.saved_bits else nullcontext():
                loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not math.isfinite(loss.item()):
            break
    flips = [(codes(layer) != old).flatten() for layer, old in zip(middle, before, strict=True) if old is not None]
    weights = sum(layer.weight.numel() for layer in middle)
    return {
        "accuracy": accuracy(model, test_images, test_labels),
        "loss": loss.item(),
        "flipped": torch.cat(flips).float().mean().item() if flips else None,
        "bytes_per_weight": sum(training_bytes(layer, optimizer) for layer in middle) / weights,
        "seconds": time.perf_counter() - started,
    }


@cache
def task(warps_seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and the warped test images and labels that belong to a seed."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(warps_seed)
    warped = [Augmentation()(digits.test_images, generator) for _ in range(WARPS)]
    return digits.train_images, digits.train_labels, torch.cat(warped), digits.test_labels.repeat(WARPS)


def network(row: Row) -> nn.Module:
    """The network, its two middle convolutions as the row wants them."""
    model = small_cnn(1, 10)
    if not row.norm:
        for convolution in convolutions(model):
            nn.init.kaiming_normal_(convolution.weight)
        for name, layer in list(model.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(model, name, ChannelBias(layer.num_features))
    first, *middle = (name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    if row.w_bit is not None and row.master:
        for name in middle:
            layer = model.get_submodule(name)
            layer.__class__ = QATConv2d
            layer.quantize_(row.w_bit)
    elif row.w_bit is not None:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        quantize_(model, row.w_bit, row.a_bit, row.g_bit, skip=[first, *linear], learn_scale=row.learn_scale)
    return model


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions, from input to output."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


class ChannelBias(nn.Module):
    """What stands in the place of a BatchNorm where there is none: its bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def make_optimizer(model: nn.Module, middle: list[nn.Module], row: Row) -> torch.optim.Optimizer:
    """The row's optimizer: betas (0.9, 0.999), eps 1e-6, no weight decay; momentum 0.9 for SGD."""
    low_bit = [layer.weight for layer in middle]
    if row.master:
        low_bit += [layer.log_gain for layer in middle]
    known = {id(parameter) for parameter in low_bit}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    group: dict[str, Any] = {"params": low_bit, "lr": row.lr}
    if row.rank is not None:
        group |= {"rank": row.rank, "update_proj_gap": 50, "scale": 1.0, "proj_type": "std"}
    if row.optimizer == "DiodeMix":
        return DiodeMix([group, {"params": others, "lr": FLOAT_LR}], memory=row.memory)
    if row.optimizer == "SGD":
        groups = [group, {"params": others, "lr": row.lr}]
        return torch.optim.SGD(groups, momentum=0.9, foreach=False)
    groups = [group, {"params": others, "lr": FLOAT_LR}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, foreach=False)


def codes(layer: nn.Module) -> Tensor | None:
    """The integers that forward uses, or None for a float layer."""
    if isinstance(layer, QATConv2d):
        return layer.codes
    return layer.weight.codes if isinstance(layer, nBitConv2d) else None


def training_bytes(layer: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that stay between two steps for a layer's weight: itself, its scale, and all optimizer state of both."""
    parameters = [layer.weight, *([layer.log_gain] if isinstance(layer, QATConv2d) else [])]
    constant = layer.initial_scale.nbytes if isinstance(layer, QATConv2d) else 0
    return constant + sum(parameter.nbytes + state_bytes(optimizer.state[parameter]) for parameter in parameters)


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in an optimizer's state, a projector's included."""
    if isinstance(value, Tensor):
        return value.nbytes
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, dict):
        return sum(state_bytes(part) for part in value.values())
    return sum(map(state_bytes, value)) if isinstance(value, (list, tuple)) else 0


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model, in evaluation mode, gives their label."""
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def runs(rows: Iterable[Row], *, tuning: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    """Every row with every seed, seed by seed."""
    rows = list(rows)
    seeds, warps = (TUNING_SEEDS, TUNING_WARPS) if tuning else (REPORTED_SEEDS, REPORTED_WARPS)
    return [
        {"row": asdict(row), "seed": seed, "warps": warps, "epochs": 3 if quick else 30}
        for index, seed in enumerate(seeds[:1] if quick else seeds)
        for row in rows
        if index < row.seeds
    ]


# The tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One row over its seeds, in points of test accuracy."""

    row: Row
    seeds: int
    mean: float
    std: float
    difference: float | None
    """To the better float32 row, mean over the seeds that both have."""
    error: float | None
    """Standard error of that difference."""
    flipped: float | None
    bytes_per_weight: float


def summarize(measurements: Iterable[Measurement]) -> list[Summary]:
    """One summary a row, in the order of their first measurement. "no normalization" has a float32 row of its own."""
    by_row: dict[Row, dict[int, dict[str, Any]]] = {}
    for measured in measurements:
        by_row.setdefault(Row(**measured["run"]["row"]), {})[measured["run"]["seed"]] = measured["result"]
    points = {row: {seed: 100 * r["accuracy"] for seed, r in results.items()} for row, results in by_row.items()}
    summaries = []
    for row, results in by_row.items():
        floats = [other for other in by_row if other.w_bit is None and other.norm == row.norm]
        best = max(floats, key=lambda other: fmean(points[other].values()), default=row)
        pairs = {} if best is row else points[best]
        gaps = [points[row][seed] - pairs[seed] for seed in results if seed in pairs]
        flipped = [result["flipped"] for result in results.values() if result["flipped"] is not None]
        summaries.append(
            Summary(
                row=row,
                seeds=len(results),
                mean=fmean(points[row].values()),
                std=_std(points[row].values()),
                difference=fmean(gaps) if gaps else None,
                error=_std(gaps) / len(gaps) ** 0.5 if gaps else None,
                flipped=fmean(flipped) if flipped else None,
                bytes_per_weight=fmean(result["bytes_per_weight"] for result in results.values()),
            )
        )
    return summaries


def _std(values: Iterable[float]) -> float:
    values = list(values)
    return stdev(values) if len(values) > 1 else math.nan


def table(summaries: Iterable[Summary]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| | lr | seeds | test accuracy, % | to float32, points | codes changed | bytes a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    section = None
    for s in summaries:
        if s.row.section != section:
            section = s.row.section
            lines.append(f"| **{section}** | | | | | | |")
        difference = "" if s.difference is None else f"{s.difference:+.2f} ± {s.error:.2f}"
        flipped = "" if s.flipped is None else f"{s.flipped:.0%}"
        lines.append(
            f"| {s.row.name} | {s.row.lr:g} | {s.seeds} | {s.mean:.2f} ± {s.std:.2f} | {difference} | {flipped} | "
            f"{s.bytes_per_weight:.2f} |"
        )
    return "\n".join(lines)


def goals(summaries: Iterable[Summary]) -> str:
    """What was set out to be reached, and whether it was, as a markdown table."""
    summaries = list(summaries)
    wanted: list[tuple[str, Summary, float]] = []
    for s in summaries:
        if s.row.section == "ours" and s.row.w_bit >= 2:
            wanted.append(("float32 - 0.3", s, -0.3))
        elif s.row.section == "1 byte a weight":
            wanted.append(("float32 - 0.5", s, -0.5))
        elif (s.row.w_bit, s.row.a_bit, s.row.g_bit) == (4, 8, 8):
            wanted.append(("float32 - 0.3", s, -0.3))
    lines = ["| goal | row | measured | |", "|---|---|---|---|"]
    for goal, s, limit in wanted:
        if s.difference is not None:
            verdict = "met" if s.difference >= limit else "missed"
            lines.append(f"| {goal} | {s.row.name} | {s.difference:+.2f} ± {s.error:.2f} | {verdict} |")
    one_bit = {s.row.section: s.mean for s in summaries if s.row.w_bit == 1}
    if {"ours", "quantization-aware"} <= one_bit.keys():
        ours, master = one_bit["ours"], one_bit["quantization-aware"]
        verdict = "met" if ours > master else "missed"
        lines.append(f"| above the master copy at 1 bit | ours, w1 | {ours - master:+.2f} | {verdict} |")
    return "\n".join(lines)


def report(record: dict[str, Any], tuning: dict[str, Any] | None) -> str:
    """results/learning.md."""
    summaries = summarize(record["measurements"])
    parts = [
        "# Learning",
        *__doc__.strip().split("\n\n"),
        f"Means ± standard deviations over seeds {record['seeds']}; differences are paired by seed, to the better of "
        "the two float32 rows, ± standard error. *Codes changed*: share of the weights whose code is another one after "
        "training. *Bytes a weight*: everything that stays between two steps (weight or codes, residual, scale, "
        "moments, projector), counted from the tensors.",
        table(summaries),
        "## Goals",
        goals(summaries),
    ]
    if tuning is None:
        parts.append(EARLIER)
    else:
        parts += [
            "## Learning rates",
            f"Chosen on seeds {tuning['seeds']} and other warps of the test images, which no row above has seen.",
            table(summarize(tuning["measurements"])),
        ]
    return "\n\n".join([*parts, caption(record)]) + "\n"
