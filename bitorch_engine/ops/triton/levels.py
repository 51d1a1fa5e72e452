"""How a level, code and residual as one byte, is moved: ``ops.reference.levels``.

Elements lie in groups of eight, the last dimension of a tile, which fill BITS bytes of a plane.
"""

import triton
import triton.language as tl

from bitorch_engine.ops.triton.bits import load_index


@triton.jit
def moved(level, move, noise):
    """Levels 0 .. 255, int32, moved by ``move`` levels, float32, rounded stochastically, and clamped.

    A move is first rounded to a multiple of 2**-23 levels, ties to even: adding 2**23 does that to all below it, and
    what is larger is an integer.
    """
    fine = tl.minimum(move * 8388608.0, 2139095040.0)  # 255 * 2**23
    size = tl.abs(fine)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    fine = tl.maximum(tl.where(fine < 0, -whole, whole), -2147483648.0)
    steps = (fine.to(tl.int32) + (noise >> 9).to(tl.int32)) >> 23
    return tl.minimum(tl.maximum(level + steps, 0), 255)


@triton.jit
def load_levels(packed, residual, group, lane, count, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The levels of a tile: int32, (B, 8, 8). group: int64, (B, 8, 1), of eight elements.  lane: (1, 1, 8), 0 .. 7.

    WORDS: count is a multiple of eight, and the planes are aligned.
    """
    level = _load_plane(packed, group, lane, count, BITS, WORDS) << (8 - BITS)
    if BITS < 8:
        level |= _load_plane(residual, group, lane, count, 8 - BITS, WORDS)
    return level


@triton.jit
def store_levels(packed, residual, group, lane, count, level, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Write the levels of a tile into both planes."""
    _store_plane(packed, group, lane, count, level >> (8 - BITS), BITS, WORDS)
    if BITS < 8:
        _store_plane(residual, group, lane, count, level & ((1 << (8 - BITS)) - 1), 8 - BITS, WORDS)


@triton.jit
def _load_plane(plane, group, lane, count, BITS: tl.constexpr, WORDS: tl.constexpr):
    if WORDS and (BITS == 1 or BITS == 2 or BITS == 4):
        word = tl.load(_words(plane, BITS) + group, mask=group * 8 < count, other=0).to(tl.int32)
        value = (word >> (lane * BITS)) & ((1 << BITS) - 1)
    else:
        at = group * 8 + lane
        value = load_index(plane, at, at < count, BITS)
    return value


@triton.jit
def _store_plane(plane, group, lane, count, value, BITS: tl.constexpr, WORDS: tl.constexpr):
    """A group's values are one word: they share no bit, so that their sum is all of them side by side."""
    inside = group * 8 + lane < count
    if BITS == 8:
        tl.store(plane + group * 8 + lane, value.to(tl.uint8), mask=inside)
    elif BITS <= 4:
        word = tl.sum(tl.where(inside, value << (lane * BITS), 0), axis=2, keep_dims=True)
        _store_word(plane, group, lane, count, word, BITS, WORDS)
    else:
        word = tl.sum(tl.where(inside, value.to(tl.int64) << (lane * BITS), 0), axis=2, keep_dims=True)
        _store_word(plane, group, lane, count, word, BITS, WORDS)


@triton.jit
def _store_word(plane, group, lane, count, word, BITS: tl.constexpr, WORDS: tl.constexpr):
    if WORDS and (BITS == 1 or BITS == 2 or BITS == 4):
        words = _words(plane, BITS)
        tl.store(words + group, word.to(words.dtype.element_ty), mask=group * 8 < count)
    else:
        byte = group * BITS + lane
        there = (lane < BITS) & (byte * 8 < count * BITS)
        tl.store(plane + byte, (word >> (8 * tl.minimum(lane, BITS - 1))).to(tl.uint8), mask=there)


@triton.jit
def _words(plane, BITS: tl.constexpr):
    """A pointer to the words of eight values, of 1, 2 or 4 bytes."""
    if BITS == 1:
        result = plane
    elif BITS == 2:
        result = plane.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        result = plane.to(tl.pointer_type(tl.int32), bitcast=True)
    return result
