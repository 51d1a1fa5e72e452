"""What is measured on a GPU: layers, step and optimizer on CUDA tensors, against the best peers there, and the clock.

A time is that between two CUDA events around one call, after the L2 cache has been overwritten, and behind a pause in
which the GPU waits, so that Python's calls are queued when it starts. Whoever makes the CPU wait for the GPU pays it.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine import nBitConv2d, nBitLinear, ops
from bitorch_engine.cli.bench.contest import Contest, Goal
from bitorch_engine.cli.bench.contests import inference
from bitorch_engine.cli.bench.peers import ConvShape
from bitorch_engine.cli.bench.timing import Function
from bitorch_engine.optim import DiodeMix
from bitorch_engine.parameters import PackedParameter

RESNET50 = (
    (64, 64, 56, 1), (64, 64, 56, 3), (64, 256, 56, 1), (256, 64, 56, 1), (256, 128, 56, 1), (128, 128, 56, 3, 2),
    (128, 512, 28, 1), (512, 128, 28, 1), (128, 128, 28, 3), (256, 512, 56, 1, 2), (512, 256, 28, 1),
    (256, 256, 28, 3, 2), (256, 1024, 14, 1), (1024, 256, 14, 1), (256, 256, 14, 3), (512, 1024, 28, 1, 2),
    (1024, 512, 14, 1), (512, 512, 14, 3, 2), (512, 2048, 7, 1), (2048, 512, 7, 1), (512, 512, 7, 3),
    (1024, 2048, 14, 1, 2),
)  # fmt: skip
"""Input and output channels, side, kernel, stride of its convolutions behind the first (He et al. 2016, table 1)."""
LINEARS = ((4096, 4096), (14336, 4096), (4096, 14336))
WEIGHTS = (24_576, 4096)
"""10**8 of them."""

UPDATE_GOALS = (
    Goal("GPU: 4-bit update alone, share of the copy's bandwidth", "update", "copy", 0.75, 0.9),
    Goal("GPU: 4-bit step of DiodeMix", "DiodeMix", "AdamW", 3, 4.5),
)
CONV_GOALS = (
    Goal("GPU: w4a8 conv, ResNet-50, batch 128", "w4a8", "bf16", 1.2, 1.7, on_average=True),
    Goal("GPU: w4a8 conv, ResNet-50, batch 128", "w4a8", "int8", 1.0, 1.2, on_average=True),
)
LINEAR_GOALS = (
    Goal("GPU: int4 linear, 1 row", "w4", "bf16", 2.8, 3.6, on_average=True),
    Goal("GPU: int4 linear, 1 row", "w4", "torch int4", 1.0, 1.25, on_average=True),
    Goal("GPU: int4 linear, 1 row, share of the copy's bandwidth", "w4", "copy", 0.7, 0.88, on_average=True),
)


def medians(functions: Mapping[str, Function], *, rounds: int, seconds: float = 0) -> dict[str, float]:
    """Median seconds a call, by name. In a round each is called once, every other round backwards."""
    for function in functions.values():
        for _ in range(3):  # kernels are compiled, cuDNN chooses
            function()
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(max(rounds, 10)):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            torch.cuda._sleep(2_000_000)  # cycles: a millisecond
            begin.record()
            functions[name]()
            end.record()
            end.synchronize()
            measured[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in measured.items()}


def contests() -> Iterator[Contest]:
    """Every kernel on its shapes. Nothing of them touches a GPU before it is prepared."""
    for shape in RESNET50:
        conv = replace(ConvShape(*shape), batch=128)
        yield Contest("GPU conv", conv.name, CONV_GOALS, partial(_convs, conv), measure=medians)
    for out_features, in_features in LINEARS:
        name = f"1 x {in_features}, {out_features} out"
        yield Contest("GPU linear", name, LINEAR_GOALS, partial(_linears, out_features, in_features), measure=medians)
    for memory in ("8bit", "bf16", "channel"):
        name = f"{WEIGHTS[0]} x {WEIGHTS[1]} weights, memory={memory}"
        yield Contest("GPU update", name, UPDATE_GOALS, partial(_updates, memory), measure=medians, trains=True)


def _convs(shape: ConvShape) -> dict[str, Function]:
    """bfloat16 in and out, channels last, for everyone but the int8 peer, which takes int8 and gives int32."""
    torch.backends.cudnn.benchmark = True
    x = torch.randn(shape.batch, shape.in_channels, shape.side, shape.side, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    size = (shape.in_channels, shape.out_channels, shape.kernel, shape.stride, shape.padding)
    layer = nBitConv2d(*size, bias=False, w_bit=4, a_bit=8).cuda()
    weight = torch.randn(shape.weight_shape, dtype=x.dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    found: dict[str, Function] = {
        "w4a8": inference(layer, x),
        "bf16: cuDNN channels_last": partial(F.conv2d, x, weight, stride=shape.stride, padding=shape.padding),
    }
    if shape.kernel == shape.stride == 1:  # PyTorch has no int8 convolution for CUDA, but this one is a product
        pixels = torch.randint(-127, 127, (shape.batch * shape.side**2, shape.in_channels), device="cuda")
        matrix = torch.randint(-127, 127, (shape.out_channels, shape.in_channels), device="cuda")
        found["int8: torch._int_mm"] = partial(torch._int_mm, pixels.to(torch.int8), matrix.to(torch.int8).T)
    return found


def _linears(out_features: int, in_features: int) -> dict[str, Function]:
    x = torch.randn(1, in_features, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda")
    layer = nBitLinear(in_features, out_features, bias=False, w_bit=4).cuda()
    return {
        "w4": inference(layer, x),
        "bf16: torch": partial(F.linear, x, weight),
        "torch int4: group 128": _int4(x, out_features),
        "copy: of the weight": _copy(out_features * in_features // 2),
    }


def _updates(memory: str) -> dict[str, Function]:
    grad = torch.randn(WEIGHTS, device="cuda") * 0.01
    packed = PackedParameter(torch.randn(WEIGHTS, device="cuda") * 0.02, w_bit=4)
    packed.grad = grad
    optimizer = DiodeMix([packed], lr=1e-3, memory=memory)
    optimizer.step()
    state = optimizer.state[packed]
    moments = [state.get(name) for name in ("exp_avg_s", "exp_avg_l")]
    residual, scale = packed.require_residual_(), packed.channel_scale
    held = [moment.nbytes for moment in moments if moment is not None]
    moved = grad.nbytes + 2 * (packed.packed.nbytes + residual.nbytes + sum(held))
    weight = torch.nn.Parameter(torch.randn(WEIGHTS, device="cuda") * 0.02)
    weight.grad = grad
    settings = (4, 1e-3, 0.9, 0.99, 1e-8, 1.0, 1.0, 1.0, torch.float32, 1)
    return {
        "update": partial(ops.update_, packed.packed, residual, scale, grad, *moments, *settings),
        "DiodeMix": optimizer.step,
        "AdamW: torch fused fp32": torch.optim.AdamW([weight], lr=1e-3, fused=True).step,
        "copy: of as many bytes": _copy(moved),
    }


def _copy(size: int) -> Function:
    """A copy within the GPU's memory that reads and writes ``size`` bytes together."""
    source, target = (torch.zeros(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return partial(target.copy_, source)


def _int4(x: Tensor, out_features: int) -> Function:
    columns = x.shape[1]
    values = torch.randint(0, 256, (out_features, columns // 2), device="cuda").to(torch.uint8)
    weight = torch.ops.aten._convert_weight_to_int4pack(values, 8)
    scales = torch.randn(columns // 128, out_features, 2, dtype=torch.bfloat16, device="cuda")
    return partial(torch.ops.aten._weight_int4pack_mm, x, weight, 128, scales)
