"""How Adam's moments are stored, as ``ops.reference.moments`` defines it.

A tile is (B, 64) elements, one half of B blocks of 128, which share a unit in the 8-bit form: element ``run + place``,
with ``run`` (B, 1) where its block begins, and ``place`` (1, 64) 0 .. 63 or 64 .. 127. Moments are pointed to where the
program's elements begin, of which ``left`` are there. An 8-bit code is the upper part of a float32: 19 bits are cut.
"""

import triton
import triton.language as tl

from bitorch_engine.ops.triton.floats import widened

_ROW = tl.constexpr(132)  # bytes of a block: 128 codes and a unit


@triton.jit
def from_element(stored, start):
    """A pointer to where the elements of a moment begin that follow ``start``, a multiple of 128."""
    return stored + (start // 128 * _ROW if stored.dtype.element_ty == tl.uint8 else start)


@triton.jit
def load_moment(stored, run, place, left, SIGNED: tl.constexpr):
    """Elements of a tile as float32, 0 beyond ``left``. SIGNED: a first moment."""
    mask = run + place < left
    if stored.dtype.element_ty == tl.uint8:
        row = run // 128 * _ROW
        code = tl.load(stored + row + place, mask=mask, other=0).to(tl.int32)
        unit = tl.load(_units(stored, row), mask=run < left, other=0)
        size = (code & 127) if SIGNED else code
        value = ((size << 19) + unit).to(tl.float32, bitcast=True) - unit.to(tl.float32, bitcast=True)
        if SIGNED:
            value = tl.where(code > 127, -value, value)
    else:
        value = widened(tl.load(stored + run + place, mask=mask, other=0.0))
    return value


@triton.jit
def store_moment(stored, run, place, left, first, first_noise, second, second_noise, SIGNED: tl.constexpr):
    """Round the values of both halves of B blocks, float32, into a moment. place: 0 .. 63."""
    if stored.dtype.element_ty == tl.uint8:
        unit = _unit(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1, keep_dims=True), SIGNED)
        row = run // 128 * _ROW
        at = stored + row + place
        tl.store(at, _code(first, unit, first_noise, SIGNED), mask=run < left)
        tl.store(at + 64, _code(second, unit, second_noise, SIGNED), mask=run < left)
        tl.store(_units(stored, row), unit, mask=run < left)
    else:
        at = run + place
        dtype: tl.constexpr = stored.dtype.element_ty
        tl.store(stored + at, _rounded(first, first_noise, dtype, SIGNED), mask=at < left)
        tl.store(stored + at + 64, _rounded(second, second_noise, dtype, SIGNED), mask=at + 64 < left)


@triton.jit
def _units(stored, row):
    """Pointers to the units, behind the 128 codes of each row, as the bits of a float32."""
    return stored.to(tl.pointer_type(tl.int32), bitcast=True) + row // 4 + 32


@triton.jit
def _unit(largest, SIGNED: tl.constexpr):
    """The bits of the least power of two for which largest + unit has a code."""
    DOUBLINGS: tl.constexpr = 8 if SIGNED else 16
    room: tl.constexpr = (1 << (23 - (DOUBLINGS - 1))) + (1 << 19) - 1
    exponent = (largest.to(tl.int32, bitcast=True) + room) >> 23
    return tl.maximum(exponent - (DOUBLINGS - 1), 1) << 23


@triton.jit
def _code(value, unit, noise, SIGNED: tl.constexpr):
    """The codes of float32 values, rounded stochastically: uint8. unit: the bits of a float32."""
    above = (tl.abs(value) + unit.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    code = (above + _noise_below(19, noise, SIGNED) - unit) >> 19
    if SIGNED:
        code |= (value.to(tl.int32, bitcast=True) >> 24) & 128
    else:  # at code 0 the step would be divided by eps alone
        code = tl.maximum(code, (value > 0).to(tl.int32))
    return code.to(tl.uint8)


@triton.jit
def _rounded(value, noise, dtype: tl.constexpr, SIGNED: tl.constexpr):
    """float32 values in another float type, rounded stochastically to neighbours of the same sign."""
    if dtype == tl.bfloat16:
        upper = (value.to(tl.int32, bitcast=True) + _noise_below(16, noise, SIGNED)) >> 16
        result = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        # Below 2**-14 its numbers lie evenly, as far apart as those just above.
        size = tl.abs(value)
        shift = tl.where(size < 6.103515625e-05, 6.103515625e-05, 0.0)
        cut = (size + shift).to(tl.int32, bitcast=True) + _noise_below(13, noise, SIGNED)
        size = tl.minimum((cut & -8192).to(tl.float32, bitcast=True) - shift, 65504.0)
        sign = value.to(tl.int32, bitcast=True) & -2147483648
        result = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(tl.float16)
    else:
        result = value
    return result


@triton.jit
def _noise_below(CUT: tl.constexpr, noise, SIGNED: tl.constexpr):
    """CUT bits of noise: the low ones for a first moment, the high ones for a second."""
    return ((noise & ((1 << CUT) - 1)) if SIGNED else (noise >> (32 - CUT))).to(tl.int32, bitcast=True)
