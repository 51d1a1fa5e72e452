"""The level of a weight: its code index (n bits) and its residual (8-n bits) read as one byte, and how it is moved.

    level  7 6 5 4 3 2 1 0        n = 3: index = level >> 5, what forward sees and what is deployed
           [index ][ residual]           residual = level & 31, training state

Both live in packed planes of their own. Functions here work on a run of elements, ``start`` a multiple of eight.
"""

import torch
from torch import Tensor

from bitorch_engine.bits import BitFormat, bit_format, pack, unpack
from bitorch_engine.ops.reference.noise import noise_bits, noise_key, uniform24

CODE_STREAM = 1  # of noise


def move_levels_(packed: Tensor, residual: Tensor, bits: int, *, start: int, move: Tensor, key: int) -> None:
    """Move the levels of elements start, start + 1, ... by ``move`` levels, rounded stochastically, and clamp them.

    packed, residual: the two planes of the whole weight.  move: (count,) float, in levels.
    A move of zero changes nothing. The rounding is unbiased down to 2**-24 levels.
    """
    form = bit_format(bits)
    count = move.numel()
    noise = uniform24(noise_bits(noise_key(key, CODE_STREAM), start, count, move.device))
    size = move.abs()
    whole = size.floor()
    whole = whole + (noise < size - whole)
    steps = torch.where(move < 0, -whole, whole).clamp(-255, 255).to(torch.int16)
    levels = load_levels(packed, residual, form, start, count).to(torch.int16)
    store_levels_(packed, residual, form, start, (levels + steps).clamp_(0, 255).to(torch.uint8))


def load_levels(packed: Tensor, residual: Tensor, form: BitFormat, start: int, count: int) -> Tensor:
    """The levels of elements start .. start + count - 1: uint8, (count,)."""
    index = unpack(_cut(packed, form.bits, start, count), form.bits, count)
    if form.hidden_bits == 0:
        return index
    return (index << form.hidden_bits) | unpack(_cut(residual, form.hidden_bits, start, count), form.hidden_bits, count)


def store_levels_(packed: Tensor, residual: Tensor, form: BitFormat, start: int, levels: Tensor) -> None:
    """Write the levels of elements start, start + 1, ... into both planes."""
    count, hidden = levels.numel(), form.hidden_bits
    _cut(packed, form.bits, start, count).copy_(pack(levels >> hidden, form.bits, check=False))
    if hidden:
        low = levels & ((1 << hidden) - 1)
        _cut(residual, hidden, start, count).copy_(pack(low, hidden, check=False))


def dither_levels(index: Tensor, form: BitFormat, start: int) -> Tensor:
    """Levels for elements start, start + 1, ... of which only the index is known: uint8, the shape of ``index``.

    The residual is spread over the code by noise that depends on the element alone. Left in the middle, every weight
    would stand still until its step adds up to half a code, and then all would flip at once; spread, the mean weight
    follows the gradient from the first step. At 1 bit the spread leans towards the other code, as for a normal weight.
    """
    noise = noise_bits(noise_key(0), start, index.numel(), index.device)
    hidden = form.hidden_bits
    low = ((noise >> 8) & ((1 << hidden) - 1)).to(torch.uint8)
    if form.bits == 1:
        near = torch.minimum(low, ((noise >> 16) & ((1 << hidden) - 1)).to(torch.uint8))
        low = torch.where(index == 0, ((1 << hidden) - 1) - near, near)
    return (index << hidden) | low


def _cut(plane: Tensor, bits: int, start: int, count: int) -> Tensor:
    return plane[start * bits // 8 : ((start + count) * bits + 7) // 8]
