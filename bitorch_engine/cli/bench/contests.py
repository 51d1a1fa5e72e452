"""What is measured: our layers and optimizer, called as a user calls them, against the peers."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bitorch_engine import nBitConv2d, nBitLinear
from bitorch_engine.cli.bench.contest import Contest, Goal
from bitorch_engine.cli.bench.peers import ConvShape, conv_peers, fused_adamw, in_turn, linear_peers
from bitorch_engine.cli.bench.timing import Function
from bitorch_engine.optim import DiodeMix
from bitorch_engine.parameters import PackedParameter

CONVS = (
    ConvShape(64, 64, 56),
    ConvShape(128, 128, 28),
    ConvShape(256, 256, 14),
    ConvShape(512, 512, 7),
    ConvShape(64, 128, 56, stride=2),
    ConvShape(256, 1024, 14, kernel=1),
)
DEPTHWISE = (ConvShape(256, 256, 14, groups=256),)
FLOAT_CONVS = (ConvShape(3, 64, 224, kernel=7, stride=2), ConvShape(1, 32, 28, kernel=5, batch=8))
LINEARS = ((4096, 4096), (1024, 4096))
COLD = 128 << 20
"""Bytes of weights that take turns where one row is multiplied; a real network does not find a weight in the cache."""

CONV_GOALS = (
    Goal("binary conv", "w1a1", "fp32", 12, 17),
    Goal("binary conv", "w1a1", "int8", 3.3, 4.4),
    Goal("binary conv, NCHW", "w1a1 NCHW", "fp32"),
    Goal("w4a8 conv", "w4a8", "fp32", 3.3, 4),
    Goal("w4a8 conv", "w4a8", "int8", 0.9, 1.05),
    Goal("w8a8 conv", "w8a8", "int8"),
    Goal("w2a2 conv", "w2a2", "int8", 1.0, 1.3),
)
DEPTHWISE_GOALS = (
    Goal("depthwise 3x3 w4a8", "w4a8", "int8", 1.5, 2),
    Goal("depthwise 3x3 w4a8", "w4a8", "fp32"),
)
FLOAT_CONV_GOALS = (Goal("conv of a float image", "w4", "fp32"),)
GEMV_GOALS = (
    Goal("int4 linear, 1 row, cold", "w4", "bf16", 8, 10.6),
    Goal("int4 linear, 1 row, cold", "w4", "torch int4", 2.4, 3),
    Goal("int4 linear, 1 row, cold", "w4", "onnxruntime int4", 1.2, 1.4),
    Goal("int4 linear, 1 row, cold", "w4", "fp32"),
    Goal("int4 linear, 1 row, cold, float32 precision high", "w4 high", "bf16", 8, 10.6),
    Goal("int4 linear, 1 row, cold, float32 precision high", "w4 high", "torch int4", 2.4, 3),
    Goal("int4 linear, 1 row, cold, float32 precision high", "w4 high", "onnxruntime int4", 1.2, 1.4),
    Goal("int4 linear, 1 row, cold (a8)", "w4a8", "bf16", 8, 10.6),
    Goal("int4 linear, 1 row, cold (a8)", "w4a8", "torch int4", 2.4, 3),
    Goal("int4 linear, 1 row, cold (a8)", "w4a8", "onnxruntime int4", 1.2, 1.4),
)
GEMM_GOALS = (
    Goal("int4 linear, 32 to 256 rows (a8)", "w4a8", "bf16", 1.6, 2),
    Goal("int4 linear, 32 to 256 rows (a8)", "w4a8", "torch int4", 1.6, 2),
    Goal("int4 linear, 32 to 256 rows (a8)", "w4a8", "onnxruntime int4", 1.6, 2),
    Goal("int4 linear, 32 to 256 rows (float)", "w4", "fp32"),
)
UPDATE_GOALS = (
    Goal("4-bit update, 8-bit moments", "memory=8bit", "AdamW", 1.25, 1.6),
    Goal("4-bit update, bf16 moments", "memory=bf16", "AdamW", 1.25, 1.6),
    Goal("4-bit update, 1 byte a weight", "memory=channel", "AdamW", 1.5, 2.5),
)


def contests() -> Iterator[Contest]:
    """Every kernel on its shapes."""
    for shape in CONVS:
        yield Contest("conv", shape.name, CONV_GOALS, partial(_convs, shape, ((1, 1), (4, 8), (8, 8), (2, 2))))
    for shape in DEPTHWISE:
        yield Contest("depthwise conv", shape.name, DEPTHWISE_GOALS, partial(_convs, shape, ((4, 8),)))
    for shape in FLOAT_CONVS:
        yield Contest("float conv", shape.name, FLOAT_CONV_GOALS, partial(_convs, shape, ((4, None),)))
    for out_features, in_features in LINEARS:
        for rows in (1, 32, 256):
            name = f"{rows} x {in_features}, {out_features} out"
            goals = GEMV_GOALS if rows == 1 else GEMM_GOALS
            work = partial(_linears, rows, out_features, in_features)
            yield Contest("linear", name, goals, work, 0.02)
    work = partial(_updates, 2560, 4096)
    yield Contest("update", "2560 x 4096 weights", UPDATE_GOALS, work, 0.02, trains=True)


def sizes() -> Iterator[Contest]:
    """Growing shapes, from tiny ones: where each kernel begins to win against float32, called through Python."""
    for channels in (4, 8, 16, 32, 64):
        for side in (4, 8, 16):
            shape = ConvShape(channels, channels, side)
            goals = [Goal(f"{ours} conv 3x3", ours, "fp32") for ours in ("w1a1", "w4a8")]
            yield Contest("conv sizes", shape.name, goals, partial(_convs, shape, ((1, 1), (4, 8))), 0.002)
    for features in (16, 64, 256, 1024):
        for rows in (1, 32):
            goals = [Goal(f"{ours} linear, {rows} rows", ours, "fp32") for ours in ("w4", "w4a8")]
            work = partial(_linears, rows, features, features, cold=0)
            name = f"{rows} x {features}, {features} out"
            yield Contest("linear sizes", name, goals, work, 0.002)
    for features in (16, 64, 256, 1024):
        goals = [Goal("4-bit update", "memory=8bit", "AdamW")]
        name, work = f"{features} x {features} weights", partial(_updates, features, features)
        yield Contest("update sizes", name, goals, work, 0.002, trains=True)


def _convs(shape: ConvShape, widths: tuple[tuple[int, int | None], ...]) -> dict[str, Function]:
    """Ours with float32 inputs and outputs, channels last but where it says NCHW; then the peers."""
    x = torch.randn(shape.batch, shape.in_channels, shape.side, shape.side)
    last = x.contiguous(memory_format=torch.channels_last)
    size = (shape.in_channels, shape.out_channels, shape.kernel, shape.stride, shape.padding)
    ours: dict[str, Function] = {}
    for w_bit, a_bit in widths:
        layer = nBitConv2d(*size, groups=shape.groups, bias=False, w_bit=w_bit, a_bit=a_bit)
        ours[f"w{w_bit}" if a_bit is None else f"w{w_bit}a{a_bit}"] = inference(layer, last)
        if (w_bit, a_bit) == (1, 1):
            ours["w1a1 NCHW"] = inference(layer, x)
    return ours | conv_peers(shape)


def _linears(rows: int, out_features: int, in_features: int, cold: int = COLD) -> dict[str, Function]:
    copies = max(1, -(-cold // (out_features * in_features // 2))) if rows == 1 else 1
    x = torch.randn(rows, in_features)
    ours: dict[str, Function] = {}
    for name, a_bit in (("w4", None), ("w4a8", 8)):
        layer = nBitLinear(in_features, out_features, bias=False, w_bit=4, a_bit=a_bit)
        ours[name] = in_turn([inference(copy.deepcopy(layer), x) for _ in range(copies)])
    if rows == 1 and cold:
        layer = nBitLinear(in_features, out_features, bias=False, w_bit=4)
        ours["w4 high"] = _with_high_precision(in_turn([inference(copy.deepcopy(layer), x) for _ in range(copies)]))
    return ours | linear_peers(rows, out_features, in_features, copies)


def _with_high_precision(function: Function) -> Function:
    """With 16 bits of an activation, as torch.set_float32_matmul_precision allows them. Setting it is in the time."""
    before = torch.get_float32_matmul_precision()

    def call() -> object:
        torch.set_float32_matmul_precision("high")
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def _updates(*shape: int) -> dict[str, Function]:
    weight, grad = torch.randn(shape) * 0.02, torch.randn(shape) * 0.01
    functions: dict[str, Function] = {}
    for memory in ("8bit", "bf16", "channel"):
        packed = PackedParameter(weight, w_bit=4)
        packed.grad = grad.clone()
        functions[f"memory={memory}"] = DiodeMix([packed], lr=1e-3, memory=memory).step
    return functions | {"AdamW: torch fused fp32": fused_adamw(shape, grad)}


def inference(module: nn.Module, x: Tensor) -> Function:
    """A call of the module, which sees the input once in training: that sets its activation scales."""
    with torch.no_grad():
        module.train()(x)
    return partial(module.eval(), x)
