"""Convolutions of activations of 1 bit with weights of 1 bit, and of 2 bits with 2 bits: without a multiplication."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.cpu.arranged import arranged
from bitorch_engine.ops.cpu.bits import dense
from bitorch_engine.ops.cpu.geometry import Geometry, geometry, hashable
from bitorch_engine.ops.cpu.loading import DTYPES, INT, INT64, POINTER, current_isa, function, threads
from bitorch_engine.ops.cpu.plans import PlannedConv, planned
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution
from bitorch_engine.ops.reference.layout import is_channels_last, new_output

_arranged_words = function("be_binary_arranged_words", POINTER, INT, result=INT64)
_arrange = function("be_binary_arrange", POINTER, INT, POINTER, POINTER, INT)
_has = function("be_binary_has", POINTER, INT, result=INT)
_conv = function("be_binary_conv", *[POINTER] * 9)
_planned = planned("be_binary_planned")

_DEEPEST = 1 << 22  # products a result: float32 holds every total
_FEWEST = 12  # channels of a group: with fewer, most of a 32-bit word is empty, and bytes are faster on every ISA

_Strides = ctypes.c_int64 * 5


class _Arguments(ctypes.Structure):
    """BinaryArguments of csrc/binary/binary.cpp."""

    _fields_ = (
        ("geometry", Geometry),
        ("bits", ctypes.c_int64),
        ("codes", ctypes.c_int64),
        ("x_dtype", ctypes.c_int64),
        ("x_strides", _Strides),
        ("out_dtype", ctypes.c_int64),
        ("out_strides", _Strides),
        ("threads", ctypes.c_int64),
    )


def suits(shape: Sequence[int], a_bit: int, w_bit: int, weight_shape: Sequence[int], *fields: Any) -> bool:
    """Whether this is the kernel for activations of ``shape`` and that geometry."""
    _, _, _, transposed, *_ = fields
    return a_bit == 1 and w_bit == 1 and not transposed and weight_shape[1] >= _FEWEST


def suits_pairs(shape: Sequence[int], a_bit: int, w_bit: int, weight_shape: Sequence[int], *fields: Any) -> bool:
    """The same for 2 bits: only where products are looked up. For inference: to arrange the weight takes a while."""
    _, _, _, transposed, *_ = fields
    if a_bit != 2 or w_bit != 2 or transposed or weight_shape[1] < _FEWEST or len(shape) > 5:
        return False
    return _are_looked_up(tuple(shape), tuple(weight_shape), hashable(fields), current_isa())


@lru_cache(maxsize=1024)
def _are_looked_up(shape: tuple[int, ...], weight_shape: tuple[int, ...], fields: tuple[Any, ...], isa: str) -> bool:
    c = Convolution(*fields)
    out = c.output_shape(shape, weight_shape)
    if isa != "avx2" or min(*shape, *out) < 1:
        return False
    place = geometry(shape, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
    return bool(_has(place.address, 2))


class _Problem:
    """The arguments of the kernel that do not change from call to call."""

    def __init__(
        self,
        shape: tuple[int, ...],
        out: tuple[int, ...],
        weight_shape: tuple[int, ...],
        convolution: Convolution,
        x_dtype: torch.dtype,
        x_strides: tuple[int, ...],
        dtype: torch.dtype,
        channels_last: bool,
        thread_count: int,
        bits: int,
    ) -> None:
        c = convolution
        self.out, self.weights = out, prod(weight_shape)
        self.strides = new_output(torch.empty(0, device="meta"), out, dtype, channels_last).stride()
        self.arguments = _Arguments(
            geometry(shape, weight_shape, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out),
            bits,
            not x_strides,
            DTYPES[x_dtype],
            _five(x_strides or (0,) * len(shape)),
            DTYPES[dtype],
            _five(self.strides),
            thread_count,
        )
        self.address = ctypes.addressof(self.arguments)
        self.order = ("binary", bits, weight_shape, c.groups)  # what the order of the weights depends on

    def arrange(self, packed: Tensor) -> Tensor:
        """The weight in the kernel's order."""
        place, bits = ctypes.addressof(self.arguments.geometry), self.arguments.bits
        packed = dense(packed, self.weights, bits)
        weights = torch.empty(_arranged_words(place, bits), dtype=torch.int32)
        _arrange(place, bits, packed.data_ptr(), weights.data_ptr(), self.arguments.threads)
        return weights

    def run(
        self,
        x: Tensor,
        scale: Tensor,
        low: Tensor,
        packed: Tensor,
        channel_scale: Tensor,
        bias: Tensor | None,
        poison: Tensor | None,
        dtype: torch.dtype,
        *,
        keep: bool,
    ) -> Tensor:
        weights = arranged(packed, self.order, lambda: self.arrange(packed), keep=keep)
        y = torch.empty_strided(self.out, self.strides, dtype=dtype)
        _conv(
            self.address,
            x.data_ptr(),
            scale.data_ptr(),
            low.data_ptr(),
            weights.data_ptr(),
            channel_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if poison is None else poison.data_ptr(),
            y.data_ptr(),
        )
        return y


@lru_cache(maxsize=1024)
def _problem(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    fields: tuple[Any, ...],
    x_dtype: torch.dtype,
    x_strides: tuple[int, ...],
    dtype: torch.dtype,
    thread_count: int,
    channels_last: bool | None = None,
    bits: int = 1,
) -> _Problem | None:
    """x_strides: empty where x are codes, and then channels_last is given. None for what the kernel does not have."""
    if channels_last is None:
        channels_last = is_channels_last(torch.empty_strided(shape, x_strides, device="meta"))
    convolution = Convolution(*fields)
    out = tuple(convolution.output_shape(shape, weight_shape))
    if {x_dtype, dtype} - DTYPES.keys() or len(shape) > 5 or prod(weight_shape[1:]) > _DEEPEST or min(*shape, *out) < 1:
        return None
    return _Problem(shape, out, weight_shape, convolution, x_dtype, x_strides, dtype, channels_last, thread_count, bits)


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
    """The op ``conv`` for what ``suits``, or ``suits_pairs``. bias: dense float32, or None."""
    key = (x.shape, tuple(weight_shape), hashable(fields), x.dtype, x.stride(), x.dtype, threads())
    problem = _problem(*key, bits=a_bit)
    if problem is None:
        return reference.conv(x, scale, low, a_bit, packed, channel_scale, w_bit, bias, weight_shape, *fields)
    return problem.run(x, scale, low, packed, channel_scale, bias, None, x.dtype, keep=True)


def planned_conv(x: Tensor, bits: int, packed: Tensor, weight_shape: Sequence[int], *fields: Any) -> PlannedConv | None:
    """What a plan of ``conv`` is made of, for what ``suits``, or ``suits_pairs``."""
    key = (x.shape, tuple(weight_shape), hashable(fields), x.dtype, x.stride(), x.dtype, threads())
    problem = _problem(*key, bits=bits)
    if problem is None:
        return None
    weights = arranged(packed, problem.order, lambda: problem.arrange(packed), keep=True)
    return PlannedConv(_planned, problem, weights, None, problem.out, problem.strides)


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
    """The op ``conv_codes`` for what ``suits``."""
    *fields, dtype, channels_last = rest
    key = (tuple(shape), tuple(weight_shape), hashable(fields))
    problem = _problem(*key, torch.float32, (), dtype, threads(), channels_last)
    if problem is None:
        head = (codes, shape, scale, low, poison, a_bit, packed, channel_scale, w_bit)
        return reference.conv_codes(*head, weight_shape, *rest)
    codes = dense(codes, prod(shape), a_bit)
    return problem.run(codes, scale, low, packed, channel_scale, None, poison, dtype, keep=False)


def _five(strides: Sequence[int]) -> Any:
    """In the order of (N, C, depth, height, width)."""
    sample, channel, *steps = strides
    return _Strides(sample, channel, *[0] * (3 - len(steps)), *steps)
