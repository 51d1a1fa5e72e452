"""Packed weights with float activations: a block of output channels at a time becomes float, never the whole weight."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.cpu.bits import unpack
from bitorch_engine.ops.cpu.loading import DTYPES, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.reference import linear as reference
from bitorch_engine.ops.reference.conv import Convolution

_linear = function("be_linear", POINTER, INT64, POINTER, POINTER, POINTER, INT64, INT64, INT, POINTER, INT)

_FEW = 8
"""Rows of activations up to which decoding the weight once a row is faster than a float matrix product."""

BLOCK = 1 << 20
"""Weights that are float at a time, at most; one output channel is the least."""


def linear_weight_only(
    x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group_size: int = 0
) -> Tensor:
    rows = channel_scale.shape[0] if group_size else channel_scale.numel()
    few = x.numel() // max(1, columns)
    if 0 < few <= _FEW and group_size == 0 and columns and columns * bits % 8 == 0 == columns % 8 and x.dtype in DTYPES:
        return _few_rows(x, few, packed, channel_scale, bits, bias, columns)
    block = max(1, BLOCK // max(1, columns))
    if rows <= block or columns == 0:
        return reference.linear_weight_only(x, packed, channel_scale, bits, bias, columns, group_size)
    reference.check_groups(channel_scale, columns, group_size)
    scale = channel_scale.reshape(rows, -1)
    bias = None if bias is None else bias.to(x.dtype)
    out = x.new_empty([*x.shape[:-1], rows])
    for first in range(0, rows, block):
        last = min(first + block, rows)
        weight = reference.scaled(_codes(packed, bits, first, last, columns), scale[first:last], group_size).to(x.dtype)
        out[..., first:last] = F.linear(x, weight, None if bias is None else bias[first:last])
    return out


def _few_rows(
    x: Tensor, few: int, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int
) -> Tensor:
    """Each row of codes is decoded in registers, and multiplied as it comes from memory."""
    wide, scale = x.to(torch.float32).contiguous(), channel_scale.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = torch.empty([*x.shape[:-1], scale.numel()], dtype=torch.float32)
    _linear(
        wide.data_ptr(),
        few,
        packed.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        scale.numel(),
        columns,
        bits,
        out.data_ptr(),
        threads(),
    )
    return out.to(x.dtype)


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
    """The convolution of x with ``codes * channel_scale``, plus bias, in x's dtype. Geometry as in ``Convolution``."""
    x = F.pad(x, pad) if pad else x
    rows = channel_scale.numel()
    per_group, kernel = rows // groups, weight_shape[2:]
    inputs = x.shape[1] // groups
    columns = inputs * math.prod(kernel)
    scale, parts = channel_scale.reshape(rows, 1), []
    block = max(1, BLOCK // max(1, columns))
    # Whole groups where one fits, otherwise a part of one.
    step = block // per_group * per_group or min(block, per_group)
    first = 0
    while first < rows:
        group = first // per_group
        last = min(first + step, rows if step >= per_group else (group + 1) * per_group)
        count = max(1, (last - first) // per_group)
        weight = reference.scaled(_codes(packed, bits, first, last, columns), scale[first:last], 0).to(x.dtype)
        weight = weight.view(count, -1, inputs, *kernel)
        weight = (weight.transpose(1, 2) if transposed else weight).flatten(0, 1)
        geometry = Convolution(stride, padding, dilation, transposed, output_padding, count)
        parts.append(geometry.forward(x[:, group * inputs : (group + count) * inputs], weight))
        first = last
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out.add_(bias.to(x.dtype).view(-1, *[1] * len(kernel)))


def _codes(packed: Tensor, bits: int, first: int, last: int, columns: int) -> Tensor:
    """Rows first .. last - 1: int8. The stream is cut where a group of eight values, so a byte, begins."""
    start, end = first * columns // 8 * 8, last * columns
    index = unpack(packed[start // 8 * bits : (end * bits + 7) // 8], bits, end - start)
    return bit_format(bits).codes(index[first * columns - start :]).view(last - first, columns)
