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
from bitorch_engine.ops.triton.activation import quantized
from bitorch_engine.ops.triton.bits import load_index, row_of
from bitorch_engine.ops.triton.floats import widened

_BLOCK = 1024
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
    """An image and its padding, and the grid that fills both: one program more than the image needs."""
    image = torch.empty(prod(shape) // shape[1] * row, dtype=torch.int8, device=device)
    padding = torch.empty(row, dtype=torch.int8, device=device)
    return image, padding, (triton.cdiv(image.numel(), _BLOCK) + triton.cdiv(row, _BLOCK),)


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
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS), groups)
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


@triton.jit
def _signed_byte(index, low, BITS: tl.constexpr, STEP: tl.constexpr):
    """What the image holds for an index."""
    return (index - 128 if BITS == 8 else index * STEP + low.to(tl.int32)).to(tl.int8)


@triton.jit
def _padding(low, BITS: tl.constexpr):
    """What the image holds for code 0."""
    return (-128 - low.to(tl.int32) if BITS == 8 else low.to(tl.int32) * 0).to(tl.int8)


@triton.jit
def _places(image, padding, size, padding_size, channels, row, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program's bytes: (address, whether to write, the element of (pixel, channel), whether it is one).

    WHOLE: a row has as many bytes as there are channels.
    The programs after those of the image write its padding.
    """
    programs = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < programs:
        start = program.to(tl.int64) * BLOCK
        if WHOLE:
            return image + start + lane, start + lane < size, start + lane, start + lane < size
        pixel = row_of(start, lane, row)
        channel = (start - pixel * row).to(tl.int32) + lane
        write = start + lane < size
        return image + start + lane, write, pixel * channels + channel, write & (channel < channels)
    else:
        place = (program - programs) * BLOCK + lane
        return padding + place, place < padding_size, place.to(tl.int64), place < 0


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
    address, write, at, real = _places(image, padding, size, padding_size, channels, row, WHOLE, BLOCK)
    low_code = tl.load(low)
    index = tl.load(codes + at, mask=real, other=0).to(tl.int32) if BITS == 8 else load_index(codes, at, real, BITS)
    byte = tl.where(real, _signed_byte(index, low_code, BITS, STEP), _padding(low_code, BITS))
    tl.store(address, byte, mask=write)


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
    address, write, at, real = _places(image, padding, size, padding_size, channels, row, WHOLE, BLOCK)
    low_code = tl.load(low)
    value = widened(tl.load(x + at, mask=real, other=0.0))
    _, index = quantized(value, scale, low_code, BITS)
    byte = tl.where(real, _signed_byte(index, low_code, BITS, STEP), _padding(low_code, BITS))
    tl.store(address, byte, mask=write)
    finite = tl.min((tl.abs(value) <= 3.4028234663852886e38).to(tl.int32))
    tl.store(poison, float("nan"), mask=finite == 0)
