"""Packing and unpacking of 1 to 8 bit values."""

import torch
from torch import Tensor

from bitorch_engine.bits import check_packed, packed_size
from bitorch_engine.ops.cpu.loading import INT, INT64, POINTER, function, threads

_pack = function("be_pack", POINTER, POINTER, INT64, INT, INT)
_unpack = function("be_unpack", POINTER, POINTER, INT64, INT, INT)


def pack(values: Tensor, bits: int) -> Tensor:
    values = values.contiguous()
    packed = torch.empty(packed_size(values.numel(), bits), dtype=torch.uint8)
    _pack(values.data_ptr(), packed.data_ptr(), values.numel(), bits, threads())
    return packed


def dense(packed: Tensor, count: int, bits: int) -> Tensor:
    """``packed`` without gaps, as kernels read it. Raises what ``check_packed`` does."""
    check_packed(packed, count, bits)
    return packed.contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    packed = dense(packed, count, bits)
    values = torch.empty(count, dtype=torch.uint8)
    _unpack(packed.data_ptr(), values.data_ptr(), count, bits, threads())
    return values
