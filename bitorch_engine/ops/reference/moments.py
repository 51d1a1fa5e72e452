"""How Adam's two moving averages are stored: in a float type, or in 8 bits; always rounded stochastically, so unbiased.

A float32 is rounded to a shorter one by adding noise to the low bits that go, and cutting them. Every stored type here
is a float32 that is cut so: bfloat16 after 7 bits of fraction, float16 after 10, the 8-bit form after 4. The numbers of
a float lie evenly between two powers of two, therefore the mean of what is stored is the value itself.

An 8-bit moment is a uint8 tensor of shape (blocks, 132): 128 codes, then the block's unit as the four bytes of a
float32, a power of two. A magnitude x is stored as the steps that x + unit lies above the unit, 16 to each doubling:

    x + unit, as float32    [0|exponent: 8|fraction: 4|cut: 19]        code = its upper 13 bits less those of the unit
    second moment           [code: 8]           0 .. 255: 16 doublings, values to 63487 units
    first moment            [sign|code: 7]      0 .. 127:  8 doublings, values to   247 units

Adding the unit makes the numbers below it even, down to 0, which is kept exactly. The unit is the least power of two
for which the block's largest magnitude has a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Elements that share one unit in an 8-bit moment."""
_ROW = BLOCK + 4
_CUT_8BIT = 19
_DOUBLINGS = {False: 16, True: 8}  # of a second, and of a first moment, which has a sign


def new_moment(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A moment of zeros for a gradient of that shape. dtype: a float type, or uint8 for the 8-bit form."""
    if dtype == torch.uint8:
        count = torch.Size(shape).numel()
        return torch.zeros((count + BLOCK - 1) // BLOCK, _ROW, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


def moment_fits(stored: Tensor, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether ``stored`` is a moment for a gradient of that shape."""
    if stored.dtype == torch.uint8:
        return stored.shape == ((torch.Size(shape).numel() + BLOCK - 1) // BLOCK, _ROW)
    return stored.shape == torch.Size(shape)


def load_moment(stored: Tensor, start: int, stop: int, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """Elements start .. stop - 1 of a moment in row-major order, as ``dtype``. ``start`` is a multiple of BLOCK."""
    if stored.dtype != torch.uint8:
        return stored.view(-1)[start:stop].to(dtype)
    rows = stored[start // BLOCK : -(-stop // BLOCK)]
    codes = rows[:, :BLOCK].to(torch.int32)
    unit = rows[:, BLOCK:].contiguous().view(torch.float32)
    size = codes & 0x7F if signed else codes
    values = ((size << _CUT_8BIT) + unit.view(torch.int32)).view(torch.float32) - unit
    if signed:
        values = torch.where(codes > 0x7F, -values, values)
    return values.view(-1)[: stop - start].to(dtype)


def store_moment_(stored: Tensor, start: int, values: Tensor, noise: Tensor, *, signed: bool) -> None:
    """Round values into elements start, start + 1, ... of a moment, in place.

    noise: int32 bits, one an element. First moments (signed) use the low bits, second moments the high ones.
    """
    if stored.dtype == torch.uint8:
        noise = _noise_below(_CUT_8BIT, noise, signed)
        _store_8bit_(stored, start, values.to(torch.float32), noise, signed=signed)
        return
    if stored.dtype in _ROUNDERS:
        cut, rounded = _ROUNDERS[stored.dtype]
        values = rounded(values.to(torch.float32), _noise_below(cut, noise, signed))
    stored.view(-1)[start : start + values.numel()].copy_(values)


def _noise_below(cut: int, noise: Tensor, signed: bool) -> Tensor:
    """``cut`` bits of noise: the low ones for a first moment, the high ones for a second."""
    return (noise if signed else noise >> (32 - cut)) & ((1 << cut) - 1)


def _cut_bits(values: Tensor, cut: int, noise: Tensor) -> Tensor:
    """float32 values without their lowest ``cut`` bits, rounded stochastically to neighbours of the same sign."""
    return ((values.view(torch.int32) + noise) & -(1 << cut)).view(torch.float32)


def _to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    return _cut_bits(values, 16, noise)


def _to_float16(values: Tensor, noise: Tensor) -> Tensor:
    """float16 has a fraction of 10 bits; below 2**-14 its numbers lie evenly, as far apart as those just above."""
    size = values.abs()
    shift = torch.where(size < 2.0**-14, 2.0**-14, 0.0)
    size = (_cut_bits(size + shift, 13, noise) - shift).clamp_max(65504.0)
    return torch.copysign(size, values)


_ROUNDERS = {torch.bfloat16: (16, _to_bfloat16), torch.float16: (13, _to_float16)}
"""How many bits are cut, and how."""


def _store_8bit_(stored: Tensor, start: int, values: Tensor, noise: Tensor, *, signed: bool) -> None:
    padding = -values.numel() % BLOCK
    blocks = F.pad(values, (0, padding)).view(-1, BLOCK)
    noise = F.pad(noise, (0, padding)).view(-1, BLOCK)
    size = blocks.abs()
    unit = _unit(size.amax(1, keepdim=True), signed)
    code = (((size + unit).view(torch.int32) + noise) - unit.view(torch.int32)) >> _CUT_8BIT
    # A second moment that is positive stays positive: at code 0 the step would be divided by eps alone.
    sign, least = (blocks.view(torch.int32) >> 24) & 0x80, (blocks > 0).to(torch.int32)
    code = code | sign if signed else torch.maximum(code, least)
    first = start // BLOCK
    target = stored[first : first + blocks.shape[0]]
    target[:, :BLOCK] = code.to(torch.uint8)
    target[:, BLOCK:] = unit.view(torch.uint8)


def _unit(largest: Tensor, signed: bool) -> Tensor:
    """The least power of two, not below the normal numbers, for which largest + unit has a code.

    That is so where, in front of the exponent of ``largest``, the fraction leaves room for the unit and for rounding
    up; else the exponent is one more.
    """
    doublings = _DOUBLINGS[signed]
    room = (1 << (23 - (doublings - 1))) + (1 << _CUT_8BIT) - 1
    exponent = (largest.view(torch.int32) + room) >> 23
    return ((exponent - (doublings - 1)).clamp_min(1) << 23).view(torch.float32)
