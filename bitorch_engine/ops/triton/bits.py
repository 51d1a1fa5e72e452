"""Packing and unpacking of 1 to 8 bit values; ``bits.packing`` defines the layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format, packed_size
from bitorch_engine.ops.reference import bits as reference
from bitorch_engine.ops.triton.floats import narrowed

_BLOCK = 1024
"""Bytes or values of one program."""

MOST_COLUMNS = (1 << 31) - (1 << 20)
"""A row up to that long, and a program's elements on top, are counted in 32 bits: ``row_of``."""


def pack(values: Tensor, bits: int) -> Tensor:
    values = values.contiguous()
    count = values.numel()
    packed = values.new_empty(packed_size(count, bits))
    if count:
        _pack[(triton.cdiv(packed.numel(), _BLOCK),)](values, packed, count, packed.numel(), BITS=bits, BLOCK=_BLOCK)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        return reference.unpack(packed, bits, count)  # which says what is wrong
    values = packed.new_empty(count)
    if count:
        _unpack[(triton.cdiv(count, _BLOCK),)](packed.contiguous(), values, count, BITS=bits, BLOCK=_BLOCK)
    return values


def dequantize(packed: Tensor, channel_scale: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    if channel_scale.dtype != torch.float32 or columns > MOST_COLUMNS:
        return reference.dequantize(packed, channel_scale, bits, columns, dtype)
    out = packed.new_empty((channel_scale.numel(), columns), dtype=dtype)
    form = bit_format(bits)
    if out.numel():
        _dequantize[(triton.cdiv(out.numel(), _BLOCK),)](
            packed.contiguous(),
            channel_scale.contiguous(),
            out,
            out.numel(),
            columns,
            BITS=bits,
            LOW=form.low,
            STEP=form.step,
            BLOCK=_BLOCK,
        )
    return out


@triton.jit
def load_index(packed, at, mask, BITS: tl.constexpr):
    """The values at places ``at`` (any shape, int) of a packed stream: int32; 0 where the mask is off.

    A value lies in the byte where it begins and, where 8 is no multiple of BITS, may reach into the next one.
    """
    bit = at.to(tl.int64) * BITS
    byte, shift = bit >> 3, (bit & 7).to(tl.int32)
    value = tl.load(packed + byte, mask=mask, other=0).to(tl.int32) >> shift
    if 8 % BITS != 0:
        reaches = mask & (shift + BITS > 8)
        value |= tl.load(packed + byte + 1, mask=reaches, other=0).to(tl.int32) << (8 - shift)
    return value & ((1 << BITS) - 1)


@triton.jit
def row_of(start, inside, columns):
    """The row of elements ``start + inside`` of a matrix: int64. One division in 64 bits, of the scalar ``start``."""
    row = start // columns
    left = (start - row * columns).to(tl.int32)
    return row + (left + inside) // columns


@triton.jit
def _pack(values, packed, count, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One byte a lane: the values that touch it, each shifted to where it lies in it."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = byte * 8 // BITS
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(8 // BITS if 8 % BITS == 0 else (6 + BITS) // BITS + 1):
        at = first + step
        shift = (at * BITS - byte * 8).to(tl.int32)
        value = tl.load(values + at, mask=(at < count) & (byte < size) & (shift < 8), other=0).to(tl.int32)
        total |= tl.where(shift >= 0, value << (shift & 7), value >> (-shift & 7))
    tl.store(packed + byte, total.to(tl.uint8), mask=byte < size)


@triton.jit
def _unpack(packed, values, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values + at, load_index(packed, at, at < count, BITS).to(tl.uint8), mask=at < count)


@triton.jit(do_not_specialize=["columns"])
def _dequantize(
    packed, scale, out, count, columns, BITS: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    mask = start + inside < count
    code = load_index(packed, start + inside, mask, BITS) * STEP + LOW
    row_scale = tl.load(scale + row_of(start, inside, columns), mask=mask, other=0.0)
    value = code.to(tl.float32) * row_scale
    tl.store(out + start + inside, narrowed(value, out.dtype.element_ty), mask=mask)
