"""Rounding noise from a counter, as ``ops.reference.noise`` and ``ops.reference.levels.step_noise`` define it."""

import triton
import triton.language as tl

_FACTOR = tl.constexpr(0xAD166959)  # of the second half of each run


@triton.jit
def hash32(x):
    """The hash of 32 bits: uint32, any shape."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_bits(start, inside, key):
    """32 noise bits for each of the elements ``start + inside``: uint32.

    start: int64 scalar.  inside: int32, any shape, from which no sum passes a multiple of 2**32 beyond ``start``.
    """
    high = (start >> 32).to(tl.uint32)
    low = start.to(tl.uint32) + inside.to(tl.uint32)
    return hash32(low ^ hash32(high) ^ key.to(tl.uint32, bitcast=True))


@triton.jit
def in_second_half(noise):
    """The noise of a step 64 elements on, in the second half of a run of 128, from that of the first half."""
    return noise * _FACTOR


@triton.jit
def uniform24(noise):
    """The top 24 bits as float32 in [0, 1)."""
    return (noise >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
