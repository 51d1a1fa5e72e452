"""Packing and unpacking; ``bits.packing`` defines them."""

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format, packed_size
from bitorch_engine.bits import pack as _pack
from bitorch_engine.bits import unpack as _unpack


def pack(values: Tensor, bits: int) -> Tensor:
    """The packed bytes of ``values`` (uint8, any shape, each below 2**bits: not checked)."""
    return _pack(values, bits, check=False)


def pack_fake(values: Tensor, bits: int) -> Tensor:
    return values.new_empty(packed_size(values.numel(), bits))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values of a packed stream: uint8, 1-D."""
    return _unpack(packed, bits, count)


def unpack_fake(packed: Tensor, bits: int, count: int) -> Tensor:
    return packed.new_empty(count, dtype=torch.uint8)


def dequantize(
    packed: Tensor, channel_scale: Tensor, bits: int, columns: int, dtype: torch.dtype, taps: int = 1
) -> Tensor:
    """The weights, code * scale, of a packed stream: (R, columns) in ``dtype``, one row a scale.

    taps: each row, (columns / taps, taps), is given as (taps, columns / taps): channels last.
    """
    codes = bit_format(bits).codes(_unpack(packed, bits, channel_scale.numel() * columns))
    rows = (codes.view(-1, columns) * channel_scale[:, None]).to(dtype)
    return rows if taps == 1 else rows.unflatten(1, (columns // taps, taps)).transpose(1, 2).reshape(-1, columns)


def dequantize_fake(
    packed: Tensor, channel_scale: Tensor, bits: int, columns: int, dtype: torch.dtype, taps: int = 1
) -> Tensor:
    return packed.new_empty((channel_scale.numel(), columns), dtype=dtype)
