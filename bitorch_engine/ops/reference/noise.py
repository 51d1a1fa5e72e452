"""Rounding noise from a counter: the same bits on every device, thread count, rank and backend.

Noise of element ``i`` is ``hash32(i ^ key)``. No generator is advanced, so nothing has to be saved to resume.
"""

import torch
from torch import Tensor

# The integer hash "lowbias32" of C. Wellons' hash prospector: the two-multiply hash with the least bias found.
_SHIFTS = (16, 15, 16)
_FACTORS = (0x7FEB352D, 0x846CA68B)
_MASK = 0xFFFFFFFF


def noise_key(*parts: int) -> int:
    """A 32-bit key from integers such as (seed, step, stream): change one and all noise changes."""
    # Written out, as small weights are stepped in the time that a few calls take.
    (first, second, third), (factor, other) = _SHIFTS, _FACTORS
    key = 0x9E3779B9
    for part in parts:
        for word in (part & _MASK, (part >> 32) & _MASK):
            x = key ^ word
            x = (x ^ x >> first) * factor & _MASK
            x = (x ^ x >> second) * other & _MASK
            key = (x ^ x >> third) + 0x9E3779B9 & _MASK
    return key


def noise_bits(key: int | Tensor, start: int, count: int, device: torch.device) -> Tensor:
    """32 noise bits for each of the elements start .. start + count - 1: int32, (count,).

    key: an int below 2**32, or a 0-dim int32 tensor on ``device``.
    """
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    low = index.to(torch.int32)
    if start + count > 1 << 32:  # the part above 32 bits enters through a hash of its own
        low = low ^ hash32((index >> 32).to(torch.int32))
    return hash32(low ^ (key if isinstance(key, Tensor) else as_int32(key)))


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32 bits that flips each output bit with probability 1/2 for each input bit. int32, any shape."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = (x ^ _logical_shift(x, shift)) * as_int32(factor)
    return x ^ _logical_shift(x, _SHIFTS[-1])


def uniform24(bits: Tensor) -> Tensor:
    """The top 24 bits as float32 in [0, 1), multiples of 2**-24: exact, and fine enough for steps of 1e-6 codes."""
    return _logical_shift(bits, 8).to(torch.float32) * 2.0**-24


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def as_int32(value: int) -> int:
    """The int32 with the bits of a number below 2**32."""
    return value - (1 << 32) if value >= 1 << 31 else value
