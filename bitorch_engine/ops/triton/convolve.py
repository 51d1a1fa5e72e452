"""Integer convolution on the tensor cores: an implicit matrix product of pixels by channels, over taps and channels.

The matrix of patches exists only as tiles of addresses. Bytes come from an image and from weights in the order of the
taps (``image.py``), or, for one tap, from float activations that are quantized as they are loaded; sums are int32,
and become floats as they are stored.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.triton import interpreter
from bitorch_engine.ops.triton.floats import widened
from bitorch_engine.ops.triton.geometry import Phase, triple
from bitorch_engine.ops.triton.image import INFINITY, quantized_byte, size_bits
from bitorch_engine.ops.triton.launch import blocks_of, power_of_two
from bitorch_engine.ops.triton.pixels import is_in, pixel_of, place_in, place_of, store_results, tap_of, weight_tap

interpreter.repair()


class Scales(NamedTuple):
    """What turns an integer total into a float result; each float32.

    forward: ``(total + (128 + low) * sum of the weight) * (channel * scale) + poison + bias``, the sum only where
    ``low`` is given; and the gradient of the input: ``total * sample``, a factor for each sample.
    """

    channel: Tensor | None = None
    scale: Tensor | None = None
    poison: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None
    sample: Tensor | None = None


class Tile(NamedTuple):
    """Pixels and result channels of a program, bytes that a product sums over, and how it is run."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int


def tile_for(pixels: int, channels: int, depth: int, joined: int, floats: bool) -> Tile:
    """For a product of that many pixels and channels; depth: of one tap, or of all where taps are joined.

    floats: pixels are quantized on the way, best for as many channels as registers hold the results of.
    Chosen among ten tiles each for the convolutions of ResNet-50 on an H100.
    """
    deep = 128 if not floats and (depth % 128 == 0 or depth > 512) else 64 if depth > 32 else 32
    wide = min(256 if floats and depth >= 256 else 128, max(16, power_of_two(channels)))
    tall = min(64 if floats else 128, max(16, power_of_two(pixels)))
    while tall > 64 and blocks_of(pixels, tall) * blocks_of(channels, wide) < MULTIPROCESSORS:
        tall //= 2
    if joined:  # addresses of single words take most registers
        return Tile(tall, min(wide, 64), min(deep, 64 if joined % 4 == 0 else 32), 8, 3)
    return Tile(tall, wide, deep, 4, 3 if deep == 128 or floats else 4)


MULTIPROCESSORS = 132
"""Of an H100: with fewer programs, some would have none."""

_FEW_BYTES = 32
"""Of a pixel, of fewer, taps are joined to one depth, as a product sums over 32 bytes at least."""


def convolve(
    image: Tensor,
    padding: Tensor | None,
    weight: Tensor,
    source: Sequence[int],
    result: Sequence[int],
    kernel: Sequence[int],
    groups: int,
    phases: Sequence[Phase],
    scales: Scales,
    dtype: torch.dtype,
    bits: int = 0,
) -> Tensor:
    """The convolution as (N, *spatial, channels) in ``dtype``.

    image: int8, (N, *source, groups * row).  padding: int8, at least (row,), what lies outside it.
    weight: int8, (groups * channels, taps, row).  result: (N, *spatial, groups * channels).
    bits: where ``image`` is float, those of its codes. There is one tap then and no padding, scales.low is given, and
    where a value is not finite, the kernel writes NaN into scales.poison and the results are not poisoned yet.
    """
    out = torch.empty(list(result), dtype=dtype, device=image.device)
    results, taps, row = weight.shape
    channels = results // groups
    samples, *lengths = result[:-1]
    for phase in phases:
        pixels = samples * prod(phase.results)
        joined = row if row < _FEW_BYTES else 0
        tile = tile_for(pixels, channels, prod(phase.taps) * row if joined else row, joined, bits > 0)
        grid = (groups * blocks_of(pixels, tile.pixels) * blocks_of(channels, tile.channels),)
        _convolve[grid](
            image,
            padding,
            weight,
            _sums(weight, kernel, phase) if scales.low is not None and bits in (0, 8) else None,
            *scales,
            out,
            pixels,
            channels,
            row,
            taps,
            groups,
            triple(source),
            triple(lengths),
            triple(kernel),
            phase,
            BITS=bits,
            STEP=bit_format(bits).step if bits else 1,
            JOINED=joined,
            WHOLE=row % tile.depth == 0,
            PIXELS=tile.pixels,
            CHANNELS=tile.channels,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
    return out


def poison_(out: Tensor, poison: Tensor) -> None:
    """Make all results NaN where ``poison`` is; otherwise read no more than that."""
    grid = (4 * MULTIPROCESSORS,)
    _poison[grid](out, poison, out.numel(), BLOCK=1024)


def _sums(weight: Tensor, kernel: Sequence[int], phase: Phase) -> Tensor:
    """The sum of the weight over the taps of a phase: int32, one a result channel."""
    results, taps, row = weight.shape
    sums = torch.empty(results, dtype=torch.int32, device=weight.device)
    sizes = (taps, row, triple(kernel), phase.tap_first, phase.tap_every, phase.taps)
    grid = (results,)
    _sum_taps[grid](weight, sums, *sizes, BLOCK=1024)
    return sums


_GROUPED = 8
"""Blocks of pixels that go through all blocks of channels together, so that the cache keeps both."""


@triton.jit
def _poison(out, poison, count, BLOCK: tl.constexpr):
    value = tl.load(poison)
    if value != value:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _sum_taps(weight, sums, taps, row, kernel, first, every, tap_count, BLOCK: tl.constexpr):
    """One result channel a program."""
    channel = tl.program_id(0)
    count = tap_count[0] * tap_count[1] * tap_count[2] * row
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, y, x = tap_of(at // row, tap_count)
        place = weight_tap(z, y, x, first, every, kernel) * row + at % row
        total += tl.load(weight + channel.to(tl.int64) * taps * row + place, mask=at < count, other=0).to(tl.int32)
    tl.store(sums + channel, tl.sum(total))


@triton.jit(do_not_specialize=["pixels", "taps"])
def _convolve(
    image,
    padding,
    weight,
    sums,
    channel_scale,
    scale,
    poison,
    bias,
    low,
    sample_scale,
    out,
    pixels,
    channels,
    row,
    taps,
    groups,
    source,
    lengths,
    kernel,
    phase,
    BITS: tl.constexpr,  # of float activations, otherwise 0
    STEP: tl.constexpr,
    JOINED: tl.constexpr,  # bytes of a pixel where taps are joined, otherwise 0
    WHOLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    origin, step, tap_step, first, every, results, tap_first, tap_every, tap_count = phase
    program = tl.program_id(0)
    group = program % groups
    block_m, block_n = _block(program // groups, tl.cdiv(pixels, PIXELS), tl.cdiv(channels, CHANNELS))

    width = row
    if JOINED > 0:
        width = JOINED  # known when compiling, so that whole words are loaded
    pixel_row = width * groups
    image += group * width
    pixel = block_m * PIXELS + tl.arange(0, PIXELS)
    real = pixel < pixels
    sample, z, y, x = pixel_of(pixel, results)
    source_z, source_y, source_x = origin[0] + z * step[0], origin[1] + y * step[1], origin[2] + x * step[2]
    sample_place = sample.to(tl.int64) * source[0] * source[1] * source[2] * pixel_row

    channel = block_n * CHANNELS + tl.arange(0, CHANNELS)
    real_channel = channel < channels
    weight_row = weight + (group * channels + tl.where(real_channel, channel, 0)).to(tl.int64) * (taps * width)

    inner = tl.arange(0, DEPTH)
    total = tl.zeros((PIXELS, CHANNELS), tl.int32)
    if JOINED > 0:
        depth = tap_count[0] * tap_count[1] * tap_count[2] * JOINED
        for begin in range(0, depth, DEPTH):
            summed = begin + inner
            tap_z, tap_y, tap_x = tap_of(summed // JOINED, tap_count)
            byte = summed % JOINED
            at_z = source_z[:, None] + (tap_z * tap_step[0])[None, :]
            at_y = source_y[:, None] + (tap_y * tap_step[1])[None, :]
            at_x = source_x[:, None] + (tap_x * tap_step[2])[None, :]
            place, inside = place_in(at_z, at_y, at_x, source)
            inside = inside & real[:, None] & (summed < depth)[None, :]
            start = tl.where(inside, image + (sample_place[:, None] + place * pixel_row), padding)
            a = tl.load(start + byte[None, :])
            at = weight_tap(tap_z, tap_y, tap_x, tap_first, tap_every, kernel) * JOINED + byte
            b = tl.load(weight_row[None, :] + at[:, None], mask=(summed < depth)[:, None], other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    elif BITS > 0:
        low_code, inverse = tl.load(low), tl.div_rn(1.0, tl.load(scale))
        largest = tl.zeros((PIXELS,), tl.int32)
        place = place_of(source_z, source_y, source_x, source)
        start = image + tl.where(real, sample_place + place * pixel_row, 0)
        for begin in range(0, row, DEPTH):
            byte = begin + inner
            if WHOLE:
                value = widened(tl.load(start[:, None] + byte[None, :]))
                b = tl.load(weight_row[None, :] + byte[:, None])
            else:
                value = widened(tl.load(start[:, None] + byte[None, :], mask=(byte < row)[None, :], other=0.0))
                b = tl.load(weight_row[None, :] + byte[:, None], mask=(byte < row)[:, None], other=0)
            largest = tl.maximum(largest, tl.max(size_bits(value), 1))
            a = quantized_byte(value, inverse, low_code, BITS, STEP)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        tl.store(poison, float("nan"), mask=tl.max(largest) >= INFINITY)
    else:
        blocks = tl.cdiv(row, DEPTH)
        place = place_of(source_z, source_y, source_x, source)
        pixel_start = image + (sample_place + place * pixel_row)  # a tap is as far from it for every pixel
        for turn in range(tap_count[0] * tap_count[1] * tap_count[2] * blocks):
            tap = turn // blocks
            byte = (turn - tap * blocks) * DEPTH + inner
            tap_z, tap_y, tap_x = tap_of(tap, tap_count)
            step_z, step_y, step_x = tap_z * tap_step[0], tap_y * tap_step[1], tap_x * tap_step[2]
            inside = is_in(source_z + step_z, source_y + step_y, source_x + step_x, source)
            distance = place_of(step_z, step_y, step_x, source) * pixel_row
            start = tl.where(real & inside, pixel_start + distance, padding)
            at = weight_tap(tap_z, tap_y, tap_x, tap_first, tap_every, kernel) * row + byte
            if WHOLE:
                a = tl.load(start[:, None] + byte[None, :])
                b = tl.load(weight_row[None, :] + at[:, None])
            else:
                a = tl.load(start[:, None] + byte[None, :], mask=(byte < row)[None, :], other=0)
                b = tl.load(weight_row[None, :] + at[:, None], mask=(byte < row)[:, None], other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)

    channel += group * channels
    if sums is not None:
        offset = (tl.load(low) + 128.0).to(tl.int32)
        total += (offset * tl.load(sums + channel, mask=real_channel, other=0))[None, :]
    scales = (channel_scale, scale, None if BITS > 0 else poison, bias, sample_scale)
    at = (sample, z, y, x, channel, real, real_channel, channels * groups)
    store_results(out, total, at, scales, lengths, first, every)


@triton.jit
def _block(program, rows, columns, GROUPED: tl.constexpr = _GROUPED):
    """(row, column) of a program's block: a few rows go through all columns before the next rows begin."""
    width = GROUPED * columns
    first = program // width * GROUPED
    height = min(rows - first, GROUPED)
    inside = program % width
    return first + inside % height, inside // height
