"""Packing of 1 to 8 bit values into bytes. This docstring is the specification of the layout.

A packed tensor is one stream of bits, least significant bit first: value ``i`` of width ``b`` fills the bits
``i*b .. i*b + b - 1`` of the stream, and bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``. No padding but
the unused high bits of the last byte, which are zero: n values take exactly ``ceil(n*b / 8)`` bytes. Eight values
always fill ``b`` whole bytes, so a stream may be cut at any multiple of eight values.

    b = 4    byte 0           byte 1                b = 3    byte 0            byte 1            byte 2
             [v1 v1 v1 v1|v0 v0 v0 v0]  [v3..|v2..]          [v2 v2|v1 v1 v1|v0 v0 v0]
    bit       7  6  5  4  3  2  1  0                bit       7  6  5  4  3  2  1  0
                                                             [v5|v4 v4 v4|v3 v3 v3|v2]   [v7 v7 v7|v6 v6 v6|v5 v5]

What is packed is always an unsigned index (``BitFormat`` says which code it stands for).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.bits.formats import bit_format


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` values of ``bits`` bits take: ceil(count * bits / 8)."""
    return (count * bit_format(bits).bits + 7) // 8


def check_packed(packed: Tensor, count: int, bits: int) -> None:
    """Raise TypeError where ``packed`` is not uint8, ValueError where it has not ``packed_size(count, bits)`` bytes."""
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed values must be a uint8 tensor, got {packed.dtype}.")
    if packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} values of {bits} bits are packed in {packed_size(count, bits)} bytes, got {packed.numel()} bytes."
        )


def pack(values: Tensor, bits: int, *, check: bool = True) -> Tensor:
    """The packed bytes of ``values``: uint8, 1-D, ``packed_size(values.numel(), bits)`` long, on the same device.

    values: uint8, any shape, read in row-major order, each below ``2**bits``.
    Raises TypeError for another dtype, and ValueError for a larger value (``check=False`` skips that pass).
    """
    if values.dtype != torch.uint8:
        raise TypeError(f"pack takes a uint8 tensor of indices, got {values.dtype}.")
    limit = bit_format(bits).levels - 1
    if check and values.numel() and int(values.max()) > limit:
        raise ValueError(f"values of {bits} bits are 0 to {limit}, got {int(values.max())}.")
    values = values.reshape(-1)
    if bits == 8:
        return values.clone()
    count = values.numel()
    eights = F.pad(values, (0, -count % 8)).view(-1, 8)
    packed = values.new_zeros(eights.shape[0], bits)
    for value, byte, shift in _overlaps(bits):
        column = eights[:, value]
        packed[:, byte] |= column << shift if shift >= 0 else column >> -shift
    return packed.view(-1)[: packed_size(count, bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` values of a packed stream: uint8, 1-D, a new tensor. Raises what ``check_packed`` does."""
    check_packed(packed, count, bits)
    packed = packed.reshape(-1)
    if bits == 8:
        return packed.clone()
    groups = F.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    values = packed.new_zeros(groups.shape[0], 8)
    for value, byte, shift in _overlaps(bits):
        column = groups[:, byte]
        values[:, value] |= column >> shift if shift >= 0 else column << -shift
    return (values & (bit_format(bits).levels - 1)).view(-1)[:count]


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(value, byte, shift) for every byte that a value of a group of eight touches; it lies ``shift`` bits up in it."""
    return [
        (value, byte, value * bits - 8 * byte)
        for value in range(8)
        for byte in range(bits)
        if value * bits < 8 * byte + 8 and 8 * byte < value * bits + bits
    ]
