"""The operands of the integer products: activations as an image of int8, and weights in the order of the taps.

Both are made for one product and dropped. The tensor cores take signed bytes from rows of 16 bytes and more, many times
each; decoding there would repeat the work for every tile, from addresses that no asynchronous copy can fetch.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.triton.activation import index_of
from bitorch_engine.ops.triton.bits import load_index, row_of
from bitorch_engine.ops.triton.floats import widened
from bitorch_engine.ops.triton.launch import blocks_of

_BLOCK = 4096
_ROWS, _COLUMNS = 16, 128


def row_length(channels: int, groups: int) -> int:
    """Bytes of a pixel, so that tiles are loaded in words: the channels, and zeros where groups allow them."""
    if groups > 1:
        return channels
    unit = 4 if channels <= 12 else 16
    return -(-channels // unit) * unit


def image_of_codes(codes: Tensor, shape: Sequence[int], low: Tensor, bits: int, row: int) -> tuple[Tensor, Tensor]:
    """(image, padding) of packed activations: int8, pixels of ``row`` bytes, channels last, and a pixel of padding.

    A byte is the code; at 8 bits, whose codes may reach 255, it is the index less 128, so the code less 128 + low.
    Padding is worth code 0.
    """
    image, padding, grid = _empty(shape, row, codes.device)
    step = bit_format(bits).step
    sizes = (image.numel(), padding.numel(), shape[1], row)
    _decode[grid](
        codes.contiguous(), low, image, padding, *sizes, WHOLE=row == shape[1], BITS=bits, STEP=step, BLOCK=_BLOCK
    )
    return image, padding


def image_of_floats(x: Tensor, scale: Tensor, low: Tensor, bits: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """(image, padding, poison) of activations (N, C, *spatial), as ``quantize_activation`` quantizes them."""
    image, padding, grid = _empty(x.shape, row, x.device)
    poison = torch.zeros((), dtype=torch.float32, device=x.device)
    step = bit_format(bits).step
    tensors = (x.movedim(1, -1).contiguous(), scale, low, image, padding, poison)
    sizes = (image.numel(), padding.numel(), x.shape[1], row)
    _quantize[grid](
        *tensors, *sizes, WHOLE=row == x.shape[1], BITS=bits, STEP=step, BLOCK=_BLOCK, enable_fp_fusion=False
    )
    return image, padding, poison


def _empty(shape: Sequence[int], row: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[int]]:
    """An image and its padding, and the grid that fills both."""
    image = torch.empty(prod(shape) // shape[1] * row, dtype=torch.int8, device=device)
    padding = torch.empty(row, dtype=torch.int8, device=device)
    return image, padding, (blocks_of(image.numel(), _BLOCK),)


def taps_of_weight(packed: Tensor, bits: int, groups: int, outputs: int, inputs: int, taps: int, row: int) -> Tensor:
    """The weight for products over input channels: int8 (groups * outputs, taps, row), zero past the channels.

    packed: rows of output channels, each (inputs, taps); ``outputs`` and ``inputs`` of one group.
    """
    return _arranged(packed, bits, groups, outputs, inputs, taps, row, forward=True)


def taps_of_transposed(
    packed: Tensor, bits: int, groups: int, outputs: int, inputs: int, taps: int, row: int
) -> Tensor:
    """The weight for products over output channels: int8 (groups * inputs, taps, row), zero past the channels."""
    return _arranged(packed, bits, groups, outputs, inputs, taps, row, forward=False)


def _arranged(
    packed: Tensor, bits: int, groups: int, outputs: int, inputs: int, taps: int, row: int, *, forward: bool
) -> Tensor:
    form = bit_format(bits)
    results = outputs if forward else inputs
    weight = torch.empty(groups * results, taps, row, dtype=torch.int8, device=packed.device)
    rows, columns = (outputs, taps * row) if forward else (row, inputs * taps)
    grid = (blocks_of(columns, _COLUMNS), blocks_of(rows, _ROWS), groups)
    sizes = (outputs, inputs, taps, row)
    if weight.numel():
        blocks = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
        _arrange[grid](
            packed.contiguous(), weight, *sizes, BITS=bits, LOW=form.low, STEP=form.step, FORWARD=forward, **blocks
        )
    return weight


@triton.jit
def _arrange(
    packed,
    weight,
    outputs,
    inputs,
    taps,
    row,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    FORWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of output channels by (channel, tap): forward in the order of writing, transposed in that of reading."""
    group = tl.program_id(2).to(tl.int64)
    output = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if FORWARD:
        channel, tap = column % row, column // row
    else:
        channel, tap = column // taps, column % taps
    real = (output < outputs) & (channel < inputs) & (tap < taps)
    at = ((group * outputs + output) * inputs + channel) * taps + tap
    code = tl.where(real, load_index(packed, at, real, BITS) * STEP + LOW, 0).to(tl.int8)
    if FORWARD:
        tl.store(
            weight + (group * outputs + output) * taps * row + column, code, mask=(output < outputs) & (tap < taps)
        )
    else:
        place = (group * inputs * taps + column) * row + output
        tl.store(weight + place, code, mask=(output < row) & (channel < inputs))


INFINITY = tl.constexpr(0x7F800000)
"""Infinity as ``size_bits`` gives it; what is larger is a NaN."""


@triton.jit
def size_bits(value):
    """The magnitudes of float32 values as integers of the same order: int32."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantized_byte(value, inverse, low, BITS: tl.constexpr, STEP: tl.constexpr):
    """What the image holds for float32 activations; anything for NaN. inverse: of the scale."""
    return _signed_byte(index_of(value * inverse, low, BITS), low, BITS, STEP)


@triton.jit
def _signed_byte(index, low, BITS: tl.constexpr, STEP: tl.constexpr):
    """What the image holds for an index."""
    return (index - 128 if BITS == 8 else index * STEP + low.to(tl.int32)).to(tl.int8)


@triton.jit
def _padding(low, BITS: tl.constexpr):
    """What the image holds for code 0."""
    return (-128 - low.to(tl.int32) if BITS == 8 else low.to(tl.int32) * 0).to(tl.int8)


@triton.jit
def _places(size, channels, row, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program's bytes: (where they start, the lanes, which are written, their elements, which of them there are).

    Elements are those of (pixel, channel), counted from the start where a row has as many bytes as channels (WHOLE).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    write = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
    if WHOLE:
        at, real = lane, write
    else:
        pixel = row_of(start, lane, row)
        channel = (start - pixel * row).to(tl.int32) + lane
        at, real = pixel * channels + channel, write & (channel < channels)
    return start, lane, write, at, real


@triton.jit
def _write(
    image, padding, start, lane, write, byte, real, zero, padding_size, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write bytes, and ``zero`` where there is no element; the first program writes the padding too."""
    tl.store(image + start + lane, byte if WHOLE else tl.where(real, byte, zero), mask=write)
    if start == 0:
        for begin in range(0, padding_size, BLOCK):
            tl.store(padding + begin + lane, zero + tl.zeros_like(byte), mask=begin + lane < padding_size)


@triton.jit
def _decode(
    codes,
    low,
    image,
    padding,
    size,
    padding_size,
    channels,
    row,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, lane, write, at, real = _places(size, channels, row, WHOLE, BLOCK)
    low_code = tl.load(low)
    if BITS == 8:
        index = tl.load(codes + (start if WHOLE else 0) + at, mask=real, other=0).to(tl.int32)
    else:
        index = load_index(codes, (start if WHOLE else 0) + at, real, BITS)
    byte = _signed_byte(index, low_code, BITS, STEP)
    _write(image, padding, start, lane, write, byte, real, _padding(low_code, BITS), padding_size, WHOLE, BLOCK)


@triton.jit
def _quantize(
    x,
    scale,
    low,
    image,
    padding,
    poison,
    size,
    padding_size,
    channels,
    row,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, lane, write, at, real = _places(size, channels, row, WHOLE, BLOCK)
    low_code = tl.load(low)
    value = widened(tl.load(x + (start if WHOLE else 0) + at, mask=real, other=0.0))
    byte = quantized_byte(value, tl.div_rn(1.0, tl.load(scale)), low_code, BITS, STEP)
    _write(image, padding, start, lane, write, byte, real, _padding(low_code, BITS), padding_size, WHOLE, BLOCK)
    tl.store(poison, float("nan"), mask=tl.max(size_bits(value)) >= INFINITY)
