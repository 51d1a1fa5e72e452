"""Conversions and rounding of floats that give the same bits on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """float32 values as another float type, rounded to nearest, ties to even.

    The interpreter of Triton 3.6 cuts bits off where it makes a bfloat16: there they are rounded by hand.
    """
    if dtype == tl.bfloat16 and _INTERPRETED:
        word = value.to(tl.int32, bitcast=True)
        even = word + 0x7FFF + ((word >> 16) & 1)
        upper = tl.where(value == value, even, word | 0x400000) >> 16  # a NaN stays one
        result = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def widened(value):
    """Values of a narrower float type as float32: exact."""
    if value.dtype == tl.bfloat16:
        result = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def rounded_small(value):
    """float32 values of a size below 2**22 rounded to integers, ties to even: int32.

    Beside 1.5 * 2**23 a float32 has no bits left for a fraction, and its mantissa counts in ones.
    """
    return (value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def rounded(value):
    """float32 values rounded to integers, ties to even. Needs a kernel compiled without fused multiply-adds.

    Adding 2**23 does that to all below it, and what is larger is an integer.
    """
    size = tl.abs(value)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    sign = value.to(tl.int32, bitcast=True) & -2147483648
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
