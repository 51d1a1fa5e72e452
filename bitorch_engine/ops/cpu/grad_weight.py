"""The gradient of a packed weight from quantized gradients and activations, in integers."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.cpu.geometry import geometry, is_narrow
from bitorch_engine.ops.cpu.loading import FLOAT, INT, POINTER, function, threads
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.bits import unpack
from bitorch_engine.ops.reference.conv import Convolution

_ARGUMENTS = (POINTER, INT, POINTER, POINTER, FLOAT, INT, POINTER, POINTER, INT)
_grad_weight = function("be_grad_weight", *_ARGUMENTS)
_depthwise_grad_weight = function("be_depthwise_grad_weight", *_ARGUMENTS)


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
        rows, columns = _bytes(codes, a_bit, prod(shape)), grad_codes
    else:
        place = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
        rows, columns = grad_codes, codes
    grad = torch.empty(list(weight_shape), dtype=torch.float32)
    factor = (grad_scale.to(torch.float32) * scale).reshape(-1).contiguous()
    (_depthwise_grad_weight if is_narrow(place, False) else _grad_weight)(
        place.address,
        not c.transposed,
        rows.contiguous().data_ptr(),
        columns.contiguous().data_ptr(),
        float(low),
        a_bit,
        factor.data_ptr(),
        grad.data_ptr(),
        threads(),
    )
    return grad.to(dtype)


def _bytes(codes: Tensor, bits: int, count: int) -> Tensor:
    index = unpack(codes, bits, count)
    return index * 2 if bits == 1 else index
