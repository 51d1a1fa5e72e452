"""Integer convolutions of packed weights: forward and the gradient of the input."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bitorch_engine.ops.cpu.arranged import arranged
from bitorch_engine.ops.cpu.geometry import Geometry, geometry
from bitorch_engine.ops.cpu.loading import DTYPES, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import is_channels_last, new_output

_arranged_values = function("be_qconv_arranged_values", POINTER, INT, INT, result=INT64)
_phases = function("be_qconv_phases", POINTER, INT, INT, result=INT64)
_arrange = function("be_qconv_arrange", POINTER, INT, INT, POINTER, INT, INT, POINTER, POINTER, INT)
_qconv = function("be_qconv", *[POINTER] * 11, result=INT)

_FLOATS, _CODES, _GRADIENT = 0, 1, 2  # SourceKind of csrc/qconv/image.h
_DEEPEST = 1 << 16  # products a result: up to here, 255 * 128 times as many fit 32 bits

_Triple = ctypes.c_int64 * 3


class _Arguments(ctypes.Structure):
    """QconvArguments of csrc/qconv/qconv.cpp."""

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
    *fields: object,
) -> Tensor:
    convolution = Convolution(*fields)  # type: ignore[arg-type]
    if x.dtype not in DTYPES or not _fits(x.shape, weight_shape, convolution):
        return reference.conv(
            x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *convolution
        )
    shape = convolution.output_shape(x.shape, weight_shape)
    y = new_output(x, shape, x.dtype, is_channels_last(x))
    arguments = _arguments(x.shape, shape, weight_shape, convolution, forward=True)
    arguments.source, arguments.x_dtype, arguments.x_bits = _FLOATS, DTYPES[x.dtype], a_bit
    _set_strides(arguments, "x", x)
    if bias is not None:
        bias = bias.to(torch.float32)
    _run(arguments, x, scale, low, packed, w_bit, channel_scale, None, bias, None, y, keep=True)
    return y


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
    *rest: object,
) -> Tensor:
    *fields, dtype, channels_last = rest
    convolution = Convolution(*fields)  # type: ignore[arg-type]
    if dtype not in DTYPES or not _fits(shape, weight_shape, convolution):
        return reference.conv_codes(
            codes, shape, scale, low, poison, a_bit, packed, channel_scale, w_bit, weight_shape, *rest  # type: ignore[arg-type]
        )
    out_shape = convolution.output_shape(shape, weight_shape)
    y = new_output(codes, out_shape, dtype, bool(channels_last))  # type: ignore[arg-type]
    arguments = _arguments(shape, out_shape, weight_shape, convolution, forward=True)
    arguments.source, arguments.x_bits = _CODES, a_bit
    _run(arguments, codes, scale, low, packed, w_bit, channel_scale, None, None, poison, y, keep=False)
    return y


def conv_grad_input(
    grad_codes: Tensor,
    grad_scale: Tensor,
    packed: Tensor,
    w_bit: int,
    shape: Sequence[int],
    weight_shape: Sequence[int],
    *rest: object,
) -> Tensor:
    *fields, dtype, channels_last = rest
    convolution = Convolution(*fields)  # type: ignore[arg-type]
    if dtype not in DTYPES or not _fits(shape, weight_shape, convolution):
        return reference.conv_grad_input(
            grad_codes, grad_scale, packed, w_bit, shape, weight_shape, *rest  # type: ignore[arg-type]
        )
    out_shape = convolution.output_shape(shape, weight_shape)
    grad_x = new_output(grad_codes, shape, dtype, bool(channels_last))  # type: ignore[arg-type]
    arguments = _arguments(shape, out_shape, weight_shape, convolution, forward=False)
    arguments.source, arguments.x_bits = _GRADIENT, 8
    ones = torch.ones(shape[1])
    _run(arguments, grad_codes, None, None, packed, w_bit, ones, grad_scale, None, None, grad_x, keep=False)
    return grad_x


def _fits(shape: Sequence[int], weight_shape: Sequence[int], convolution: Convolution) -> bool:
    """Whether the kernel has this problem: up to three dimensions, no empty tensor, sums that fit 32 bits."""
    taps = 1
    for length in weight_shape[2:]:
        taps *= length
    out = convolution.output_shape(shape, weight_shape)
    largest = max(shape[1], out[1]) // convolution.groups * taps
    return len(shape) <= 5 and 0 < largest < _DEEPEST and min(*shape, *out) > 0


def _arguments(
    shape: Sequence[int], out: Sequence[int], weight_shape: Sequence[int], convolution: Convolution, *, forward: bool
) -> _Arguments:
    """forward: the result has ``out``'s shape; otherwise ``shape``'s. A transposed convolution swaps the two inside."""
    c = convolution
    arguments = _Arguments()
    if c.transposed:
        arguments.geometry = geometry(out, weight_shape, c.stride, c.padding, c.dilation, c.groups, out=shape)
    else:
        arguments.geometry = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
    arguments.scatter = forward == c.transposed
    arguments.rows_are_results = forward
    arguments.threads = threads()
    return arguments


def _run(
    arguments: _Arguments,
    x: Tensor,
    scale: Tensor | None,
    low: Tensor | None,
    packed: Tensor,
    w_bit: int,
    factor: Tensor,
    sample_factor: Tensor | None,
    bias: Tensor | None,
    poison: Tensor | None,
    out: Tensor,
    *,
    keep: bool,
) -> None:
    arguments.w_bits = w_bit
    arguments.w_arranged_bits = w_bit if keep else 8  # what is used once is not packed again
    arguments.out_dtype = DTYPES[out.dtype]
    _set_strides(arguments, "out", out)
    g = arguments.geometry
    place = (bytes(g), arguments.scatter, arguments.rows_are_results)  # TODO
    weights, sums = arranged(packed, place, lambda: _arrange_weight(arguments, packed), keep=keep)
    _qconv(
        ctypes.addressof(arguments),
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


def _arrange_weight(arguments: _Arguments, packed: Tensor) -> tuple[Tensor, Tensor]:
    place = (ctypes.addressof(arguments.geometry), arguments.scatter, arguments.rows_are_results)
    values = _arranged_values(*place)
    channels = arguments.geometry.in_channels if arguments.scatter else arguments.geometry.out_channels
    groups = arguments.geometry.groups
    blocks = groups * -(-(channels // groups) // 16)
    weights = torch.empty(values * arguments.w_arranged_bits // 8, dtype=torch.uint8)
    sums = torch.empty(_phases(*place), blocks * 16, dtype=torch.int32)
    _arrange(
        *place,
        packed.data_ptr(),
        arguments.w_bits,
        arguments.w_arranged_bits,
        weights.data_ptr(),
        sums.data_ptr(),
        threads(),
    )
    return weights, sums


def _set_strides(arguments: _Arguments, name: str, tensor: Tensor) -> None:
    sample, channel, *steps = tensor.stride()
    setattr(arguments, f"{name}_sample", sample)
    setattr(arguments, f"{name}_channel", channel)
    setattr(arguments, f"{name}_step", _Triple(*[0] * (3 - len(steps)), *steps))
