"""Contests of a whole network of ResNet-18's size: one training step, and one inference.

Images are 224 x 224, channels last, and ReLUs in place for everyone. As in ``benchmarks.memory`` the linear head stays
float32, and the first convolution keeps its float input. In inference BatchNorm is folded into the convolutions for
everyone: with ``fuse_batch_norm_`` in ours, with torch's own ``torch.fx.experimental.optimization.fuse`` in the peers.
*8-bit image*: the first convolution, too, has quantized input, which pixels are anyway, and 4-bit weights.

Inferences follow each other for 0.3 s at a turn: a single one would find the other networks' weights in the cache.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

from benchmarks.resnet18 import resnet18
from bitorch_engine import fuse_batch_norm_, quantize_
from bitorch_engine.cli.bench.contest import Contest, Goal
from bitorch_engine.cli.bench.contests import inference
from bitorch_engine.cli.bench.timing import Function
from bitorch_engine.optim import DiodeMix

SIDE = 224

STEP_GOALS = (
    Goal("training step w4a8", "w4a8", "fp32", 1.0, 1.2),
    Goal("training step w4a8g8", "w4a8g8", "fp32", 1.5, 2.5),
    Goal("training step w1a1", "w1a1", "fp32", 1.2, 1.5),
    Goal("training step w4a8g8", "w4a8g8", "bf16", 1.0, 1.5),
    Goal("training step w1a1g8", "w1a1g8", "fp32"),
    Goal("training step w4", "w4", "fp32"),
)
INFERENCE_GOALS = (
    Goal("inference w1a1", "w1a1", "fp32", 6, 9),
    Goal("inference w4a8", "w4a8", "fp32", 2.8, 3.5),
    Goal("inference w4a8", "w4a8", "bf16"),
    Goal("inference w1a1, 8-bit image", "w1a1, 8-bit image", "fp32", 6, 9),
    Goal("inference w4a8, 8-bit image", "w4a8, 8-bit image", "fp32", 2.8, 3.5),
)


def contests(batch: int) -> Iterator[Contest]:
    """batch: images of a training step."""
    yield Contest("network", f"training step, batch {batch}", STEP_GOALS, partial(_steps, batch), 0, trains=True)
    yield Contest("network", "inference, batch 1", INFERENCE_GOALS, _inferences, 0.3)


def network(
    w_bit: int | None, a_bit: int | None = None, g_bit: int | None = None, *, first: dict[str, int | None] | None = None
) -> nn.Sequential:
    """w_bit None: float32.  first: what the first convolution has instead; by default float input."""
    model = resnet18(inplace=True).to(memory_format=torch.channels_last)
    if w_bit is not None:
        head = str(len(model) - 1)
        quantize_(model, w_bit, a_bit, g_bit, skip=head, overrides={"0": first or {"a_bit": None}})
    return model


def _images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)


def _steps(batch: int) -> dict[str, Function]:
    x, y = _images(batch), torch.randint(1000, (batch,))
    widths = {"w4a8": (4, 8, None), "w4a8g8": (4, 8, 8), "w1a1": (1, 1, None), "w1a1g8": (1, 1, 8), "w4": (4,)}
    steps = {name: _step(network(*bits), x, y) for name, bits in widths.items()}
    steps["fp32: torch, fused AdamW"] = _step(network(None), x, y)
    steps["bf16: torch autocast, fused AdamW"] = _step(network(None), x, y, autocast=True)
    return steps


def _step(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, *, autocast: bool = False) -> Function:
    packed = any(hasattr(p, "w_bit") for p in model.parameters())
    optimizer: torch.optim.Optimizer = (
        DiodeMix(model.parameters(), lr=1e-4) if packed else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    )
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def _inferences() -> dict[str, Function]:
    x, found = _images(1), {}
    for name, bits in {"w1a1": (1, 1), "w4a8": (4, 8)}.items():
        for image, first in {"": None, ", 8-bit image": {"w_bit": 4, "a_bit": 8}}.items():
            model = network(*bits, first=first)
            inference(model, x)  # sees an image in training, which sets the activation scales
            fuse_batch_norm_(model)
            found[name + image] = inference(model, x)
    float32 = fuse(network(None).eval())
    found["fp32: torch channels_last, folded"] = inference(float32, x)
    contiguous = copy.deepcopy(float32).to(memory_format=torch.contiguous_format)
    found["fp32: torch NCHW, folded"] = inference(contiguous, x.contiguous())
    found["bf16: torch channels_last, folded"] = inference(copy.deepcopy(float32).bfloat16(), x.bfloat16())
    return found
