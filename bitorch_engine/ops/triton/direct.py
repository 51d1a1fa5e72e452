"""Integer convolution of groups with few channels, as a depthwise one: one product after the other, no matrices.

Packed weights and packed codes are read as they are, a few bytes a product. What such layers cost is reading the map
and writing the result, both once.
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
from bitorch_engine.ops.triton.bits import load_index
from bitorch_engine.ops.triton.convolve import Scales
from bitorch_engine.ops.triton.geometry import Phase, triple
from bitorch_engine.ops.triton.launch import blocks_of
from bitorch_engine.ops.triton.pixels import pixel_of, place_in, store_results, tap_of, weight_tap

interpreter.repair()

_PIXELS, _CHANNELS = 64, 32


class Operand(NamedTuple):
    """A map of integers, channels last: packed indices and their format, or plain int8 codes where bits is 0."""

    values: Tensor
    bits: int = 0
    low: Tensor | None = None


def convolve_directly(
    operand: Operand,
    packed: Tensor,
    w_bit: int,
    source: Sequence[int],
    result: Sequence[int],
    kernel: Sequence[int],
    groups: int,
    inputs: int,
    outputs: int,
    phases: Sequence[Phase],
    scales: Scales,
    dtype: torch.dtype,
) -> Tensor:
    """The convolution as (N, *spatial, groups * results) in ``dtype``; arguments as of ``convolve``.

    packed: the weight, rows of output channels.  inputs, outputs: channels of a group of the layer; the sum is over
    inputs in the forward product, which has scales for channels, and over outputs in the gradient of the input.
    """
    out = torch.empty(list(result), dtype=dtype, device=packed.device)
    form, step = bit_format(w_bit), bit_format(operand.bits).step if operand.bits else 1
    samples, *lengths, channels = result
    values = operand.values.contiguous()
    packed = packed.contiguous()
    for phase in phases:
        pixels = samples * prod(phase.results)
        grid = (blocks_of(channels, _CHANNELS) * blocks_of(pixels, _PIXELS),)
        _convolve_directly[grid](
            values,
            operand.low,
            packed,
            scales.channel,
            scales.scale,
            scales.poison,
            scales.bias,
            scales.sample,
            out,
            pixels,
            channels,
            groups,
            inputs,
            outputs,
            prod(kernel),
            triple(source),
            triple(lengths),
            triple(kernel),
            phase,
            BITS=operand.bits,
            STEP=step,
            W_BITS=w_bit,
            W_LOW=form.low,
            W_STEP=form.step,
            PIXELS=_PIXELS,
            CHANNELS=_CHANNELS,
            enable_fp_fusion=False,
        )
    return out


@triton.jit(do_not_specialize=["pixels", "groups", "inputs", "outputs", "taps"])
def _convolve_directly(
    values,
    low,
    packed,
    channel_scale,
    scale,
    poison,
    bias,
    sample_scale,
    out,
    pixels,
    channels,
    groups,
    inputs,
    outputs,
    taps,
    source,
    lengths,
    kernel,
    phase,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    W_BITS: tl.constexpr,
    W_LOW: tl.constexpr,
    W_STEP: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    origin, step, tap_step, first, every, results, tap_first, tap_every, tap_count = phase
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    pixel = program // blocks * PIXELS + tl.arange(0, PIXELS)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real, real_channel = pixel < pixels, channel < channels
    sample, z, y, x = pixel_of(pixel, results)
    source_z, source_y, source_x = origin[0] + z * step[0], origin[1] + y * step[1], origin[2] + x * step[2]
    sample_place = sample.to(tl.int64) * source[0] * source[1] * source[2]

    if channel_scale is not None:  # a result channel is a row of the weight
        summed, group = inputs, channel // outputs
        weight_first, weight_step = channel * inputs, 1
    else:
        summed, group = outputs, channel // inputs
        weight_first, weight_step = group * outputs * inputs + channel % inputs, inputs
    low_code = 0
    if BITS > 0:
        low_code = tl.load(low).to(tl.int32)

    total = tl.zeros((PIXELS, CHANNELS), tl.int32)
    for turn in range(tap_count[0] * tap_count[1] * tap_count[2] * summed):
        tap, term = turn // summed, turn % summed
        tap_z, tap_y, tap_x = tap_of(tap, tap_count)
        at_z, at_y = source_z + tap_z * tap_step[0], source_y + tap_y * tap_step[1]
        at, inside = place_in(at_z, at_y, source_x + tap_x * tap_step[2], source)
        place = (sample_place + at)[:, None] * (groups * summed) + (group * summed + term)[None, :]
        mask = (real & inside)[:, None] & real_channel[None, :]
        if BITS == 0:
            code = tl.load(values + place, mask=mask, other=0).to(tl.int32)
        elif BITS == 8:
            code = tl.where(mask, tl.load(values + place, mask=mask, other=0).to(tl.int32) + low_code, 0)
        else:
            code = tl.where(mask, load_index(values, place, mask, BITS) * STEP + low_code, 0)
        weight_at = weight_tap(tap_z, tap_y, tap_x, tap_first, tap_every, kernel)
        weight_at += (weight_first + term * weight_step).to(tl.int64) * taps
        weight = load_index(packed, weight_at, real_channel, W_BITS) * W_STEP + W_LOW
        total += code * weight[None, :]

    scales = (channel_scale, scale, poison, bias, sample_scale)
    at = (sample, z, y, x, channel, real, real_channel, channels)
    store_results(out, total, at, scales, lengths, first, every)
