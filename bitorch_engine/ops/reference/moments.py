"""How Adam's two moving averages are stored: in a float type, or in 8 bits; always rounded stochastically, so unbiased.

An 8-bit moment is a uint8 tensor of shape (blocks, 132): 128 codes, then the block's largest magnitude as the four
bytes of a float32. Codes are companded, because moments span many decades: ``level = (code / 255)**4`` of that largest
magnitude for a second moment, ``sign * (code / 127)**2`` for a first one, whose sign is the top bit of the byte.
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
    codes = rows[:, :BLOCK]
    largest = rows[:, BLOCK:].contiguous().view(torch.float32)
    values = _level((codes & 0x7F if signed else codes).to(torch.float32), signed) * largest
    if signed:
        values = torch.where(codes > 0x7F, -values, values)
    return values.view(-1)[: stop - start].to(dtype)


def store_moment_(stored: Tensor, start: int, values: Tensor, noise: Tensor | None, *, signed: bool) -> None:
    """Round values into elements start, start + 1, ... of a moment, in place.

    noise: int32 bits, one an element, or None where ``needs_noise`` says no. First moments (signed) use the low half,
    second moments the high half.
    """
    if noise is None or not needs_noise(stored):
        stored.view(-1)[start : start + values.numel()].copy_(values)
        return
    noise = low16(noise) if signed else high16(noise)
    values = values.to(torch.float32)
    if stored.dtype == torch.uint8:
        _store_8bit_(stored, start, values, noise, signed=signed)
    else:
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
    magnitude = blocks.abs()
    largest = magnitude.amax(1, keepdim=True)
    share = torch.where(largest > 0, magnitude / largest, 0.0)
    top = 127 if signed else 255
    root = share.sqrt() if signed else share.sqrt().sqrt()
    code = (root * top).floor().clamp_max(top - 1)
    below, above = _level(code, signed), _level(code + 1, signed)
    code += noise.to(torch.float32) * 2.0**-16 < (share - below) / (above - below)
    if signed:
        code += 128.0 * (blocks < 0)
    else:
        # A second moment that is positive stays positive: at code 0 the step would be divided by eps alone.
        code = torch.maximum(code, blocks > 0)
    first = start // BLOCK
    target = stored[first : first + blocks.shape[0]]
    target[:, :BLOCK] = code.to(torch.uint8)
    target[:, BLOCK:] = largest.view(torch.uint8)


def _level(code: Tensor, signed: bool) -> Tensor:
    """The share of the block's largest magnitude that a code (float, without sign) stands for."""
    root = code * (1 / 127 if signed else 1 / 255)
    square = root * root
    return square if signed else square * square
