"""Packed weights with float activations on the GPU: codes become floats in registers, and are stored nowhere."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.reference import linear as reference
from bitorch_engine.ops.triton import interpreter
from bitorch_engine.ops.triton.bits import MOST_IN_INT32, dequantize, load_index
from bitorch_engine.ops.triton.floats import narrowed, widened
from bitorch_engine.ops.triton.launch import blocks_of, power_of_two

interpreter.repair()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 2  # rows of activations for each of which the weight is decoded anew: that of a second one is in the cache
_DEPTH = 64  # columns of a matrix product


def linear_weight_only(
    x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group_size: int = 0
) -> Tensor:
    """As the reference, but for rounding: weights enter as codes, which are exact, and the scale comes after the sum.

    To the reference go other dtypes than float32, bfloat16 and float16, groups of a size that 32 does not divide, and
    more rows of the input than 32 bits count.
    """
    reference.check_groups(channel_scale, columns, group_size)
    rows = channel_scale.shape[0] if group_size else channel_scale.numel()
    count = prod(x.shape[:-1])
    if x.dtype not in _DTYPES or group_size % 32 or not (rows and columns and 0 < count <= MOST_IN_INT32):
        return reference.linear_weight_only(x, packed, channel_scale, bits, bias, columns, group_size)
    values, packed = x.reshape(-1, columns).contiguous(), packed.contiguous()
    scale = channel_scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    out = torch.empty([*x.shape[:-1], rows], dtype=x.dtype, device=x.device)
    form = bit_format(bits)
    # Rows that begin with a word of 32 bits are read in words.
    words = columns % 32 == 0 and packed.data_ptr() % 4 == 0
    formats = {"BITS": bits, "LOW": form.low, "STEP": form.step}
    if words and count <= _FEW:
        height, lanes = (8, 256) if 32 % bits == 0 else (16, 64)  # a lane has as many words as end a code
        grid: tuple[int, ...] = (blocks_of(rows, height), count)
        tensors = (values, packed.view(torch.int32), scale, bias, out)
        exact = x.dtype == torch.float32
        _multiply_row[grid](*tensors, rows, columns, group_size, **formats, EXACT=exact, ROWS=height, LANES=lanes)
        return out
    words = words and 32 % bits == 0
    few, many = min(128, max(16, power_of_two(count))), min(128, max(16, power_of_two(rows)))
    if count > 16 and blocks_of(count, few) * blocks_of(rows, many) < 132:
        many = min(64, many)
    tensors = (values, packed.view(torch.int32) if words else packed, scale, bias, out)
    grid = (blocks_of(count, few) * blocks_of(rows, many),)
    _multiply[grid](
        *tensors,
        count,
        rows,
        columns,
        group_size,
        **formats,
        WORDS=words,
        WIDEN=interpreter.widens(x.dtype),
        SAMPLES=few,
        ROWS=many,
        DEPTH=32 if group_size % 64 else _DEPTH,
        num_warps=8 if few * many > 64 * 128 else 4,
        num_stages=3,
    )
    return out


def linear_grad_input(grad: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, columns: int) -> Tensor:
    """As the reference: torch's product, with a weight that becomes float in one pass."""
    return grad @ dequantize(packed, channel_scale.to(torch.float32).view(-1), bits, columns, grad.dtype)


@triton.jit(do_not_specialize=["rows"])
def _multiply_row(
    x,
    words,
    scale,
    bias,
    out,
    rows,
    columns,
    GROUP: tl.constexpr,  # columns of a scale; 0 for one scale a row
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One row of activations by some rows of the weight. A lane has a unit: a word, or as many as end a code.

    A code's bits become the upper ones of a mantissa, so that its float is 1 + index / 2**BITS after two instructions,
    and what that lacks to the code is a multiple of the sum of x, added once a unit. In float32 (EXACT) that would cost
    accuracy, and each becomes the code.
    """
    WORDS: tl.constexpr = 1 if 32 % BITS == 0 else BITS
    VALUES: tl.constexpr = 32 * WORDS // BITS
    FACTOR: tl.constexpr = STEP * (1 << BITS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_row = row < rows
    units = columns // VALUES
    row_words = words + tl.where(real_row, row, 0).to(tl.int64)[:, None] * (units * WORDS)
    x += tl.program_id(1).to(tl.int64) * columns
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in tl.range(0, units, LANES, num_stages=3):
        unit = start + tl.arange(0, LANES)
        real = unit < units
        part = tl.zeros((ROWS, LANES), tl.float32)
        x_sum = tl.zeros((LANES,), tl.float32)
        before = tl.zeros((ROWS, LANES), tl.uint32)
        for at in tl.static_range(WORDS):
            word = tl.load(row_words + (unit * WORDS + at)[None, :], mask=real[None, :], other=0)
            word = word.to(tl.uint32, bitcast=True)
            for value in tl.static_range(VALUES):
                if (value * BITS + BITS - 1) // 32 == at:
                    bits = _mantissa(before, word, value * BITS % 32, value * BITS // 32 < at, BITS)
                    weight = bits.to(tl.float32, bitcast=True)
                    if EXACT:
                        weight = weight * FACTOR + (LOW - FACTOR)
                    factor = widened(tl.load(x + unit * VALUES + value, mask=real, other=0.0))
                    part += weight * factor[None, :]
                    x_sum += factor
            before = word
        if not EXACT:
            part = part * FACTOR + (x_sum * (LOW - FACTOR))[None, :]
        if GROUP != 0:
            group = unit * VALUES // GROUP
            place = row.to(tl.int64)[:, None] * (columns // GROUP) + group[None, :]
            part *= tl.load(scale + place, mask=real_row[:, None] & real[None, :], other=0.0)
        total += part
    result = tl.sum(total, 1)
    if GROUP == 0:
        result *= tl.load(scale + row, mask=real_row, other=0.0)
    if bias is not None:
        result += widened(tl.load(bias + row, mask=real_row, other=0.0))
    place = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(out + place, narrowed(result, out.dtype.element_ty), mask=real_row)


@triton.jit
def _mantissa(before, word, SHIFT: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr):
    """The bits of the float 1 + index / 2**BITS. The index begins at SHIFT, in the word or (SPLIT) in that before."""
    PLACE: tl.constexpr = 23 - BITS
    if SPLIT:
        moved = ((before >> SHIFT) | (word << (32 - SHIFT))) << PLACE
    elif SHIFT > PLACE:
        moved = word >> (SHIFT - PLACE)
    else:
        moved = word << (PLACE - SHIFT)
    return (moved & (((1 << BITS) - 1) << PLACE)) | 0x3F800000


@triton.jit(do_not_specialize=["count", "rows"])
def _multiply(
    x,
    packed,
    scale,
    bias,
    out,
    count,
    rows,
    columns,
    GROUP: tl.constexpr,  # columns of a scale; 0 for one scale a row
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    WORDS: tl.constexpr,
    WIDEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The transposed product: decoded weights are its left operand, which the tensor cores take from registers."""
    blocks = tl.cdiv(count, SAMPLES)
    program = tl.program_id(0)
    sample = program % blocks * SAMPLES + tl.arange(0, SAMPLES)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    real, real_row = sample < count, row < rows
    sample_x = x + tl.where(real, sample, 0).to(tl.int64)[:, None] * columns
    row_start = tl.where(real_row, row, 0).to(tl.int64)[:, None] * columns
    total = tl.zeros((ROWS, SAMPLES), tl.float32)
    for start in range(0, columns, DEPTH):
        column = start + tl.arange(0, DEPTH)
        values = tl.load(sample_x + column[None, :], mask=(column < columns)[None, :], other=0.0)
        if WORDS:
            VALUES: tl.constexpr = 32 // BITS
            at = start // VALUES + tl.arange(0, DEPTH // VALUES)
            word = tl.load(packed + row_start // VALUES + at[None, :], mask=(at < columns // VALUES)[None, :], other=0)
            index = word[:, :, None] >> (tl.arange(0, VALUES) * BITS)[None, None, :]
            index = tl.reshape(index & ((1 << BITS) - 1), (ROWS, DEPTH))
        else:
            index = load_index(packed, row_start + column[None, :], (column < columns)[None, :], BITS)
        weight = (index * STEP + LOW).to(tl.float32)
        if GROUP != 0:
            place = row_start // GROUP + start // GROUP
            weight *= tl.load(scale + place)
            weight = narrowed(weight, x.dtype.element_ty)
        else:
            weight = weight.to(x.dtype.element_ty)
        if WIDEN:
            weight, values = widened(weight), widened(values)
        total = tl.dot(weight, tl.trans(values), total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scale + row, mask=real_row, other=0.0)[:, None]
    if bias is not None:
        total += widened(tl.load(bias + row, mask=real_row, other=0.0))[:, None]
    place = sample.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out + place, narrowed(total, out.dtype.element_ty), mask=real_row[:, None] & real[None, :])
