"""How Adam's two moving averages are stored: in a float type, or in 8 bits; always rounded stochastically, so unbiased.

An 8-bit moment is a uint8 tensor of shape (blocks, 132): 128 codes, then the block's unit, a power of two above its
largest magnitude, as the four bytes of a float32. Codes are companded, because moments span many decades: in that unit,

    code = the bits of float32(size + offset), cut after 3 bits of the fraction, less those of the offset

so that codes are a straight line up to the offset and three bits of a float beyond it. The offset is 2**-31 for a
second moment (all 8 bits) and 2**-15 for a first one (7 bits; the top bit is the sign). Adding noise below the cut
rounds it stochastically. All of it is integer arithmetic on the bits of a float: no root, no division.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.ops.reference.noise import high16, low16

BLOCK = 128
"""Elements that share one scale in an 8-bit moment."""
_ROW = BLOCK + 4


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


def needs_noise(stored: Tensor | None) -> bool:
    """Whether what is stored in that moment is rounded."""
    return stored is not None and stored.dtype in (torch.uint8, *_ROUNDERS)


def load_moment(stored: Tensor, start: int, stop: int, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """Elements start .. stop - 1 of a moment in row-major order, as ``dtype``. ``start`` is a multiple of BLOCK."""
    if stored.dtype != torch.uint8:
        return stored.view(-1)[start:stop].to(dtype)
    rows = stored[start // BLOCK : -(-stop // BLOCK)]
    codes = rows[:, :BLOCK].to(torch.int32)
    unit = rows[:, BLOCK:].contiguous().view(torch.float32)
    base, offset = _companding(signed)
    size = codes & 0x7F if signed else codes
    values = (((size + base) << _CUT).view(torch.float32) - offset) * unit
    if signed:
        values = torch.where(codes > 0x7F, -values, values)
    return values.view(-1)[: stop - start].to(dtype)


def store_moment_(stored: Tensor, start: int, values: Tensor, noise: Tensor | None, *, signed: bool) -> None:
    """Round values into elements start, start + 1, ... of a moment, in place.

    noise: int32 bits, one an element, or None where ``needs_noise`` says no. First moments (signed) use the low half,
    second moments the high half; in 8 bits, 20 bits of either end.
    """
    if noise is None or not needs_noise(stored):
        stored.view(-1)[start : start + values.numel()].copy_(values)
        return
    values = values.to(torch.float32)
    if stored.dtype == torch.uint8:
        _store_8bit_(stored, start, values, noise, signed=signed)
    else:
        noise = low16(noise) if signed else high16(noise)
        target = stored.view(-1)[start : start + values.numel()]
        target.copy_(_ROUNDERS[stored.dtype](values, noise))


def _to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """bfloat16 is float32 cut after 16 bits: adding 16 noise bits before the cut rounds stochastically."""
    bits = values.view(torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32)


def _to_float16(values: Tensor, noise: Tensor) -> Tensor:
    """float16 keeps 11 significant bits, and 2**-24 is its smallest positive number."""
    exponent = torch.frexp(values).exponent.clamp_min(-13)
    # ldexp by a tensor goes through pow; a power of two is built exactly from its exponent bits instead.
    unit = ((exponent - 11 + 127) << 23).to(torch.int32).view(torch.float32)
    rounded = torch.floor(values / unit + noise.to(torch.float32) * 2.0**-16) * unit
    return rounded.clamp(-65504.0, 65504.0)


_ROUNDERS = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}


def _store_8bit_(stored: Tensor, start: int, values: Tensor, noise: Tensor, *, signed: bool) -> None:
    padding = -values.numel() % BLOCK
    blocks = F.pad(values, (0, padding)).view(-1, BLOCK)
    noise = F.pad(noise, (0, padding)).view(-1, BLOCK)
    # The power of two above the largest, and its inverse, both normal numbers. As integers, floats are in order.
    exponent = ((blocks.abs().amax(1, keepdim=True).view(torch.int32) >> 23) + 1).clamp(2, 252)
    unit, inverse = ((bits << 23).view(torch.float32) for bits in (exponent, 254 - exponent))
    base, offset = _companding(signed)
    random = noise & ((1 << _CUT) - 1) if signed else (noise >> (32 - _CUT)) & ((1 << _CUT) - 1)
    code = (((blocks.abs() * inverse + offset).view(torch.int32) + random) >> _CUT) - base
    if signed:
        code |= (blocks.view(torch.int32) >> 24) & 128
    else:
        # A second moment that is positive stays positive: at code 0 the step would be divided by eps alone.
        code = torch.maximum(code, (blocks > 0).to(torch.int32))
    first = start // BLOCK
    target = stored[first : first + blocks.shape[0]]
    target[:, :BLOCK] = code.to(torch.uint8)
    target[:, BLOCK:] = unit.view(torch.uint8)


_CUT = 20
"""Bits of a float32 below those that a code keeps."""


def _companding(signed: bool) -> tuple[int, float]:
    """(base, offset): the offset, and its bits as a code has them."""
    power = -15 if signed else -31
    return (127 + power) << 3, 2.0**power
