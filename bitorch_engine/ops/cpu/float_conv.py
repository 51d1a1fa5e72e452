"""Convolutions with packed weights and float activations: of few input channels here, of others by torch."""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitorch_engine.ops.cpu import linear
from bitorch_engine.ops.cpu.bits import dense
from bitorch_engine.ops.cpu.geometry import Geometry, geometry, hashable
from bitorch_engine.ops.cpu.loading import current_isa, threads
from bitorch_engine.ops.cpu.plans import can_plan, fits, is_short, make_plan, planned, with_short_bias
from bitorch_engine.ops.cpu.quantize import dequantize, plan_dequantize
from bitorch_engine.ops.library import Plan
from bitorch_engine.ops.reference import float_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import is_channels_last, new_output

_planned = planned("be_float_conv_planned")

_MOST_CHANNELS = {"avx2": reference.FEW_CHANNELS, "avx512": 4, "amx": 4}
"""Input channels up to which the kernel is taken, since it is faster than torch's convolution. With AVX-512 nothing was
measured."""

_DEEPEST = 300
"""Products of a result up to which it is faster in NCHW, where torch does better than channels last."""


class _Planned(ctypes.Structure):
    """PlannedFloatConv of csrc/float_conv/float_conv.cpp."""

    _fields_ = (
        ("geometry", Geometry),
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("bits", "channels_last", "threads")),
    )


class _Problem(NamedTuple):
    """What the kernel knows of one set of shapes. shape, strides: of the result."""

    geometry: Geometry
    channels_last: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def structure(self, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None) -> ctypes.Structure:
        """What the kernel reads besides x."""
        return _Planned(
            self.geometry,
            packed.data_ptr(),
            channel_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            bits,
            self.channels_last,
            threads(),
        )


@lru_cache(maxsize=1024)
def _problem(
    shape: tuple[int, ...], strides: tuple[int, ...], weight_shape: tuple[int, ...], fields: tuple[Any, ...]
) -> _Problem | None:
    """None for what the kernel does not have. The result's memory order is that of torch's convolution."""
    c = Convolution(*fields)
    if c.transposed or c.groups > 1 or not 2 < len(shape) == len(weight_shape) <= 5 or shape[1] != weight_shape[1]:
        return None
    out = tuple(c.output_shape(shape, weight_shape))
    if min(*shape, *weight_shape, *out) < 1 or math.prod(shape[2:]) == 1:
        return None
    if any((k - 1) * d > 4 * n + 64 for k, d, n in zip(weight_shape[2:], c.dilation, shape[2:], strict=True)):
        return None  # lines would be zeros for the most part
    orders = {_strides(shape, channels_last): channels_last for channels_last in (False, True)}
    if strides not in orders:
        return None
    place = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, 1, c.pad, out=out)
    return _Problem(place, orders[strides], out, _strides(out, orders[strides]))


def _strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    return new_output(torch.empty(0, device="meta"), shape, torch.float32, channels_last).stride()


def _suited(x: Tensor, bias: Tensor | None, weight_shape: Sequence[int], fields: tuple[Any, ...]) -> _Problem | None:
    """The problem, where the kernel is faster than torch."""
    if (
        x.dtype is not torch.float32
        or (bias is not None and bias.dtype is not torch.float32)
        or x.dim() != len(weight_shape)
        or weight_shape[1] > _MOST_CHANNELS.get(current_isa(), 0)
    ):
        return None
    found = _problem(x.shape, x.stride(), tuple(weight_shape), hashable(fields))
    return found if found is None or found.channels_last or math.prod(weight_shape[1:]) <= _DEEPEST else None


def conv_weight_only(
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    *fields: Any,
) -> Tensor:
    c = Convolution(*fields)
    if c.transposed or not fits(bias, channel_scale.numel()):
        return reference.conv_weight_only(x, packed, channel_scale, bits, bias, weight_shape, *fields)
    packed = dense(packed, math.prod(weight_shape), bits)
    found = _suited(x, bias, weight_shape, fields)
    if found is None:
        weight = dequantize(packed, channel_scale, bits, math.prod(weight_shape[1:]), x.dtype).view(*weight_shape)
        return reference.convolve(c, x, weight, bias)
    scale = channel_scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_strided(found.shape, found.strides, dtype=torch.float32)
    _planned(ctypes.byref(found.structure(packed, scale, bits, bias)), x.data_ptr(), y.data_ptr())
    return y


def plan(
    sources: Sequence[Tensor] | None,
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    *fields: Any,
) -> Plan | None:
    """A plan of ``conv_weight_only``, the kernel's or torch's."""
    if is_short(bias):
        head = (sources, x, packed, channel_scale, bits)
        return with_short_bias(lambda copy: plan(*head, copy, weight_shape, *fields), bias)
    if x.dtype is not torch.float32 or not can_plan(sources, packed, channel_scale, bias):
        return None
    packed = dense(packed, math.prod(weight_shape), bits)
    convolution = Convolution(*fields)
    if _is_of_pixels(x, weight_shape, convolution):  # as in squeeze and excitation
        out = (x.shape[0], weight_shape[0], *x.shape[2:])
        rows = (sources, x.shape[0], packed, channel_scale, bits, bias, x.shape[1])
        of_rows = linear.plan_rows(*rows, 3, out, _strides(out, False))
        if of_rows is not None:
            return of_rows
    found = _suited(x, bias, weight_shape, fields)
    if found is None:
        return _plan_of_torch(x, packed, channel_scale, bits, bias, weight_shape, convolution)
    structure = found.structure(packed, channel_scale, bits, bias)
    return make_plan(_planned, structure, found.shape, found.strides, x.dtype, sources, packed, channel_scale, bias)


def _is_of_pixels(x: Tensor, weight_shape: Sequence[int], c: Convolution) -> bool:
    """Whether a linear layer gives the same: images and kernels have a single pixel."""
    single = math.prod(x.shape[2:]) == 1 == math.prod(weight_shape[2:])
    plain = c.groups == 1 and not c.transposed and not any(c.padding) and not c.pad
    return single and plain and x.dim() == len(weight_shape) > 2 and x.shape[1] == weight_shape[1] and x.is_contiguous()


def _plan_of_torch(
    x: Tensor,
    packed: Tensor,
    channel_scale: Tensor,
    bits: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    convolution: Convolution,
) -> Plan | None:
    """The weight becomes floats in every call, for torch's convolution."""
    if x.dim() != len(weight_shape):
        return None
    transposed = convolution.transposed
    channels_last, shape = is_channels_last(x), tuple(weight_shape)
    if transposed:  # rows are output channels, which torch reads across
        shape, channels_last = (channel_scale.numel(), weight_shape[0] // convolution.groups, *weight_shape[2:]), False
    taps = math.prod(weight_shape[2:]) if channels_last else 1
    decode = plan_dequantize(packed, channel_scale, bits, shape, _strides(shape, channels_last), taps)

    def convolve(
        x_now: Tensor,
        sources_now: Sequence[Tensor] | None,
        packed_now: Tensor,
        channel_scale_now: Tensor,
        bias_now: Tensor | None,
    ) -> Tensor | None:
        if bias_now is not bias or (bias is not None and bias.dtype is not torch.float32):
            return None
        weight = decode(x_now, None, packed_now, channel_scale_now, None)
        if weight is None:
            return None
        if transposed:
            weight = _across(weight, weight_shape, convolution, is_channels_last(x_now))
        return convolution.forward(x_now, weight, bias)

    return convolve


def _across(rows: Tensor, weight_shape: Sequence[int], convolution: Convolution, channels_last: bool) -> Tensor:
    """The weight of a transposed convolution, of rows of output channels. Channels last it is a matrix turned about,
    which torch does in less time than it changes an order of dimensions."""
    if convolution.groups > 1:
        return convolution.from_rows(rows, weight_shape)
    if not channels_last:
        return rows.transpose(0, 1).contiguous()
    turned = rows.flatten(1).t().contiguous()
    return turned.view(weight_shape[0], *weight_shape[2:], weight_shape[1]).movedim(-1, 1)
