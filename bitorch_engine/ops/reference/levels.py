"""The level of a weight: its code index (n bits) and its residual (8-n bits) read as one byte, and how it is moved.

    level  7 6 5 4 3 2 1 0        n = 3: index = level >> 5, what forward sees and what is deployed
           [index ][ residual]           residual = level & 31, training state

Both live in packed planes of their own. Functions here work on a run of elements, ``start`` a multiple of eight.
"""

import torch
from torch import Tensor

from bitorch_engine.bits import BitFormat, bit_format, pack, unpack
from bitorch_engine.ops.reference.noise import as_int32, noise_bits, noise_key

_STEP = 1  # noise stream
_RUN = 128
_FACTOR = 0xAD166959
"""Pairs (x, x * factor) are well spread modulo 2**13, 2**16, 2**19 and 2**32: the shortest vectors of these lattices
have 0.92 of the greatest possible length or more, the best of 60000 odd numbers."""
_MOST = 255 * 2.0**23
"""A step up ends here, so that an int32 holds it and the noise on top."""


def step_noise(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """32 noise bits for each element of a step: int32, (count,).

    In each run of 128 elements, the second half takes the noise of the first times an odd number: a product is half of
    what a hash costs, and elements so far apart do not meet. The move of the level takes the upper 23 bits, a second
    moment the upper 13 to 19, a first moment the lower ones. Level and second moment share bits: each is unbiased
    alone, and neither enters the other in the same step.
    """
    first = start - start % _RUN
    length = start + count - first
    halves = noise_bits(step_key(key), first, length + -length % _RUN, device).view(-1, 2, _RUN // 2)
    halves[:, 1] = halves[:, 0] * as_int32(_FACTOR)
    return halves.view(-1)[start - first : start - first + count]


def step_key(key: int) -> int:
    """The key of the noise of one step of one weight."""
    return noise_key(key, _STEP)


def move_levels_(packed: Tensor, residual: Tensor, bits: int, *, start: int, move: Tensor, noise: Tensor) -> None:
    """Move the levels of elements start, start + 1, ... by ``move`` levels, rounded stochastically, and clamp them.

    packed, residual: the two planes of the whole weight.  move: (count,) float, in levels.  noise: of ``step_noise``.
    A move is first rounded to a multiple of 2**-23 levels, the resolution of the noise; zero moves nothing.
    """
    form = bit_format(bits)
    fine = (move * 2.0**23).clamp_max(_MOST).round().clamp_min(-(2.0**31)).to(torch.int64)
    steps = (fine + ((noise >> 9) & 0x7FFFFF)) >> 23
    levels = load_levels(packed, residual, form, start, move.numel()) + steps
    store_levels_(packed, residual, form, start, levels.clamp_(0, 255).to(torch.uint8))


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
