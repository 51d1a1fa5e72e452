"""Packing and unpacking; ``bits.packing`` defines them."""

import torch
from torch import Tensor

from bitorch_engine.bits import pack as _pack
from bitorch_engine.bits import packed_size
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
