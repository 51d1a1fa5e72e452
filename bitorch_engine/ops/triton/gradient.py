"""Gradients as integers of 2 to 8 bits. Memory in channels-last order saves a copy.

Two passes over (N, *spatial, C): the largest magnitude of each sample or channel, then the rounding.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitorch_engine.ops.reference import gradient as reference
from bitorch_engine.ops.triton.activation import DTYPES
from bitorch_engine.ops.triton.bits import MOST_IN_INT32
from bitorch_engine.ops.triton.floats import widened
from bitorch_engine.ops.triton.launch import blocks_of, power_of_two
from bitorch_engine.ops.triton.noise import hash32, uniform24

_TILE = 2048
"""Elements that a program works on at a time."""

_TURNS = 32
"""Tiles of a sample that one program looks through for the largest: they share its atomic operations."""


def quantize_gradient(
    grad: Tensor, channel_factor: Tensor | None, bits: int, keep: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    if grad.dtype not in DTYPES or not 0 < grad.numel() <= 1 << 32:  # beyond, noise takes another hash
        return reference.quantize_gradient(grad, channel_factor, bits, keep, seed)
    samples, channels, pixels = grad.shape[0], grad.shape[1], prod(grad.shape[2:])
    if channels * pixels > MOST_IN_INT32:
        return reference.quantize_gradient(grad, channel_factor, bits, keep, seed)
    last = grad.movedim(1, -1).contiguous()
    factor = None if channel_factor is None else channel_factor.contiguous()
    width = min(power_of_two(channels), _TILE)
    height = min(power_of_two(pixels), _TILE // width)
    largest = grad.new_zeros(grad.shape[keep], dtype=torch.int32)
    # For a scale a channel, pixels of all samples are alike.
    parts, length = (1, samples * pixels) if keep == 1 and grad.numel() <= MOST_IN_INT32 else (samples, pixels)
    tall = min(power_of_two(length), _TILE // width)
    grid = (parts * blocks_of(length, tall * _TURNS), blocks_of(channels, width))
    _largest[grid](last, factor, largest, channels, length, KEEP=keep, TURNS=_TURNS, HEIGHT=tall, WIDTH=width)
    grid = (samples * blocks_of(pixels, height), blocks_of(channels, width))
    codes = torch.empty_like(last, dtype=torch.int8)
    scale = grad.new_empty([length if d == keep else 1 for d, length in enumerate(grad.shape)], dtype=torch.float32)
    _round[grid](
        last, factor, largest, seed, codes, scale, channels, pixels,
        LIMIT=(1 << (bits - 1)) - 1, KEEP=keep, HEIGHT=height, WIDTH=width, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


@triton.jit
def _tile(channels, pixels, TURNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(sample, pixel, channel) of a program's first tile of TURNS: an int64 scalar, (HEIGHT, 1), (1, WIDTH)."""
    strips = tl.cdiv(pixels, TURNS * HEIGHT)
    sample = tl.program_id(0) // strips
    pixel = tl.program_id(0) % strips * (TURNS * HEIGHT) + tl.arange(0, HEIGHT)[:, None]
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return sample.to(tl.int64), pixel, channel


@triton.jit
def _load(grad, factor, sample, pixel, channel, channels, pixels):
    mask = (pixel < pixels) & (channel < channels)
    at = sample * channels * pixels + pixel * channels + channel
    value = widened(tl.load(grad + at, mask=mask, other=0.0))
    if factor is not None:
        value *= tl.load(factor + channel, mask=channel < channels, other=0.0)
    return value, at, mask


@triton.jit(do_not_specialize=["channels", "pixels"])
def _largest(
    grad, factor, largest, channels, pixels,
    KEEP: tl.constexpr, TURNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Magnitudes are compared as the bits of their floats, of which NaN has the largest."""
    sample, pixel, channel = _tile(channels, pixels, TURNS, HEIGHT, WIDTH)
    size = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for turn in range(TURNS):
        value, _, _ = _load(grad, factor, sample, pixel + turn * HEIGHT, channel, channels, pixels)
        size = tl.maximum(size, tl.abs(value).to(tl.int32, bitcast=True))
    most = tl.max(size, axis=0, keep_dims=True)
    if KEEP == 1:
        tl.atomic_max(largest + channel, most, mask=channel < channels)
    else:
        tl.atomic_max(largest + sample, tl.max(tl.max(most, axis=1), axis=0))


@triton.jit(do_not_specialize=["channels", "pixels"])
def _round(
    grad, factor, largest, seed, codes, scale, channels, pixels,
    LIMIT: tl.constexpr, KEEP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample, pixel, channel = _tile(channels, pixels, 1, HEIGHT, WIDTH)
    value, at, mask = _load(grad, factor, sample, pixel, channel, channels, pixels)
    kept = channel if KEEP == 1 else sample + tl.zeros((1, 1), tl.int64)
    there = kept < channels if KEEP == 1 else kept >= 0
    strips = (pixels + HEIGHT - 1) // HEIGHT
    worth = tl.load(largest + kept, mask=there, other=0).to(tl.float32, bitcast=True) * (1.0 / LIMIT)
    first = tl.program_id(0) == 0 if KEEP == 1 else (tl.program_id(0) % strips == 0) & (tl.program_id(1) == 0)
    tl.store(scale + kept, worth, mask=(there & first) != 0)
    inverse = tl.where(worth > 0, tl.minimum(tl.div_rn(1.0, worth), 3e38), 0.0)

    size = tl.abs(value) * inverse
    size = tl.minimum(tl.where(size == size, size, 0.0), LIMIT)
    place = (sample * channels * pixels).to(tl.uint32) + (channel * pixels + pixel).to(tl.uint32)
    noise = uniform24(hash32(place ^ tl.load(seed).to(tl.uint32, bitcast=True)))
    whole = size.to(tl.int32)
    code = whole + (noise < size - whole.to(tl.float32)).to(tl.int32)
    tl.store(codes + at, tl.where(value < 0, -code, code).to(tl.int8), mask=mask)
