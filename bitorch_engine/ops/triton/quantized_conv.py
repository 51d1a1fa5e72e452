"""Integer convolutions of packed weights on the GPU: forward, and the gradients of input and weight."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import channels_last_shape, in_memory_format, is_channels_last
from bitorch_engine.ops.triton.activation import quantize_activation
from bitorch_engine.ops.triton.bits import MOST_IN_INT32
from bitorch_engine.ops.triton.convolve import Scales, convolve, poison_
from bitorch_engine.ops.triton.direct import Operand, convolve_directly
from bitorch_engine.ops.triton.geometry import phases
from bitorch_engine.ops.triton.image import (
    image_of_codes,
    image_of_floats,
    row_length,
    taps_of_transposed,
    taps_of_weight,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEEPEST = 1 << 16  # products a result: up to here, 255 * 128 times as many fit 32 bits
_MOST_QUANTIZED = 512  # result channels of programs that quantize pixels: at most four do it to the same ones
_FEWEST = 4  # channels of a group, for the tensor cores


def suits(shape: Sequence[int], weight_shape: Sequence[int], convolution: Convolution, *dtypes: torch.dtype) -> bool:
    """Whether the kernels do a convolution of an input of ``shape``; otherwise the reference does.

    They have up to three spatial dimensions, float results of 16 or 32 bits, totals below 2**31 (at most 2**16 products
    each), pixels and the bytes of one sample that 32 bits count, and at least one of everything.
    """
    out = convolution.output_shape(shape, weight_shape)
    deepest = max(shape[1], out[1]) // convolution.groups * prod(weight_shape[2:])
    if len(shape) > 5 or min(*shape, *out) < 1 or not 0 < deepest < _DEEPEST or not set(dtypes) <= set(_DTYPES):
        return False
    sizes = [size for s in (shape, out) for size in (s[0] * prod(s[2:]), (s[1] + 16) * prod(s[2:]))]
    return max(sizes) <= MOST_IN_INT32


def conv(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    *fields: Any,
) -> Tensor:
    convolution = Convolution(*fields)
    if not (suits(x.shape, weight_shape, convolution, x.dtype) and _read_as_float32(scale, low, channel_scale)):
        return reference.conv(x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *fields)
    bias = bias if bias is None else bias.to(torch.float32).contiguous()
    if _is_narrow(x.shape, weight_shape, convolution):
        codes, _, poison = quantize_activation(x, scale, low, a_bit)
        scales = Scales(channel_scale.contiguous(), scale, poison, bias)
        operand = Operand(codes, a_bit, low)
        out = _forward_directly(operand, x.shape, packed, w_bit, weight_shape, convolution, scales, x.dtype)
        return _in_order(out, is_channels_last(x))
    if _is_pointwise(x.shape, weight_shape, convolution):
        poison = torch.zeros((), dtype=torch.float32, device=x.device)
        scales = Scales(channel_scale.contiguous(), scale, poison, bias, low)
        last = x.movedim(1, -1).contiguous()
        out = _forward(last, None, x.shape, packed, w_bit, weight_shape, convolution, scales, x.dtype, a_bit)
        poison_(out, poison)
        return _in_order(out, is_channels_last(x))
    row = row_length(x.shape[1], convolution.groups)
    image, padding, poison = image_of_floats(x, scale, low, a_bit, row)
    scales = Scales(channel_scale.contiguous(), scale, poison, bias, low if a_bit == 8 else None)
    out = _forward(image, padding, x.shape, packed, w_bit, weight_shape, convolution, scales, x.dtype)
    return _in_order(out, is_channels_last(x))


def conv_codes(
    codes: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    low: Tensor,
    poison: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    convolution = Convolution(*fields)
    if not (suits(shape, weight_shape, convolution, dtype) and _read_as_float32(scale, low, channel_scale)):
        return reference.conv_codes(
            codes, shape, scale, low, poison, a_bit, packed, channel_scale, w_bit, weight_shape, *rest
        )
    if _is_narrow(shape, weight_shape, convolution):
        scales, operand = Scales(channel_scale.contiguous(), scale, poison), Operand(codes, a_bit, low)
        out = _forward_directly(operand, shape, packed, w_bit, weight_shape, convolution, scales, dtype)
        return _in_order(out, channels_last)
    image, padding = image_of_codes(codes, shape, low, a_bit, row_length(shape[1], convolution.groups))
    scales = Scales(channel_scale.contiguous(), scale, poison, low=low if a_bit == 8 else None)
    out = _forward(image, padding, shape, packed, w_bit, weight_shape, convolution, scales, dtype)
    return _in_order(out, channels_last)


def conv_grad_input(
    grad_codes: Tensor,
    grad_scale: Tensor,
    packed: Tensor,
    w_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    c = Convolution(*fields)
    if not suits(shape, weight_shape, c, dtype) or grad_scale.dtype != torch.float32:
        return reference.conv_grad_input(grad_codes, grad_scale, packed, w_bit, shape, weight_shape, *rest)
    outputs, inputs = grad_codes.shape[-1] // c.groups, shape[1] // c.groups
    places = (grad_codes.shape[1:-1], channels_last_shape(shape), weight_shape[2:], c.groups)
    lines = phases(shape[2:], weight_shape[2:], c, scatter=not c.transposed)
    scales = Scales(sample=grad_scale.contiguous())
    if _is_narrow(shape, weight_shape, c):
        operand, channels = Operand(grad_codes), (inputs, outputs)
        out = convolve_directly(operand, packed, w_bit, *places, *channels, lines, scales, dtype)
        return _in_order(out, channels_last)
    weight = taps_of_transposed(packed, w_bit, c.groups, outputs, inputs, prod(weight_shape[2:]), outputs)
    padding = grad_codes.new_zeros(outputs)
    out = convolve(grad_codes.contiguous(), padding, weight, *places, lines, scales, dtype)
    return _in_order(out, channels_last)


def _forward(
    image: Tensor,
    padding: Tensor | None,
    shape: Sequence[int],
    packed: Tensor,
    w_bit: int,
    weight_shape: Sequence[int],
    c: Convolution,
    scales: Scales,
    dtype: torch.dtype,
    bits: int = 0,
) -> Tensor:
    """image, padding: of the input of ``shape``.  bits: as of ``convolve``."""
    out = c.output_shape(shape, weight_shape)
    row = (shape[1] if padding is None else padding.numel()) // c.groups
    weight = taps_of_weight(
        packed, w_bit, c.groups, out[1] // c.groups, shape[1] // c.groups, prod(weight_shape[2:]), row
    )
    places = (shape[2:], channels_last_shape(out), weight_shape[2:], c.groups)
    lines = phases(out[2:], weight_shape[2:], c, scatter=c.transposed)
    return convolve(image, padding, weight, *places, lines, scales, dtype, bits)


def _forward_directly(
    operand: Operand,
    shape: Sequence[int],
    packed: Tensor,
    w_bit: int,
    weight_shape: Sequence[int],
    c: Convolution,
    scales: Scales,
    dtype: torch.dtype,
) -> Tensor:
    out = c.output_shape(shape, weight_shape)
    places = (shape[2:], channels_last_shape(out), weight_shape[2:], c.groups)
    lines = phases(out[2:], weight_shape[2:], c, scatter=c.transposed)
    channels = (shape[1] // c.groups, out[1] // c.groups)
    return convolve_directly(operand, packed, w_bit, *places, *channels, lines, scales, dtype)


def _is_narrow(shape: Sequence[int], weight_shape: Sequence[int], c: Convolution) -> bool:
    """Whether groups have so few channels, as in a depthwise convolution, that a matrix would be mostly filling."""
    return c.groups > 1 and min(shape[1], c.output_shape(shape, weight_shape)[1]) // c.groups < _FEWEST


def _is_pointwise(shape: Sequence[int], weight_shape: Sequence[int], c: Convolution) -> bool:
    """Whether each result needs one pixel, and few programs need the same: then these quantize it, and no image of it
    is written and read. Pixels of 32 channels and more, the depth of a product, and of a multiple of 16: whole words.
    """
    one_tap = prod(weight_shape[2:]) == 1 and not any(c.padding) and not any(c.pad) and not c.transposed
    channels = shape[1]
    return one_tap and c.groups == 1 and channels >= 32 and channels % 16 == 0 and weight_shape[0] <= _MOST_QUANTIZED


def _in_order(out: Tensor, channels_last: bool) -> Tensor:
    """(N, C, *spatial), in that order or in channels-last order, of (N, *spatial, C)."""
    values = out.movedim(-1, 1)
    return values if channels_last else in_memory_format(values, False)


def _read_as_float32(scale: Tensor, low: Tensor, channel_scale: Tensor) -> bool:
    """Whether the kernels read these as they lie in memory; in a layer that was cast, they do not."""
    return {scale.dtype, low.dtype, channel_scale.dtype} == {torch.float32}
