"""The gradient of a packed weight from two maps of integers: a sum over all pixels, exact.

One map is read pixel by pixel; of the other, each tap reads the pixels that it meets. Programs share the pixels,
and add their sums: in integers, so that the order does not matter.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.triton import interpreter
from bitorch_engine.ops.triton.activation import activation_values
from bitorch_engine.ops.triton.convolve import MULTIPROCESSORS
from bitorch_engine.ops.triton.geometry import Phase, phases, triple
from bitorch_engine.ops.triton.image import image_of_codes, row_length
from bitorch_engine.ops.triton.launch import blocks_of, power_of_two
from bitorch_engine.ops.triton.pixels import pixel_of, place_in, tap_of
from bitorch_engine.ops.triton.quantized_conv import suits

interpreter.repair()


def conv_grad_weight(
    grad_codes: Tensor,
    grad_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype = rest
    c = Convolution(*fields)
    wide = {grad_scale.dtype, scale.dtype, low.dtype} == {torch.float32}
    if not (wide and suits(shape, weight_shape, c)):
        return reference.conv_grad_weight(grad_codes, grad_scale, codes, scale, low, a_bit, shape, weight_shape, *rest)
    kernel, out = weight_shape[2:], c.output_shape(shape, weight_shape)
    inputs, outputs = shape[1] // c.groups, out[1] // c.groups
    grads = grad_codes.contiguous()
    image, padding = image_of_codes(codes, shape, low, a_bit, row_length(shape[1], c.groups))
    row = padding.numel() // c.groups
    if c.transposed:
        (phase,) = phases(shape[2:], kernel, c, scatter=False)
        maps = Maps(image, grads, grads.new_zeros(outputs), out[2:], c.groups, row, outputs, phase)
    else:
        (phase,) = phases(out[2:], kernel, c, scatter=False)
        maps = Maps(grads, image, padding, shape[2:], c.groups, outputs, row, phase)
    total = sum_products(maps).unflatten(0, (c.groups, -1))
    if a_bit == 8:  # the image holds the code less an offset, times which the gradients that a code met are missing
        if c.transposed:
            ones = torch.ones(image.numel() // row, dtype=torch.int8, device=image.device)
            met = sum_products(maps._replace(fixed=ones, rows=1)).unsqueeze(1)
        else:
            met = sum_pixels(grads, total.dtype).view(c.groups, outputs, 1, 1)
        total += (low + 128).to(total.dtype) * met
    total = total[:, :inputs] if c.transposed else total[..., :inputs]
    values = total.flatten(0, 1).unflatten(1, kernel or [1]).movedim(-1, 1).reshape(list(weight_shape))
    factor = c.per_output_channel((grad_scale * scale).view(-1), weight_shape)
    return (values.to(torch.float32) * factor).to(dtype).contiguous()


def conv_grad_weight_float(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    values = activation_values(codes, scale, low, a_bit, shape, grad.dtype, channels_last)
    return Convolution(*fields).grad_weight(grad, values, weight_shape).to(dtype)


class Maps(NamedTuple):
    """Two maps of int8, channels last, and how they meet.

    fixed: (N, *lengths, groups * rows), in that order.  met: (N, *source, groups * columns).
    padding: int8, (columns,), what lies outside of ``met``.  phase: results are the pixels of ``fixed``.
    """

    fixed: Tensor
    met: Tensor
    padding: Tensor
    source: Sequence[int]
    groups: int
    rows: int
    columns: int
    phase: Phase


_EXACT = 1 << 16  # products that int32 holds: each at most 2**14
_NARROW = 4  # channels of a group, below which there is no matrix product
_DEPTH = 64  # pixels of a matrix product


def sum_products(maps: Maps) -> Tensor:
    """The sums of products of each pair of channels at each tap: (groups * rows, taps, columns), int32 or int64."""
    m = maps
    taps = prod(m.phase.taps)
    pixels = m.fixed.numel() // (m.groups * m.rows)
    kind = torch.int32 if pixels <= _EXACT else torch.int64
    total = torch.zeros(m.groups * m.rows, taps, m.columns, dtype=kind, device=m.fixed.device)
    tensors = (m.fixed, m.met, m.padding, total)
    pattern = (m.phase.origin, m.phase.step, m.phase.tap_step, m.phase.results, m.phase.taps)
    sizes = (pixels, m.rows, m.columns, m.groups, triple(m.source), pattern)
    if m.groups > 1 and min(m.rows, m.columns) < _NARROW:
        blocks = blocks_of(m.groups * m.rows, 32) * taps * m.columns
        share = _share(pixels, blocks, 64)
        blocks = blocks_of(m.groups * m.rows, 32)
        grid: tuple[int, ...] = (blocks, taps * m.columns, blocks_of(pixels, share))
        _sum_directly[grid](*tensors, *sizes, share, PIXELS=64, CHANNELS=32)
        return total
    joined = m.columns if m.columns < 32 else 0
    height = min(128, max(16, power_of_two(m.rows)))
    width = min(64 if joined else 128, max(16, power_of_two(m.columns * (taps if joined else 1))))
    across = blocks_of(m.columns * taps, width) if joined else blocks_of(m.columns, width) * taps
    blocks = m.groups * blocks_of(m.rows, height) * across
    share = _share(pixels, blocks, _DEPTH)
    grid = (blocks, blocks_of(pixels, share))
    warps = 8 if joined or height * width > 64 * 128 else 4
    _sum_products[grid](
        *tensors, *sizes, share, JOINED=joined, ROWS=height, COLUMNS=width, DEPTH=_DEPTH, num_warps=warps, num_stages=3
    )
    return total


def sum_pixels(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over all pixels of int8 (N, *spatial, channels): (channels,), int32 or int64."""
    channels = codes.shape[-1]
    pixels = codes.numel() // channels
    total = torch.zeros(channels, dtype=dtype, device=codes.device)
    width = min(128, power_of_two(channels))
    blocks = blocks_of(channels, width)
    share = _share(pixels, blocks, 4096 // width)
    grid = (blocks, blocks_of(pixels, share))
    _sum_pixels[grid](codes, total, pixels, channels, share, PIXELS=4096 // width, CHANNELS=width)
    return total


def _share(pixels: int, blocks: int, unit: int) -> int:
    """Pixels of a program: few enough for int32, and for all multiprocessors to have work twice."""
    shares = max(blocks_of(pixels, _EXACT), min(blocks_of(2 * MULTIPROCESSORS, blocks), blocks_of(pixels, 8 * unit)))
    return blocks_of(blocks_of(pixels, shares), unit) * unit


@triton.jit
def _float16(code):
    """int8 as float16: with its sign bit turned it is the end of the mantissa of 1024 + 128 + code.

    To convert it takes four times as long.
    """
    word = (code.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
    return word.to(tl.float16, bitcast=True) - 1152.0


@triton.jit(do_not_specialize=["pixels", "share"])
def _sum_products(
    fixed,
    met,
    padding,
    total,
    pixels,
    rows,
    columns,
    groups,
    source,
    pattern,
    share,
    JOINED: tl.constexpr,  # the number of columns where a block's go through all taps; 0 where they belong to one
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    origin, step, tap_step, results, taps = pattern
    tap_count = taps[0] * taps[1] * taps[2]
    program = tl.program_id(0)
    group = program % groups
    program = program // groups
    blocks = tl.cdiv(rows, ROWS)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    program = program // blocks
    if JOINED > 0:
        place = program * COLUMNS + tl.arange(0, COLUMNS)
        tap, column = place // JOINED, place % JOINED
        real_column = tap < tap_count
    else:
        tap = program % tap_count
        column = program // tap_count * COLUMNS + tl.arange(0, COLUMNS)
        real_column = column < columns
    tap_z, tap_y, tap_x = tap_of(tap, taps)
    shift_z, shift_y = origin[0] + tap_z * tap_step[0], origin[1] + tap_y * tap_step[1]
    shift_x = origin[2] + tap_x * tap_step[2]
    fixed_column = fixed + group * rows + row
    width = JOINED if JOINED > 0 else columns  # known when compiling, so that whole words are loaded
    met += group * width

    begin = tl.program_id(1) * share
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(begin, min(begin + share, pixels), DEPTH):
        pixel = start + tl.arange(0, DEPTH)
        real = pixel < pixels
        sample, z, y, x = pixel_of(pixel, results)
        samples = sample.to(tl.int64) * source[0] * source[1] * source[2]
        if JOINED > 0:
            at_z = (z * step[0])[:, None] + shift_z[None, :]
            at_y = (y * step[1])[:, None] + shift_y[None, :]
            at, inside = place_in(at_z, at_y, (x * step[2])[:, None] + shift_x[None, :], source)
            start_of = tl.where(inside, met + (samples[:, None] + at) * (width * groups), padding)
        else:
            at_z, at_y = z * step[0] + shift_z, y * step[1] + shift_y
            at, inside = place_in(at_z, at_y, x * step[2] + shift_x, source)
            start_of = tl.where(inside, met + (samples + at) * (width * groups), padding)[:, None]
        mask = real[:, None] & (row < rows)[None, :]
        a = tl.load(fixed_column[None, :] + (pixel.to(tl.int64) * (rows * groups))[:, None], mask=mask, other=0)
        b = tl.load(start_of + column[None, :], mask=real[:, None] & real_column[None, :], other=0)
        # Tensor cores sum over the rows of a tile of 16-bit numbers, but not of bytes, which would have to be turned
        # around first. Codes are exact in float16, and 64 products of them in a float32.
        sums += tl.dot(tl.trans(_float16(a)), _float16(b)).to(tl.int32)

    place = (group * rows + row).to(tl.int64)[:, None] * (tap_count * columns) + (tap * columns + column)[None, :]
    mask = (row < rows)[:, None] & real_column[None, :]
    tl.atomic_add(total + place, sums.to(total.dtype.element_ty), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["pixels", "share"])
def _sum_pixels(codes, total, pixels, channels, share, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real_channel = channel < channels
    begin = tl.program_id(1) * share
    sums = tl.zeros((PIXELS, CHANNELS), tl.int32)
    for start in range(begin, min(begin + share, pixels), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        sums += tl.load(codes + at, mask=(pixel < pixels)[:, None] & real_channel[None, :], other=0).to(tl.int32)
    found = tl.sum(sums, 0).to(total.dtype.element_ty)
    tl.atomic_add(total + channel, found, mask=real_channel, sem="relaxed")


@triton.jit(do_not_specialize=["pixels", "rows", "columns", "groups", "share"])
def _sum_directly(
    fixed,
    met,
    padding,
    total,
    pixels,
    rows,
    columns,
    groups,
    source,
    pattern,
    share,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For groups of few channels: a program has one tap and one column of some rows, of any group."""
    origin, step, tap_step, results, taps = pattern
    row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real_row = row < rows * groups
    tap, column = tl.program_id(1) // columns, tl.program_id(1) % columns
    tap_z, tap_y, tap_x = tap_of(tap, taps)
    shift_z, shift_y = origin[0] + tap_z * tap_step[0], origin[1] + tap_y * tap_step[1]
    shift_x = origin[2] + tap_x * tap_step[2]
    channel = row // rows * columns + column
    padded = tl.load(padding + column).to(tl.int32)

    begin = tl.program_id(2) * share
    sums = tl.zeros((PIXELS, CHANNELS), tl.int32)
    for start in range(begin, min(begin + share, pixels), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        real = pixel < pixels
        sample, z, y, x = pixel_of(pixel, results)
        at_z, at_y = z * step[0] + shift_z, y * step[1] + shift_y
        at, inside = place_in(at_z, at_y, x * step[2] + shift_x, source)
        at += sample.to(tl.int64) * source[0] * source[1] * source[2]
        mask = real[:, None] & real_row[None, :]
        place = pixel.to(tl.int64)[:, None] * (rows * groups) + row[None, :]
        a = tl.load(fixed + place, mask=mask, other=0).to(tl.int32)
        place = at[:, None] * (columns * groups) + channel[None, :]
        b = tl.load(met + place, mask=mask & inside[:, None], other=0).to(tl.int32)
        sums += a * tl.where(inside[:, None], b, padded)

    place = (row.to(tl.int64) * (taps[0] * taps[1] * taps[2]) + tap) * columns + column
    found = tl.sum(sums, 0).to(total.dtype.element_ty)
    tl.atomic_add(total + place, found, mask=real_row, sem="relaxed")
