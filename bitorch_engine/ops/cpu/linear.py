"""Packed weights with float activations: a block of output channels at a time becomes float, never the whole weight."""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.bits import check_packed
from bitorch_engine.ops.cpu.bits import dense
from bitorch_engine.ops.cpu.loading import DTYPES, INT, INT64, POINTER, current_isa, function, threads
from bitorch_engine.ops.cpu.plans import Watch, can_plan, fits, is_short, make_plan, planned, with_short_bias
from bitorch_engine.ops.cpu.quantize import dequantize, plan_dequantize
from bitorch_engine.ops.library import Plan
from bitorch_engine.ops.reference import linear as reference

_linear = function("be_linear", POINTER, INT64, *[POINTER] * 3, *[INT64] * 3, INT, INT, POINTER, INT)
_linear_digits = function(
    "be_linear_digits", POINTER, INT64, *[POINTER] * 3, INT64, INT64, INT, INT, *[POINTER] * 2, INT, result=INT64
)
_planned = planned("be_linear_planned")
_codes = planned("be_linear_codes")

_FEW = {"avx2": 32}
"""Rows of activations up to which products of codes as they are read may be faster than a float matrix product; 16 with
other instruction sets."""

_FEW_RESULTS = 1 << 11
"""Results up to which they are: the call of a float matrix product takes longer."""

_DIGIT_ROWS = {"avx2": 64, "avx512": 64, "amx": 64}
"""Rows of float32 up to which products of bytes may be faster than a float matrix product, where activations are digits
(csrc/linear/linear.h)."""

_SMALLEST_GROUP = 32
"""Columns with one scale, from which kernels for few rows multiply them."""

BLOCK = 1 << 19
"""Weights that are float at a time, at most; eight output channels are the least. They should stay in the cache."""


class _Planned(ctypes.Structure):
    """PlannedLinear of csrc/linear/linear.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("channels", "columns", "bits", "digits", "threads")),
    )


class _PlannedCodes(ctypes.Structure):
    """PlannedCodes of csrc/linear/linear.cpp."""

    _fields_ = (
        ("watch", Watch),
        *((name, ctypes.c_void_p) for name in ("scale", "low", "packed", "factor", "bias")),
        *((name, ctypes.c_int64) for name in ("channels", "columns", "bits", "x_bits", "threads")),
    )


_DEEPEST = 1 << 15
"""Columns times the largest weight's size, up to which no sum of digits of codes goes beyond 2**24: floats hold it.

A code less its zero point has a low digit of 0 or 1, and a high one of at most 127, which counts two. Where it is no
digits, which is at 3, 5, 6 and 7 bits, it is at most 255. Those of 8 bits are faster as they are arranged."""


def quantizes_one_row(x: Tensor, weight_shape: Sequence[int], w_bit: int) -> bool:
    """Whether ``quantized_row`` has this product: of a linear layer and one row of float32."""
    return (
        len(weight_shape) == 2
        and x.shape[0] == 1
        and x.dtype is torch.float32
        and x.is_contiguous()
        and w_bit < 8
        and 0 < weight_shape[1] << (w_bit - 1) <= _DEEPEST * (1 if w_bit in (1, 2, 4) else 2)
    )


def quantized_row(
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
) -> tuple[Any, ctypes.Structure]:
    """A kernel, and what it reads besides x, for the integer product of a row. It reads the packed weight as it is."""
    packed = dense(packed, math.prod(weight_shape), w_bit)
    structure = _PlannedCodes(
        Watch(),
        scale.data_ptr(),
        low.data_ptr(),
        packed.data_ptr(),
        channel_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *weight_shape,
        w_bit,
        a_bit,
        threads(),
    )
    structure.keeps = packed
    return _codes, structure


def linear_weight_only(
    x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group_size: int = 0
) -> Tensor:
    if group_size:
        reference.check_groups(channel_scale, columns, group_size)
    rows = channel_scale.shape[0] if group_size else channel_scale.numel()
    packed = dense(packed, rows * columns, bits)
    few = x.numel() // max(1, columns)
    if x.numel() == 0 or rows == 0 or x.shape[-1] != columns or not fits(bias, rows):
        return reference.linear_weight_only(x, packed, channel_scale, bits, bias, columns, group_size)
    scale, group = _in_powers(channel_scale, columns, group_size)
    if x.dtype is torch.float32 and group == 0:
        suits = _suits(few, rows, bits, columns)
    else:  # what is left to torch are short floats, which take long, or many scales
        suits = few <= _FEW.get(current_isa(), 16) and x.dtype in DTYPES and (group == 0 or group >= _SMALLEST_GROUP)
    if suits:
        return _few_rows(x, few, packed, scale, bits, bias, columns, group)
    if group == 0 and _takes_digits(x, few, bits, columns):
        return _by_digits(x.reshape(few, columns), packed, scale, bits, bias).view(*x.shape[:-1], rows)
    return _by_blocks(x, packed, channel_scale.reshape(rows, -1), bits, bias, columns)


def plan(
    sources: Sequence[Tensor] | None,
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    bias: Tensor | None,
    columns: int,
    group_size: int = 0,
) -> Plan | None:
    """A plan of ``linear_weight_only``, for contiguous rows of float32 and one scale a row of the weight."""
    if is_short(bias):
        head = (sources, x, packed, channel_scale, bits)
        return with_short_bias(lambda copy: plan(*head, copy, columns, group_size), bias)
    if group_size or x.dtype is not torch.float32 or not x.is_contiguous() or x.shape[-1] != columns:
        return None
    if x.numel() == 0 or channel_scale.numel() == 0 or not can_plan(sources, packed, channel_scale, bias):
        return None
    out = torch.empty([*x.shape[:-1], channel_scale.numel()], device="meta")
    few = x.numel() // columns
    digits = _digits(x.dtype)
    made = plan_rows(sources, few, packed, channel_scale, bits, bias, columns, digits, out.shape, out.stride())
    if made is None and not _takes_digits(x, few, bits, columns):
        return _plan_of_torch(packed, channel_scale, bits, bias, columns)
    if made is None or not _are_digits(bits, columns):
        return made

    def at_this_precision(
        x: Tensor, sources: Sequence[Tensor] | None, packed: Tensor, channel_scale: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        return made(x, sources, packed, channel_scale, bias) if _digits(torch.float32) == digits else None

    return at_this_precision


def plan_rows(
    sources: Sequence[Tensor] | None,
    few: int,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    bias: Tensor | None,
    columns: int,
    digits: int,
    shape: Sequence[int],
    strides: Sequence[int],
) -> Plan | None:
    """A plan of ``few`` contiguous rows of float32, whatever shape they and their results have. digits: bytes of an
    activation, 3 for what is as exact as float32. ``can_plan`` the tensors."""
    channels = channel_scale.numel()
    if not _suits(few, channels, bits, columns):
        return None
    check_packed(packed, channels * columns, bits)
    structure = _Planned(
        few,
        packed.data_ptr(),
        channel_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        channels,
        columns,
        bits,
        digits,
        threads(),
    )
    return make_plan(_planned, structure, shape, strides, torch.float32, sources, packed, channel_scale, bias)


def _plan_of_torch(packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int) -> Plan:
    """``_by_blocks``, of which only the float matrix products are left to every call."""
    check_packed(packed, channel_scale.numel() * columns, bits)
    blocks = []
    for first, last in _block_rows(channel_scale.numel(), columns):
        shape = (last - first, columns)
        blocks.append((first, last, plan_dequantize(packed, channel_scale, bits, shape, (columns, 1), first=first)))

    def multiply(
        x: Tensor,
        sources: Sequence[Tensor] | None,
        packed_now: Tensor,
        channel_scale_now: Tensor,
        bias_now: Tensor | None,
    ) -> Tensor | None:
        if bias_now is not bias or (bias is not None and bias.dtype is not torch.float32):
            return None
        out = None
        for first, last, decode in blocks:
            weight = decode(x, None, packed_now, channel_scale_now, None)
            if weight is None:
                return None
            part = F.linear(x, weight, bias if bias is None else bias[first:last])
            if len(blocks) == 1:
                return part
            if out is None:
                out = x.new_empty([*x.shape[:-1], blocks[-1][1]])
            out[..., first:last] = part
        return out

    return multiply


def linear_grad_input(grad: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, columns: int) -> Tensor:
    # Blocks are added up in grad's dtype, which only float32 is wide enough for.
    if grad.dtype != torch.float32 or grad.numel() == 0 or columns == 0:
        return reference.linear_grad_input(grad, packed, channel_scale, bits, columns)
    out = grad.new_zeros(grad.shape[0], columns)
    for first, last, weight in _blocks(packed, channel_scale.reshape(-1, 1), bits, columns, grad.dtype):
        out.addmm_(grad[:, first:last], weight)
    return out


def _blocks(
    packed: Tensor, scale: Tensor, bits: int, columns: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, weight[first:last]) for blocks of rows that are float one at a time. scale: (rows, groups)."""
    rows, groups = scale.shape
    scale = scale.to(torch.float32)
    for first, last in _block_rows(rows, columns):
        part = packed[first * columns * bits // 8 : (last * columns * bits + 7) // 8]
        weight = dequantize(part, scale[first:last].reshape(-1), bits, columns // groups, dtype)
        yield first, last, weight.view(-1, columns)


def _block_rows(rows: int, columns: int) -> list[tuple[int, int]]:
    """(first, last) of the blocks; before each is a multiple of eight rows, so that it begins at a whole byte."""
    step = max(8, BLOCK // columns // 8 * 8)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _by_blocks(x: Tensor, packed: Tensor, scale: Tensor, bits: int, bias: Tensor | None, columns: int) -> Tensor:
    """A float matrix product, of some output channels after the others. scale: (rows, groups)."""
    out = x.new_empty([*x.shape[:-1], scale.shape[0]])
    if x.dtype in DTYPES and current_isa() == "avx2":  # it has no products of shorter floats
        x = x.to(torch.float32)
    bias = None if bias is None else bias.to(x.dtype)
    for first, last, weight in _blocks(packed, scale, bits, columns, x.dtype):
        out[..., first:last] = F.linear(x, weight, None if bias is None else bias[first:last])
    return out


def _by_digits(x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Products of bytes, for rows of activations that are digits; the others, of which there are few, by blocks."""
    x, scale = x.contiguous(), channel_scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = torch.empty(x.shape[0], scale.numel(), dtype=torch.float32)
    left = torch.empty(x.shape[0], dtype=torch.bool)
    others = _linear_digits(
        x.data_ptr(),
        x.shape[0],
        packed.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        scale.numel(),
        x.shape[1],
        bits,
        _digits(x.dtype),
        out.data_ptr(),
        left.data_ptr(),
        threads(),
    )
    if others:
        out[left] = _by_blocks(x[left], packed, scale.view(-1, 1), bits, bias, x.shape[1])
    return out


def _suits(few: int, rows: int, bits: int, columns: int) -> bool:
    """Whether rows of float32 are so few that products of codes as they are read are faster, for all of which floats
    will do where not all are digits. rows: of the weight."""
    most = _FEW.get(current_isa(), 16)
    if few * rows > _FEW_RESULTS:
        most = min(most if _are_digits(bits, columns) else 16, _most_rows(bits, columns))
    return 0 < few <= most and columns > 0


def _most_rows(bits: int, columns: int) -> int:
    """Rows of float32 beyond which what surrounds short sums takes longer than to make floats of the weights. With
    AVX-512 it was not measured."""
    if current_isa() != "avx2":
        return max(_DIGIT_ROWS.values())
    return 8 + columns // 40 if _are_digits(bits, columns) else 6 + columns // 100


def _takes_digits(x: Tensor, few: int, bits: int, columns: int) -> bool:
    """Whether ``_by_digits`` is faster than a float matrix product."""
    most = min(_DIGIT_ROWS.get(current_isa(), 0), _most_rows(bits, columns))
    return x.dtype is torch.float32 and _are_digits(bits, columns) and few <= most


def _are_digits(bits: int, columns: int) -> bool:
    """Whether activations become digits, if they are even and few."""
    return bits in (1, 2, 4) and columns >= 128  # FEWEST_COLUMNS of csrc/linear/linear.cpp


def _digits(dtype: torch.dtype) -> int:
    """Bytes of an activation; uneven ones have one more. With two, results are off by 3e-5 of their size, a fiftieth of
    what rounding to bfloat16 is; with activations that are just even enough by 1.4e-4, two thirds of rounding to
    float16, which has three."""
    if dtype is torch.float32:
        return 3 if _wants_float32() else 2
    return 2 if dtype is torch.bfloat16 else 3


_precision: Callable[[], str] = torch._C._get_float32_matmul_precision


def _wants_float32() -> bool:
    """Whether float32 products are to be as exact as float32."""
    try:
        return _precision() == "highest"
    except RuntimeError:  # torch does not say where the precision was set for a backend
        return torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")  # type: ignore[attr-defined]


def _few_rows(
    x: Tensor, few: int, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group: int
) -> Tensor:
    """Each row of codes is decoded in registers, and multiplied as it comes from memory."""
    wide, scale = (t.to(torch.float32).contiguous() for t in (x, channel_scale))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = torch.empty([*x.shape[:-1], scale.shape[0]], dtype=torch.float32)
    _linear(
        wide.data_ptr(),
        few,
        packed.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        scale.shape[0],
        columns,
        group,
        bits,
        _digits(x.dtype),
        out.data_ptr(),
        threads(),
    )
    return out.to(x.dtype)


def _in_powers(channel_scale: Tensor, columns: int, group_size: int) -> tuple[Tensor, int]:
    """Scales of groups of 2**i columns, which kernels ask for: those of others are repeated. And that size; 0: rows."""
    if group_size in (0, columns):
        return channel_scale.reshape(-1), 0
    power = group_size & -group_size
    return channel_scale if power == group_size else channel_scale.repeat_interleave(group_size // power, 1), power
