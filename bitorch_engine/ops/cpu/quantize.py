"""Floats to codes and back: activations, gradients, weights."""

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from bitorch_engine.bits import packed_size
from bitorch_engine.ops.cpu.bits import dense
from bitorch_engine.ops.cpu.loading import DTYPES, FLOAT, FLOAT64, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.cpu.plans import make_plan, planned
from bitorch_engine.ops.library import Plan
from bitorch_engine.ops.reference import activation, gradient
from bitorch_engine.ops.reference import bits as bits_reference
from bitorch_engine.ops.reference.layout import channels_last_shape, is_channels_last, new_output

_quantize = function(
    "be_quantize_activation", POINTER, INT, *[INT64] * 3, INT, POINTER, POINTER, INT, *[POINTER] * 3, INT
)
_values = function("be_activation_values", POINTER, *[INT64] * 3, INT, POINTER, POINTER, INT, POINTER, INT)
_dequantize = function("be_dequantize", POINTER, *[INT64] * 3, POINTER, INT, POINTER, INT)
_dequantize_planned = planned("be_dequantize_planned")
_largest = function("be_gradient_largest", POINTER, *[INT64] * 3, INT, POINTER, INT)
_round = function("be_gradient_round", POINTER, *[INT64] * 3, INT, POINTER, POINTER, INT, INT, INT, POINTER, INT)
_straight_through = function(
    "be_straight_through", POINTER, *[INT64] * 3, INT, POINTER, POINTER, FLOAT, INT, POINTER, INT, result=FLOAT64
)


def quantize_activation(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in DTYPES or x.numel() == 0:
        return activation.quantize_activation(x, scale, low, bits)
    x, channels_last = _in_order(x)
    codes, beyond = (torch.empty(packed_size(x.numel(), width), dtype=torch.uint8) for width in (bits, 1))
    poison = torch.empty((), dtype=torch.float32)
    _quantize(
        x.data_ptr(),
        DTYPES[x.dtype],
        *_sizes(x),
        channels_last,
        scale.data_ptr(),
        low.data_ptr(),
        bits,
        codes.data_ptr(),
        beyond.data_ptr(),
        poison.data_ptr(),
        threads(),
    )
    return codes, beyond, poison


def activation_values(
    codes: Tensor, scale: Tensor, low: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    if not scale.dtype is low.dtype is torch.float32:
        return activation.activation_values(codes, scale, low, bits, shape, dtype, channels_last)
    codes = dense(codes, prod(shape), bits)
    values = new_output(codes, shape, torch.float32, channels_last)
    _values(
        codes.data_ptr(),
        *_sizes(values),
        channels_last,
        scale.data_ptr(),
        low.data_ptr(),
        bits,
        values.data_ptr(),
        threads(),
    )
    return values if dtype == values.dtype else new_output(codes, shape, dtype, channels_last).copy_(values)


def activation_grads(grad: Tensor, codes: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if grad.dtype not in DTYPES or grad.numel() == 0:
        return activation.activation_grads(grad, codes, beyond, low, bits)
    codes, beyond = dense(codes, grad.numel(), bits), dense(beyond, grad.numel(), 1)
    values, channels_last = _in_order(grad.to(torch.float32))
    lowest = float(low)
    out = torch.empty_like(values)
    total = _straight_through(
        values.data_ptr(),
        *_sizes(values),
        channels_last,
        codes.data_ptr(),
        beyond.data_ptr(),
        lowest,
        bits,
        out.data_ptr(),
        threads(),
    )
    scale_grad = torch.tensor(total * activation.scale_grad_factor(grad.shape, lowest, bits), dtype=torch.float32)
    return out.to(grad.dtype), scale_grad


def dequantize(
    packed: Tensor, channel_scale: Tensor, bits: int, columns: int, dtype: torch.dtype, taps: int = 1
) -> Tensor:
    if channel_scale.dtype is not torch.float32 or columns % taps:
        return bits_reference.dequantize(packed, channel_scale, bits, columns, dtype, taps)
    out = torch.empty(channel_scale.numel(), columns, dtype=torch.float32)
    packed = dense(packed, out.numel(), bits)
    sizes, scale = (len(out), columns // taps, taps), channel_scale.contiguous()
    _dequantize(packed.data_ptr(), *sizes, scale.data_ptr(), bits, out.data_ptr(), threads())
    return out.to(dtype)


class _Dequantized(ctypes.Structure):
    """PlannedDequantize of csrc/qconv/dequantize.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "taps", "bits", "threads")),
    )


def plan_dequantize(
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    shape: Sequence[int],
    strides: Sequence[int],
    taps: int = 1,
    first: int = 0,
) -> Plan:
    """A plan of ``dequantize`` for rows first, first + 1, ... of a weight, as many as ``shape`` has; a multiple of 8 of
    them come before. It looks at neither its input nor a bias. ``can_plan`` the tensors."""
    columns = prod(shape[1:])
    structure = _Dequantized(
        packed.data_ptr() + first * columns * bits // 8,
        channel_scale.data_ptr() + first * channel_scale.element_size(),
        shape[0],
        columns // taps,
        taps,
        bits,
        threads(),
    )
    return make_plan(_dequantize_planned, structure, shape, strides, torch.float32, None, packed, channel_scale, None)


def quantize_gradient(
    grad: Tensor, channel_factor: Tensor | None, bits: int, keep: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    if grad.dtype not in DTYPES or grad.numel() == 0:
        return gradient.quantize_gradient(grad, channel_factor, bits, keep, seed)
    values, channels_last = _in_order(grad.to(torch.float32))
    sizes = _sizes(values)
    largest = torch.empty(sizes[:2], dtype=torch.float32)
    _largest(values.data_ptr(), *sizes, channels_last, largest.data_ptr(), threads())
    factor = None if channel_factor is None else channel_factor.contiguous()
    if factor is not None:
        largest = (largest * factor).abs()
    scale, inverse = gradient.scale_and_inverse(largest.amax(1 - keep), bits)
    codes = torch.empty(channels_last_shape(grad.shape), dtype=torch.int8)
    _round(
        values.data_ptr(),
        *sizes,
        channels_last,
        None if factor is None else factor.data_ptr(),
        inverse.data_ptr(),
        keep == 1,
        (1 << (bits - 1)) - 1,
        int(seed),
        codes.data_ptr(),
        threads(),
    )
    return codes, scale.view([length if d == keep else 1 for d, length in enumerate(grad.shape)])


def _in_order(x: Tensor) -> tuple[Tensor, bool]:
    """The values with no gaps between them, and whether they are in channels-last order: so are those of one pixel."""
    if is_channels_last(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    return x.contiguous(), _sizes(x)[2] == 1


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(samples, channels, pixels)"""
    return x.shape[0], x.shape[1], prod(x.shape[2:])
