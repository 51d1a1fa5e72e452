"""Activations as codes of 1 to 8 bits, and the gradients of that; ``quantizers.activation`` sets their scales."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format, pack, packed_size, unpack
from bitorch_engine.ops.reference.layout import channels_last_shape, in_memory_format, is_channels_last, new_output


def quantize_activation(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, beyond, poison) of activations (N, C, *spatial).

    codes: the index of each, packed in ``bits`` bits, in channels-last order.  beyond: one more bit each, packed in the
    same order; see ``activation_index``.  poison: 0-dim float32, 0, or NaN where a value was not finite. Codes have no
    NaN: added to what is computed from them, it keeps a network that has diverged from going on as if nothing were.
    """
    index, beyond = activation_index(x, scale, low, bits)
    poison = x.new_zeros((), dtype=torch.float32)
    if x.numel():
        poison = sum((extreme.to(torch.float32) * 0 for extreme in x.aminmax()), poison)
    return pack(index.movedim(1, -1), bits, check=False), pack(beyond.movedim(1, -1), 1, check=False), poison


def quantize_activation_fake(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, beyond = (x.new_empty(packed_size(x.numel(), width), dtype=torch.uint8) for width in (bits, 1))
    return codes, beyond, x.new_empty((), dtype=torch.float32)


def activation_values(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The values, code * scale, of packed codes: (N, C, *spatial), memory in channels-last order or in the shape's."""
    values = activation_codes(unpack_activation(codes, bits, shape), low, bits) * scale
    return in_memory_format(values.to(dtype), channels_last)


def activation_values_fake(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return new_output(codes, shape, dtype, channels_last)


def activation_grads(grad: Tensor, codes: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of the float activation and of the scale, from the gradient of the quantized activation.

    grad: (N, C, *spatial).  codes, beyond: packed, from ``quantize_activation``.  See ``straight_through``.
    """
    index, outside = (unpack_activation(packed, width, grad.shape) for packed, width in ((codes, bits), (beyond, 1)))
    grad_x, scale_grad = straight_through(grad, index, outside, low, bits)
    return in_memory_format(grad_x, is_channels_last(grad)), scale_grad


def activation_grads_fake(grad: Tensor, codes: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return new_output(grad, grad.shape, grad.dtype, is_channels_last(grad)), grad.new_empty((), dtype=torch.float32)


def unpack_activation(codes: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The index of each activation: uint8, (N, C, *spatial), a view of channels-last memory."""
    return unpack(codes, bits, prod(shape)).view(channels_last_shape(shape)).movedim(-1, 1)


def activation_index(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(index, beyond) of activations, both uint8 of the shape of ``x``.

    beyond: 1 where x / scale is above its code, for the lowest code where it is below (at 1 bit: farther out). With the
    index it tells exactly which elements were clipped, and for the others which way they were rounded.
    NaN becomes the code 0 (at 1 bit, +1). x / scale is taken as x times the float32 nearest to 1 / scale: on every
    processor a multiplication is many times as fast as a division.
    """
    form = bit_format(bits)
    ratio = torch.nan_to_num(x.to(torch.float32) * (1 / scale), nan=0.0)
    if bits == 1:
        return (ratio >= 0).to(torch.uint8), (ratio.abs() > 1).to(torch.uint8)
    index = (ratio.round() - low).clamp(0, form.levels - 1)
    beyond = torch.where(index == 0, ratio < low, ratio > index + low)
    return index.to(torch.uint8), beyond.to(torch.uint8)


def activation_codes(index: Tensor, low: Tensor, bits: int) -> Tensor:
    """The codes, integer-valued float32, of an index: multiply by the scale to get the values."""
    return index.to(torch.float32) * bit_format(bits).step + low


def straight_through(grad: Tensor, index: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of the float activation and of the scale, from the gradient of the quantized activation.

    grad: as x, float.  index, beyond: from ``activation_index``.
    Straight through inside the range, zero where x was clipped (at 1 bit: |x| > scale).
    The scale's gradient is the code where x was clipped, and round(x/s) - x/s elsewhere (Esser et al., equation 3), of
    which what is kept tells the sign: it enters with its mean size, 1/4, and with 0 in the lowest code, where a ReLU
    puts its exact zeros. At 1 bit it is the code, as the scale is the size of every element. The sum is scaled by
    1 / sqrt(features * high), section 2.2.
    """
    form = bit_format(bits)
    codes = activation_codes(index, low, bits)
    clipped = (beyond != 0) & ((index == 0) | (index == form.levels - 1))
    error = torch.where(index == 0, 0.0, 0.25 - 0.5 * beyond)
    slope = codes if bits == 1 else torch.where(clipped, codes, error)
    scale_grad = (grad.to(torch.float32) * slope).sum() * scale_grad_factor(grad.shape, low, bits)
    return torch.where(clipped, 0.0, grad).to(grad.dtype), scale_grad


def scale_grad_factor(shape: Sequence[int], low: Any, bits: int) -> Any:
    """1 / sqrt(features * high), for ``low`` as a number or a tensor."""
    form = bit_format(bits)
    features = max(1, prod(shape[1:]))
    return (features * (low + (form.levels - 1) * form.step)) ** -0.5
