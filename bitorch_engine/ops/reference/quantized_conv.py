"""Convolutions of packed weights with quantized activations, and the gradients, quantized or float.

Ops take a weight as its packed codes (``bits.packing``, rows of output channels), and the geometry as the fields of
``Convolution``, after the weight's shape. A linear layer is the convolution of (M, K, 1) by (N, K, 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitorch_engine.ops.reference.activation import (
    activation_codes,
    activation_values,
    quantize_activation,
    unpack_activation,
)
from bitorch_engine.ops.reference.conv import Convolution, multiply_exact
from bitorch_engine.ops.reference.layout import in_memory_format, is_channels_last, new_output


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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
) -> Tensor:
    """Quantize activations (N, C, *spatial) and convolve them: dtype and memory order of ``x``. Without gradient.

    scale, low: of the activation quantizer, 0-dim float32.  channel_scale: float32, one an output channel.
    """
    codes, _, poison = quantize_activation(x, scale, low, a_bit)
    geometry = (weight_shape, stride, padding, dilation, transposed, output_padding, groups, pad)
    y = conv_codes(
        codes,
        x.shape,
        scale,
        low,
        poison,
        a_bit,
        packed,
        channel_scale,
        w_bit,
        *geometry,
        torch.float32,
        is_channels_last(x),
    )
    if bias is not None:
        y = y + bias.to(torch.float32).view(-1, *[1] * (x.dim() - 2))
    return y.to(x.dtype)


def conv_fake(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
) -> Tensor:
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    return new_output(x, geometry.output_shape(x.shape, weight_shape), x.dtype, is_channels_last(x))


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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Convolve activations of ``shape`` that are quantized already: codes and poison of ``quantize_activation``.

    The integer total is exact; then float32(total) * (channel_scale * scale) + poison, in ``dtype``.
    """
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    activation = activation_codes(unpack_activation(codes, a_bit, shape), low, a_bit)
    weight = geometry.weight_codes(packed, w_bit, weight_shape)
    products = weight.numel() // max(1, channel_scale.numel())
    total = multiply_exact(geometry.forward, activation, weight, products << (w_bit - 1 + a_bit))
    per_channel = channel_scale.view(-1, *[1] * (len(shape) - 2)) * scale
    return in_memory_format((total.to(torch.float32) * per_channel + poison).to(dtype), channels_last)


def conv_codes_fake(
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    return new_output(codes, geometry.output_shape(shape, weight_shape), dtype, channels_last)


def conv_grad_input(
    grad_codes: Tensor,
    grad_scale: Tensor,
    packed: Tensor,
    w_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The gradient of an input of ``shape``: float32(exact integer total) * grad_scale, in ``dtype``.

    grad_codes, grad_scale: of ``quantize_gradient`` with keep=0 and the weight's channel scale as the factor.
    """
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    weight = geometry.weight_codes(packed, w_bit, weight_shape)
    total = multiply_exact(
        lambda g, w: geometry.grad_input(g, w, shape),
        grad_codes.movedim(-1, 1),
        weight,
        (weight.numel() // max(1, shape[1])) << (w_bit - 1 + 8),
    )
    return in_memory_format((total.to(torch.float32) * grad_scale).to(dtype), channels_last)


def conv_grad_input_fake(
    grad_codes: Tensor,
    grad_scale: Tensor,
    packed: Tensor,
    w_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return new_output(grad_codes, shape, dtype, channels_last)


def conv_grad_weight(
    grad_codes: Tensor,
    grad_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a weight of ``weight_shape``: float32(exact integer total) * (grad_scale * scale), in ``dtype``.

    grad_codes, grad_scale: of ``quantize_gradient`` with keep=1.  codes: of ``quantize_activation``, of ``shape``.
    """
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    activation = activation_codes(unpack_activation(codes, a_bit, shape), low, a_bit)
    total = multiply_exact(
        lambda g, a: geometry.grad_weight(g, a, weight_shape),
        grad_codes.movedim(-1, 1),
        activation,
        (grad_codes.numel() // max(1, grad_codes.shape[-1])) << (a_bit + 8 - 1),
    )
    factor = geometry.per_output_channel((grad_scale * scale).view(-1), weight_shape)
    return (total.to(torch.float32) * factor).to(dtype).contiguous()


def conv_grad_weight_fake(
    grad_codes: Tensor,
    grad_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return grad_codes.new_empty(weight_shape, dtype=dtype)


def conv_grad_weight_float(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The gradient of a weight of ``weight_shape`` from a float gradient, (N, C_out, *out), in ``dtype``.

    codes: of ``quantize_activation``, of ``shape``.  channels_last: the memory order of that activation, which may
    decide what is faster.
    """
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    values = activation_values(codes, scale, low, a_bit, shape, grad.dtype, channels_last)
    return geometry.grad_weight(grad, values, weight_shape).to(dtype)


def conv_grad_weight_float_fake(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return grad.new_empty(weight_shape, dtype=dtype)


def conv_grad_weight_dense(
    grad: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
) -> Tensor:
    """The gradient of a weight of ``weight_shape`` from a float gradient and a float input, (N, C, *spatial)."""
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    return geometry.grad_weight(grad, x, weight_shape)


def conv_grad_weight_dense_fake(
    grad: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    pad: Sequence[int],
) -> Tensor:
    return grad.new_empty(weight_shape)
