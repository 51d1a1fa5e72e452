"""Packing and unpacking of 1 to 8 bit values; ``bits.packing`` defines the layout."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format, packed_size
from bitorch_engine.ops.reference import bits as reference
from bitorch_engine.ops.triton.floats import narrowed
from bitorch_engine.ops.triton.launch import blocks_of

_BLOCK = 1024
"""Bytes or values of one program."""

MOST_IN_INT32 = (1 << 31) - (1 << 20)
"""So many are counted in 32 bits, and the elements of a program that begins among them."""


def pack(values: Tensor, bits: int) -> Tensor:
    values = values.contiguous()
    count = values.numel()
    packed = values.new_empty(packed_size(count, bits))
    if count:
        grid = (blocks_of(packed.numel(), _BLOCK),)
        _pack[grid](values, packed, count, packed.numel(), BITS=bits, BLOCK=_BLOCK)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        return reference.unpack(packed, bits, count)  # which says what is wrong
    values = packed.new_empty(count)
    if count:
        grid = (blocks_of(count, _BLOCK),)
        _unpack[grid](packed.contiguous(), values, count, BITS=bits, BLOCK=_BLOCK)
    return values


def dequantize(
    packed: Tensor, channel_scale: Tensor, bits: int, columns: int, dtype: torch.dtype, taps: int = 1
) -> Tensor:
    if channel_scale.dtype != torch.float32 or columns > MOST_IN_INT32:
        return reference.dequantize(packed, channel_scale, bits, columns, dtype, taps)
    out = packed.new_empty((channel_scale.numel(), columns), dtype=dtype)
    form = bit_format(bits)
    if out.numel():
        grid = (blocks_of(out.numel(), _BLOCK),)
        _dequantize[grid](
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
    return out if taps == 1 else out.unflatten(1, (columns // taps, taps)).transpose(1, 2).reshape(-1, columns)


@triton.jit
def load_index(packed, at, mask, BITS: tl.constexpr):
    """The values at places ``at`` (any shape, int) of a packed stream: int32; 0 where the mask is off."""
    return load_bits(packed, at.to(tl.int64) * BITS, mask, BITS)


@triton.jit
def load_bits(packed, bit, mask, BITS: tl.constexpr):
    """The values that begin at each ``bit`` of a packed stream: int32.

    A value lies in the byte where it begins and, where 8 is no multiple of BITS, may reach into the next one.
    """
    byte, shift = bit >> 3, (bit & 7).to(tl.int32)
    value = tl.load(packed + byte, mask=mask, other=0).to(tl.int32) >> shift
    if 8 % BITS != 0:
        reaches = mask & (shift + BITS > 8)
        value |= tl.load(packed + byte + 1, mask=reaches, other=0).to(tl.int32) << (8 - shift)
    return value & ((1 << BITS) - 1)


@triton.jit
def spread(x):
    """Each value eight times: (B, 64) from (B, 8)."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], 8, 8)), (x.shape[0], 64))


@triton.jit
def load_tile(plane, group, left, BITS: tl.constexpr, WORDS: tl.constexpr):
    """A tile of values: int32, (B, 64), 0 beyond the first ``left``.

    plane: where the program's part of a packed stream begins.  group: (B, 8), the number of each eight values in it,
    which fill BITS bytes.  WORDS: ``left`` is a multiple of eight, and the plane aligned to 4 bytes.
    """
    lane = tl.arange(0, 64)[None, :] % 8
    if WORDS and (BITS == 1 or BITS == 2 or BITS == 4):
        word = tl.load(_words(plane, BITS) + group, mask=group * 8 < left, other=0).to(tl.int32)
        value = (spread(word) >> (lane * BITS)) & ((1 << BITS) - 1)
    else:
        at = spread(group) * 8 + lane
        value = load_bits(plane, at * BITS, at < left, BITS)
    return value


@triton.jit
def store_tile(plane, group, left, value, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Pack a tile of values as ``load_tile`` reads it. A group is one word: the sum of values that share no bit."""
    lane = tl.arange(0, 64)[None, :] % 8
    at = spread(group) * 8 + lane
    if BITS == 8:
        tl.store(plane + at, value.to(tl.uint8), mask=at < left)
    else:
        wide = value if BITS <= 4 else value.to(tl.int64)
        parts = tl.where(at < left, wide << (lane * BITS), 0)
        word = tl.sum(tl.reshape(parts, (group.shape[0], 8, 8)), axis=2)
        if WORDS and (BITS == 1 or BITS == 2 or BITS == 4):
            words = _words(plane, BITS)
            tl.store(words + group, word.to(words.dtype.element_ty), mask=group * 8 < left)
        else:
            step = tl.arange(0, 8)[None, None, :]
            byte = group[:, :, None] * BITS + step
            there = (step < BITS) & (byte * 8 < left * BITS)
            tl.store(plane + byte, (word[:, :, None] >> (8 * tl.minimum(step, BITS - 1))).to(tl.uint8), mask=there)


@triton.jit
def _words(plane, BITS: tl.constexpr):
    """A pointer to the words of eight values, of 1, 2 or 4 bytes."""
    if BITS == 1:
        result = plane
    elif BITS == 2:
        result = plane.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        result = plane.to(tl.pointer_type(tl.int32), bitcast=True)
    return result


@triton.jit
def row_of(start, inside, columns):
    """The row of elements ``start + inside`` of a matrix: int64. One division in 64 bits, of the scalar ``start``.

    columns: at most MOST_IN_INT32.
    """
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
