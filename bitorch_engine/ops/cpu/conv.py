"""Integer convolutions of packed weights: forward and the gradient of the input."""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.cpu import binary, linear
from bitorch_engine.ops.cpu.arranged import arranged
from bitorch_engine.ops.cpu.bits import dense
from bitorch_engine.ops.cpu.geometry import Geometry, geometry, hashable, is_narrow
from bitorch_engine.ops.cpu.loading import DTYPES, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.cpu.plans import PlannedConv, can_plan, fits, is_short, make_plan, planned, with_short_bias
from bitorch_engine.ops.library import Plan
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import is_channels_last, new_output

_arranged_values = function("be_qconv_arranged_values", POINTER, INT, INT, result=INT64)
_depthwise_phases = function("be_depthwise_phases", POINTER, INT, INT, result=INT64)
_arrange = function("be_qconv_arrange", POINTER, INT, INT, POINTER, INT, INT, POINTER, POINTER, INT)
_qconv = function("be_qconv", *[POINTER] * 11, result=INT)
_depthwise_bytes = function("be_depthwise_arranged_bytes", POINTER, INT, INT, result=INT64)
_depthwise_lanes = function("be_depthwise_lanes", POINTER, INT, INT, result=INT64)
_depthwise_arrange = function("be_depthwise_arrange", POINTER, INT, INT, POINTER, INT, POINTER, POINTER)
_depthwise = function("be_depthwise", *[POINTER] * 11, result=INT)
_planned_qconv, _planned_depthwise = planned("be_qconv_planned"), planned("be_depthwise_planned")

_FLOATS, _CODES, _GRADIENT = 0, 1, 2  # SourceKind of csrc/qconv/image.h
_DEEPEST = 1 << 16  # products a result: up to here, 255 * 128 times as many fit 32 bits

_LARGEST_IMAGE = 1 << 30
"""Bytes of a padded image, at most; the reference makes none."""

_Triple = ctypes.c_int64 * 3


class _Arguments(ctypes.Structure):
    """QconvArguments of csrc/qconv/qconv.h."""

    _fields_ = (
        ("geometry", Geometry),
        *((name, ctypes.c_int64) for name in ("scatter", "rows_are_results", "source", "x_dtype", "x_sample")),
        ("x_channel", ctypes.c_int64),
        ("x_step", _Triple),
        *((name, ctypes.c_int64) for name in ("x_bits", "w_bits", "w_arranged_bits", "out_dtype", "out_bytes")),
        *((name, ctypes.c_int64) for name in ("out_zero", "out_sample", "out_channel")),
        ("out_step", _Triple),
        ("threads", ctypes.c_int64),
    )


class _Problem:
    """One use of the engine for one set of shapes: the arguments that do not change from call to call."""

    def __init__(
        self,
        x: tuple[int, ...],
        out: tuple[int, ...],
        weight_shape: tuple[int, ...],
        convolution: Convolution,
        forward: bool,
        x_strides: tuple[int, ...],
        out_strides: tuple[int, ...],
        **fields: int,
    ) -> None:
        c = convolution
        self.weights = math.prod(weight_shape)
        self.arguments = _Arguments(**fields)
        if c.transposed:
            place = geometry(out, weight_shape, c.stride, c.padding, c.dilation, c.groups, out=x)
        else:
            place = geometry(x, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
        self.arguments.geometry = place
        self.arguments.scatter = forward == c.transposed
        self.arguments.rows_are_results = forward
        _set_strides(self.arguments, "x", x_strides)
        _set_strides(self.arguments, "out", out_strides)
        self.address = ctypes.addressof(self.arguments)
        # What the order of the weights depends on; where nothing scatters, not on the sizes of the maps.
        self.narrow = is_narrow(place, self.arguments.scatter)
        self.order: tuple[Any, ...] = (weight_shape, c.groups, forward)
        if self.arguments.scatter:
            self.order += (c, x if forward == c.transposed else out)

    def arrange(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The weight in the engine's order, and the sums of its codes: of each phase, or of each tap."""
        a = self.arguments
        packed = dense(packed, self.weights, a.w_bits)
        place = (ctypes.addressof(a.geometry), a.scatter, a.rows_are_results)
        if self.narrow:
            weights = torch.empty(_depthwise_bytes(*place), dtype=torch.uint8)
            sums = torch.empty(_depthwise_phases(*place), _depthwise_lanes(*place), dtype=torch.int32)
            _depthwise_arrange(*place, packed.data_ptr(), a.w_bits, weights.data_ptr(), sums.data_ptr())
            return weights, sums
        g = a.geometry
        blocks = g.groups * -(-((g.in_channels if a.scatter else g.out_channels) // g.groups) // 16)
        weights = torch.empty(_arranged_values(*place) * a.w_arranged_bits // 8, dtype=torch.uint8)
        sums = torch.empty(math.prod(g.kernel), blocks * 16, dtype=torch.int32)
        _arrange(*place, packed.data_ptr(), a.w_bits, a.w_arranged_bits, weights.data_ptr(), sums.data_ptr(), threads())
        return weights, sums

    def run(
        self,
        x: Tensor,
        packed: Tensor,
        factor: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        low: Tensor | None = None,
        sample_factor: Tensor | None = None,
        bias: Tensor | None = None,
        poison: Tensor | None = None,
        *,
        keep: bool,
    ) -> Tensor:
        weights, sums = arranged(packed, self.order, lambda: self.arrange(packed), keep=keep)
        not_finite = (_depthwise if self.narrow else _qconv)(
            self.address,
            x.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if low is None else low.data_ptr(),
            weights.data_ptr(),
            sums.data_ptr(),
            factor.data_ptr(),
            None if sample_factor is None else sample_factor.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if poison is None else poison.data_ptr(),
            out.data_ptr(),
        )
        return out.fill_(math.nan) if not_finite else out


@lru_cache(maxsize=1024)
def _problem(
    kind: int,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    fields: tuple[Any, ...],
    x_strides: tuple[int, ...],
    a_bit: int,
    w_bit: int,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    channels_last: bool | None,
    thread_count: int,
) -> tuple[_Problem, tuple[int, ...], tuple[int, ...]] | None:
    """(problem, shape of the result, its strides), or None for what the kernel does not have.

    channels_last: of the result; None: as x.
    """
    if channels_last is None:
        channels_last = is_channels_last(torch.empty_strided(shape, x_strides, device="meta"))
    convolution = Convolution(*fields)
    out = tuple(convolution.output_shape(shape, weight_shape))
    taps = math.prod(weight_shape[2:])
    deepest = max(shape[1], out[1]) // convolution.groups * taps
    if _image_bytes(convolution, shape, out, weight_shape) > max(_LARGEST_IMAGE, 16 * math.prod(shape)):
        return None
    if {x_dtype, out_dtype} - DTYPES.keys() or len(shape) > 5 or not 0 < deepest < _DEEPEST or min(*shape, *out) < 1:
        return None
    forward = kind != _GRADIENT
    result = out if forward else shape
    strides = new_output(torch.empty(0, device="meta"), result, out_dtype, channels_last).stride()
    problem = _Problem(
        shape,
        out,
        weight_shape,
        convolution,
        forward,
        x_strides or (0,) * len(shape),
        strides,
        source=kind,
        x_dtype=DTYPES[x_dtype],
        x_bits=a_bit,
        w_bits=w_bit,
        w_arranged_bits=w_bit if kind == _FLOATS else 8,  # what is used once is not packed again
        out_dtype=DTYPES[out_dtype],
        threads=thread_count,
    )
    return problem, result, strides


def _image_bytes(c: Convolution, shape: Sequence[int], out: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Of the padded image, either way; by and large, and no less."""
    sides = zip(shape[2:], out[2:], weight_shape[2:], c.stride, c.padding, c.dilation, strict=True)
    padded = math.prod(max(n, m) * s + 2 * p + (k - 1) * d + sum(c.pad) for n, m, k, s, p, d in sides)
    return shape[0] * max(shape[1], out[1]) * padded


def _read_as_float32(scale: Tensor, low: Tensor, channel_scale: Tensor) -> bool:
    """Whether the kernel reads these as they lie in memory; in a layer that was cast, it does not."""
    wanted = torch.float32
    same = scale.dtype is wanted and low.dtype is wanted and channel_scale.dtype is wanted
    return same and channel_scale.is_contiguous()


def conv(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    *fields: Any,
) -> Tensor:
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    if not _read_as_float32(scale, low, channel_scale) or not fits(bias, channel_scale.numel()):
        return reference.conv(x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *fields)
    suits = binary.suits if a_bit == 1 else binary.suits_pairs
    if a_bit == w_bit <= 2 and suits(x.shape, a_bit, w_bit, weight_shape, *fields):
        return binary.conv(x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *fields)
    found = _problem(
        _FLOATS,
        x.shape,
        tuple(weight_shape),
        hashable(fields),
        x.stride(),
        a_bit,
        w_bit,
        x.dtype,
        x.dtype,
        None,
        threads(),
    )
    if found is None:
        return reference.conv(x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *fields)
    problem, shape, strides = found
    y = torch.empty_strided(shape, strides, dtype=x.dtype)
    if linear.quantizes_one_row(x, weight_shape, w_bit):
        kernel, structure = linear.quantized_row(scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape)
        return y.fill_(math.nan) if kernel(ctypes.byref(structure), x.data_ptr(), y.data_ptr()) else y
    return problem.run(x, packed, channel_scale, y, scale, low, bias=bias, keep=True)


def plan(
    sources: Sequence[Tensor] | None,
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    *fields: Any,
) -> Plan | None:
    """A plan of ``conv``."""
    if is_short(bias):
        head = (x, scale, low, a_bit, packed, channel_scale, w_bit)
        return with_short_bias(lambda copy: plan(sources, *head, copy, weight_shape, *fields), bias)
    if not can_plan(sources, packed, channel_scale, bias, scale, low):
        return None
    layer = (sources, packed, channel_scale, bias)
    suits = binary.suits if a_bit == 1 else binary.suits_pairs
    if a_bit == w_bit <= 2 and suits(x.shape, a_bit, w_bit, weight_shape, *fields):
        found_binary = binary.planned_conv(x, a_bit, packed, weight_shape, *fields)
        return None if found_binary is None else found_binary.plan(x.dtype, scale, low, *layer)
    key = (_FLOATS, x.shape, tuple(weight_shape), hashable(fields), x.stride())
    found = _problem(*key, a_bit, w_bit, x.dtype, x.dtype, None, threads())
    if found is None:
        return None
    problem, shape, strides = found
    if linear.quantizes_one_row(x, weight_shape, w_bit):
        kernel, structure = linear.quantized_row(scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape)
        return make_plan(kernel, structure, shape, strides, x.dtype, *layer, scale, low)
    weights, sums = arranged(packed, problem.order, lambda: problem.arrange(packed), keep=True)
    kernel = _planned_depthwise if problem.narrow else _planned_qconv
    return PlannedConv(kernel, problem, weights, sums, shape, strides).plan(x.dtype, scale, low, *layer)


def conv_codes(
    codes: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    low: Tensor,
    poison: Tensor,
    a_bit: int,
    packed: Tensor,
    channel_scale: Tensor,
    w_bit: int,
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    head = (codes, shape, scale, low, poison, a_bit, packed, channel_scale, w_bit)
    if not _read_as_float32(scale, low, channel_scale):
        return reference.conv_codes(*head, weight_shape, *rest)
    if binary.suits(shape, a_bit, w_bit, weight_shape, *fields):
        return binary.conv_codes(*head, weight_shape, *rest)
    found = _problem(
        _CODES,
        tuple(shape),
        tuple(weight_shape),
        hashable(fields),
        (),
        a_bit,
        w_bit,
        torch.float32,
        dtype,
        channels_last,
        threads(),
    )
    if found is None:
        return reference.conv_codes(*head, weight_shape, *rest)
    codes = dense(codes, math.prod(shape), a_bit)
    problem, result, strides = found
    y = torch.empty_strided(result, strides, dtype=dtype)
    return problem.run(codes, packed, channel_scale, y, scale, low, poison=poison, keep=False)


def conv_grad_input(
    grad_codes: Tensor,
    grad_scale: Tensor,
    packed: Tensor,
    w_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: Any,
) -> Tensor:
    *fields, dtype, channels_last = rest
    found = _problem(
        _GRADIENT,
        tuple(shape),
        tuple(weight_shape),
        hashable(fields),
        (),
        8,
        w_bit,
        torch.float32,
        dtype,
        channels_last,
        threads(),
    )
    if found is None:
        return reference.conv_grad_input(grad_codes, grad_scale, packed, w_bit, shape, weight_shape, *rest)
    problem, result, strides = found
    grad_x = torch.empty_strided(result, strides, dtype=dtype)
    ones = torch.ones(shape[1], dtype=torch.float32)
    return problem.run(grad_codes, packed, ones, grad_x, sample_factor=grad_scale, keep=False)


def _set_strides(arguments: _Arguments, name: str, strides: Sequence[int]) -> None:
    sample, channel, *steps = strides
    setattr(arguments, f"{name}_sample", sample)
    setattr(arguments, f"{name}_channel", channel)
    setattr(arguments, f"{name}_step", _Triple(*[0] * (3 - len(steps)), *steps))
