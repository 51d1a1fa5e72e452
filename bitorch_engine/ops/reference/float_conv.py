"""Convolutions with packed weights and float activations."""

from collections.abc import Sequence

from torch import Tensor

from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import in_memory_format, is_channels_last

FEW_CHANNELS = 32
"""Channels of a pixel up to which a backend may be faster than torch's convolution: beyond them F.conv2d and its kin
do not ask it, and layers do for what they repeat."""


def conv_weight_only(
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
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
    """``x``, (N, C, *spatial) float, convolved with the weight codes * scale, rounded to its dtype, plus the bias.

    channel_scale: one an output channel.  The result has x's dtype, and torch's memory order for a weight in x's.
    """
    geometry = Convolution(stride, padding, dilation, transposed, output_padding, groups, pad)
    codes = geometry.weight_codes(packed, bits, weight_shape)
    weight = (codes.float() * geometry.per_output_channel(channel_scale.float(), weight_shape)).to(x.dtype)
    return convolve(geometry, x, weight, bias)


def convolve(geometry: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` convolved with a weight of its dtype by torch, plus the bias; torch's memory order for a weight in x's."""
    bias = None if bias is None else bias.to(x.dtype)
    return geometry.forward(x, in_memory_format(weight, is_channels_last(x)), bias)


def conv_weight_only_fake(
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
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
    return geometry.forward(x, in_memory_format(x.new_empty(weight_shape), is_channels_last(x)))
