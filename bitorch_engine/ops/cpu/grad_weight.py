"""The gradient of a packed weight: in integers where activations and gradient are quantized, else in floats."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.cpu.bits import dense, unpack
from bitorch_engine.ops.cpu.geometry import geometry, is_narrow
from bitorch_engine.ops.cpu.loading import FLOAT, INT, INT64, POINTER, current_isa, function, threads
from bitorch_engine.ops.cpu.quantize import activation_values
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution

_ARGUMENTS = (POINTER, INT, POINTER, POINTER, FLOAT, INT, POINTER, POINTER, INT)
_grad_weight = function("be_grad_weight", *_ARGUMENTS)
_depthwise_grad_weight = function("be_depthwise_grad_weight", *_ARGUMENTS)
_columns = function("be_columns", POINTER, POINTER, INT, INT64, INT64, POINTER, INT)
_float_columns = function("be_float_columns", POINTER, POINTER, INT64, INT64, POINTER, INT)
_taps_last = function("be_taps_last", POINTER, *[INT64] * 3, FLOAT, POINTER, INT)

COLUMNS = 1 << 18
"""Floats of a matrix of columns at a time, at most; one result pixel's are the least. They should stay in the cache."""

_FEWEST_CHANNELS = 32
"""Of input and of output: with fewer, columns are not faster."""


def conv_grad_weight(
    grad_codes: Tensor,
    grad_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype = rest
    c = Convolution(*fields)
    if len(shape) > 5 or min(*shape, *grad_codes.shape, *weight_shape) < 1:
        return reference.conv_grad_weight(grad_codes, grad_scale, codes, scale, low, a_bit, shape, weight_shape, *rest)
    out = c.output_shape(shape, weight_shape)
    if c.transposed:
        place = geometry(out, weight_shape, c.stride, c.padding, c.dilation, c.groups, out=shape)
        rows, columns = _bytes(codes, a_bit, prod(shape)), grad_codes.contiguous()
    else:
        place = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
        rows, columns = grad_codes.contiguous(), dense(codes, prod(shape), a_bit)
    grad = torch.empty(list(weight_shape), dtype=torch.float32)
    factor = (grad_scale.to(torch.float32) * scale).reshape(-1).contiguous()
    (_depthwise_grad_weight if is_narrow(place, False) else _grad_weight)(
        place.address,
        not c.transposed,
        rows.data_ptr(),
        columns.data_ptr(),
        float(low),
        a_bit,
        factor.data_ptr(),
        grad.data_ptr(),
        threads(),
    )
    return grad.to(dtype)


def conv_grad_weight_float(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    c = Convolution(*fields)
    if not (grad.dtype is torch.float32 and _goes_by_columns(c, shape, weight_shape, grad.shape)):
        values = activation_values(codes, scale, low, a_bit, shape, grad.dtype, channels_last)
        return c.grad_weight(grad, values, weight_shape).to(dtype)
    values = _bytes(codes, a_bit, prod(shape))
    place = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, 1, c.pad, out=grad.shape)
    fill = partial(_columns, place.address, values.data_ptr(), 1 if a_bit == 1 else int(-low))
    return _sum_columns(grad, fill, float(scale), weight_shape).to(dtype)


def conv_grad_weight_dense(grad: Tensor, x: Tensor, weight_shape: Sequence[int], *fields: Any) -> Tensor:
    c = Convolution(*fields)
    floats = grad.dtype is x.dtype is torch.float32
    if not (floats and _goes_by_columns(c, x.shape, weight_shape, grad.shape)):
        return c.grad_weight(grad, x, weight_shape)
    values = x.movedim(1, -1).contiguous()
    place = geometry(x.shape, weight_shape, c.stride, c.padding, c.dilation, 1, c.pad, out=grad.shape)
    return _sum_columns(grad, partial(_float_columns, place.address, values.data_ptr()), 1.0, weight_shape)


def _sum_columns(grad: Tensor, fill: Callable[..., None], scale: float, weight_shape: Sequence[int]) -> Tensor:
    """``scale`` times the product of gradient and columns. fill(first, count, out, threads): those of result pixels."""
    rows = grad.movedim(1, -1).reshape(-1, weight_shape[0])  # (result pixels, C_out)
    length = prod(weight_shape[1:])
    step = min(rows.shape[0], max(1, COLUMNS // length))
    sizes = ((step, length), (weight_shape[0], length), tuple(weight_shape))
    columns, total, out = (torch.empty(size, dtype=torch.float32) for size in sizes)
    for first in range(0, rows.shape[0], step):
        some = rows[first : first + step]
        fill(first, len(some), columns.data_ptr(), threads())
        total.addmm_(some.T, columns[: len(some)], beta=int(first > 0))
    taps = length // weight_shape[1]
    _taps_last(total.data_ptr(), weight_shape[0], taps, weight_shape[1], scale, out.data_ptr(), threads())
    return out


def _goes_by_columns(
    c: Convolution, shape: Sequence[int], weight_shape: Sequence[int], grad_shape: Sequence[int]
) -> bool:
    """Whether torch's matrix product is faster than its convolution's gradient. With AVX-512 they were not compared.

    Shapes that do not fit each other are left to torch, which says what is wrong.
    """
    plain = 1 <= len(c.stride) <= 3 and not c.transposed and c.groups == 1 and shape[0] > 0
    if not plain or current_isa() != "avx2" or min(weight_shape[:2]) < _FEWEST_CHANNELS:
        return False
    fit = len(shape) == len(weight_shape) == len(c.stride) + 2 and shape[1] == weight_shape[1]
    return fit and list(grad_shape) == c.output_shape(shape, weight_shape)


def _bytes(codes: Tensor, bits: int, count: int) -> Tensor:
    """The indices of activations, one byte each; at 1 bit twice the index. Those of 8 bits are there already."""
    if bits == 8:
        return dense(codes, count, bits)
    index = unpack(codes, bits, count)
    return index * 2 if bits == 1 else index
