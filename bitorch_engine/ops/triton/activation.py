"""Activations as codes of 1 to 8 bits, and the gradients of that. Memory in channels-last order saves a copy."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format, packed_size
from bitorch_engine.ops.reference import activation as reference
from bitorch_engine.ops.reference.layout import channels_last_shape, is_channels_last, new_output
from bitorch_engine.ops.triton.bits import load_tile, store_tile
from bitorch_engine.ops.triton.floats import narrowed, rounded_small, widened
from bitorch_engine.ops.triton.launch import blocks_of

_BLOCKS = 16
"""Runs of 64 elements of one program."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_activation(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in DTYPES or x.numel() == 0:
        return reference.quantize_activation(x, scale, low, bits)
    last = x.movedim(1, -1).contiguous()
    count = last.numel()
    codes, beyond = (x.new_empty(packed_size(count, width), dtype=torch.uint8) for width in (bits, 1))
    poison = x.new_zeros((), dtype=torch.float32)
    _quantize[_grid(count)](
        last, scale, low, codes, beyond, poison, count,
        BITS=bits, BLOCKS=_BLOCKS, WORDS=count % 8 == 0, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, beyond, poison


def activation_values(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    if dtype not in DTYPES:
        return reference.activation_values(codes, scale, low, bits, shape, dtype, channels_last)
    last = codes.new_empty(channels_last_shape(shape), dtype=dtype)
    if last.numel():
        _values[_grid(last.numel())](
            codes, scale, low, last, last.numel(),
            BITS=bits, STEP=bit_format(bits).step, BLOCKS=_BLOCKS, WORDS=_words(last, codes), enable_fp_fusion=False,
        )  # fmt: skip
    return _in_order(last, channels_last)


def activation_grads(grad: Tensor, codes: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if grad.dtype not in DTYPES or grad.numel() == 0:
        return reference.activation_grads(grad, codes, beyond, low, bits)
    last = grad.movedim(1, -1).contiguous()
    out = torch.empty_like(last)
    grid = _grid(last.numel())
    parts = grad.new_empty(grid, dtype=torch.float32)
    _straight_through[grid](
        last, codes, beyond, low, out, parts, last.numel(),
        BITS=bits, STEP=bit_format(bits).step, BLOCKS=_BLOCKS, WORDS=_words(last, codes, beyond),
        enable_fp_fusion=False,
    )  # fmt: skip
    total = parts.sum(dtype=torch.float64).to(torch.float32)  # the same at every run, which atomic sums are not
    return _in_order(out, is_channels_last(grad)), total * reference.scale_grad_factor(grad.shape, low, bits)


def _grid(count: int) -> tuple[int]:
    return (blocks_of(count, _BLOCKS * 64),)


def _words(values: Tensor, *planes: Tensor) -> bool:
    return values.numel() % 8 == 0 and all(plane.data_ptr() % 4 == 0 for plane in planes)


def _in_order(last: Tensor, channels_last: bool) -> Tensor:
    """(N, C, *spatial), in channels-last memory order or that of the shape, of values (N, *spatial, C)."""
    x = last.movedim(-1, 1)
    return x if channels_last else new_output(x, x.shape, x.dtype, False).copy_(x)


@triton.jit
def quantized(value, scale, lowest, BITS: tl.constexpr):
    """(value / scale, index of its code), float32 and int32. NaN is taken as 0."""
    ratio = value * tl.div_rn(1.0, tl.load(scale))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return ratio, index_of(ratio, lowest, BITS)


@triton.jit
def index_of(ratio, lowest, BITS: tl.constexpr):
    """The index of the nearest code: int32. lowest: an integer, so that values can be clamped before they are rounded.

    NaN gives any index.
    """
    if BITS == 1:
        index = (ratio >= 0).to(tl.int32)
    else:
        clamped = tl.minimum(tl.maximum(ratio, lowest), lowest + ((1 << BITS) - 1.0))
        index = rounded_small(clamped) - lowest.to(tl.int32)
    return index


@triton.jit
def _quantize(
    x, scale, low, codes, beyond, poison, count, BITS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 64)
    left = tl.minimum(count - start, BLOCKS * 64).to(tl.int32)
    at = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    group = tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = widened(tl.load(x + start + at, mask=at < left, other=0.0))
    lost = tl.max(tl.max((value * 0.0 != 0.0).to(tl.int32), axis=1), axis=0)
    tl.store(poison, float("nan"), mask=lost > 0)  # whoever finds one writes the same

    lowest = tl.load(low)
    ratio, index = quantized(value, scale, lowest, BITS)
    if BITS == 1:
        outside = tl.abs(ratio) > 1
    else:
        outside = tl.where(index == 0, ratio < lowest, ratio > index.to(tl.float32) + lowest)
    store_tile(codes + start // 8 * BITS, group, left, index, BITS, WORDS)
    store_tile(beyond + start // 8, group, left, outside.to(tl.int32), 1, WORDS)


@triton.jit
def _values(
    codes, scale, low, out, count, BITS: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 64)
    left = tl.minimum(count - start, BLOCKS * 64).to(tl.int32)
    at = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    group = tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    index = load_tile(codes + start // 8 * BITS, group, left, BITS, WORDS)
    value = (index.to(tl.float32) * STEP + tl.load(low)) * tl.load(scale)
    tl.store(out + start + at, narrowed(value, out.dtype.element_ty), mask=at < left)


@triton.jit
def _straight_through(
    grad, codes, beyond, low, out, parts, count,
    BITS: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """parts: of each program, the sum of gradient * slope of the scale."""
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 64)
    left = tl.minimum(count - start, BLOCKS * 64).to(tl.int32)
    at = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    group = tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    index = load_tile(codes + start // 8 * BITS, group, left, BITS, WORDS)
    outside = load_tile(beyond + start // 8, group, left, 1, WORDS)
    g = tl.load(grad + start + at, mask=at < left, other=0.0)
    code = index.to(tl.float32) * STEP + tl.load(low)
    clipped = (outside != 0) & ((index == 0) | (index == (1 << BITS) - 1))
    tl.store(out + start + at, tl.where(clipped, 0.0, g), mask=at < left)
    if BITS == 1:
        slope = code
    else:
        slope = tl.where(clipped, code, tl.where(index == 0, 0.0, 0.25 - 0.5 * outside.to(tl.float32)))
    total = tl.sum(tl.sum(widened(g) * slope, axis=1), axis=0)
    tl.store(parts + tl.program_id(0), total)
