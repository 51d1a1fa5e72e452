"""How a level, code and residual as one byte, is moved: ``ops.reference.levels``. Tiles are those of ``bits``."""

import triton
import triton.language as tl

from bitorch_engine.ops.triton.bits import load_tile, store_tile
from bitorch_engine.ops.triton.floats import rounded


@triton.jit
def moved(level, move, noise):
    """Levels 0 .. 255, int32, moved by ``move`` levels, float32, rounded stochastically, and clamped.

    A move is first rounded to a multiple of 2**-23 levels.
    """
    fine = tl.minimum(move * 8388608.0, 2139095040.0)  # 255 * 2**23
    fine = tl.maximum(rounded(fine), -2147483648.0)
    steps = (fine.to(tl.int32) + (noise >> 9).to(tl.int32)) >> 23
    return tl.minimum(tl.maximum(level + steps, 0), 255)


@triton.jit
def load_levels(packed, residual, group, left, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The levels of a tile: int32."""
    level = load_tile(packed, group, left, BITS, WORDS) << (8 - BITS)
    if BITS < 8:
        level |= load_tile(residual, group, left, 8 - BITS, WORDS)
    return level


@triton.jit
def store_levels(packed, residual, group, left, level, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Write the levels of a tile into both planes."""
    store_tile(packed, group, left, level >> (8 - BITS), BITS, WORDS)
    if BITS < 8:
        store_tile(residual, group, left, level & ((1 << (8 - BITS)) - 1), 8 - BITS, WORDS)
