"""Plans: calls that a layer repeats, of which all but the input is looked up and handed to the kernel once."""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from bitorch_engine.ops.cpu.loading import INT, POINTER, current_isa, function, threads
from bitorch_engine.ops.library import Plan, is_plain


def planned(name: str) -> Any:
    """A kernel that reads all but its input and its result from one structure. It returns whether all is NaN."""
    return function(name, POINTER, POINTER, POINTER, result=INT)


class _Planned(ctypes.Structure):
    """Planned of csrc/qconv/qconv.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("arguments", "scale", "low", "weights", "sums", "factor", "bias")
    )


def can_plan(packed: Tensor, *others: Tensor | None) -> bool:
    """Whether a plan sees it when one of a layer's tensors changes, and a kernel reads them where they are.

    Those of ``torch.inference_mode`` count no versions, and other processes write to shared ones unseen.
    """
    if packed.is_inference() or packed.is_shared() or not (is_plain(packed) and packed.is_contiguous()):
        return False
    tensors = (t for t in others if t is not None)
    return all(is_plain(t) and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)


def make_plan(
    kernel: Any,
    structure: ctypes.Structure,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    scale: Tensor | None,
    low: Tensor | None,
    packed: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    *used: Any,
) -> Plan:
    """A plan of results of ``shape``. structure: what ``kernel`` reads. used: what else that points to, kept alive.

    ``packed`` is what weights were arranged of: its version tells of writes. Scales and biases are read by every call,
    so that only their places count; ``scale`` and ``low`` are other tensors once they have other values.
    """
    structure.used = used
    address, count, isa = ctypes.byref(structure), threads(), current_isa()  # keeps the structure
    version, place, scale_place = packed._version, packed.data_ptr(), channel_scale.data_ptr()
    bias_place = None if bias is None else bias.data_ptr()
    float32, empty, thread_count = torch.float32, torch.empty_strided, threads

    def plan(
        x: Tensor,
        scale_now: Tensor | None,
        low_now: Tensor | None,
        packed_now: Tensor,
        channel_scale_now: Tensor,
        bias_now: Tensor | None,
    ) -> Tensor | None:
        if (
            packed_now is not packed
            or packed._version != version
            or packed.data_ptr() != place
            or channel_scale_now is not channel_scale
            or channel_scale.data_ptr() != scale_place
            or scale_now is not scale
            or low_now is not low
            or bias_now is not bias
            or (bias is not None and (bias.data_ptr() != bias_place or bias.dtype is not float32))
            or not (channel_scale.is_contiguous() and (bias is None or bias.is_contiguous()))
            or thread_count() != count
            or current_isa() != isa  # the order of the weights depends on it
        ):
            return None
        y = empty(shape, strides, dtype=dtype)
        if kernel(address, x.data_ptr(), y.data_ptr()):
            y.fill_(math.nan)
        return y

    return plan


def is_short(bias: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a bias needs ``with_short_bias``."""
    return bias is not None and bias.dtype in (torch.bfloat16, torch.float16) and is_plain(bias)


def with_short_bias(make: Callable[[Tensor], Plan | None], bias: Tensor) -> Plan | None:
    """The plan that ``make`` makes of a bias, where its floats are not those that kernels read: they read a copy, which
    every call writes anew."""
    with torch.inference_mode(False):  # or it could not be written outside of it
        copy = bias.detach().to(torch.float32)
    made = make(copy)
    if made is None:
        return None

    def plan(
        x: Tensor,
        scale: Tensor | None,
        low: Tensor | None,
        packed: Tensor,
        channel_scale: Tensor,
        bias_now: Tensor | None,
    ) -> Tensor | None:
        if bias_now is not bias or bias.shape != copy.shape:
            return None
        copy.copy_(bias)
        return made(x, scale, low, packed, channel_scale, copy)

    return plan


class PlannedConv(NamedTuple):
    """What a plan of a convolution is made of, whichever kernel does it.

    problem: has the ``address`` of the kernel's arguments.  weights, sums: in the kernel's order.  shape, strides: of
    the result.
    """

    kernel: Any
    problem: Any
    weights: Tensor
    sums: Tensor | None
    shape: Sequence[int]
    strides: Sequence[int]

    def plan(
        self,
        dtype: torch.dtype,
        scale: Tensor,
        low: Tensor,
        packed: Tensor,
        channel_scale: Tensor,
        bias: Tensor | None,
    ) -> Plan:
        """The plan for one layer's tensors; ``can_plan`` them."""
        structure = _Planned(
            self.problem.address,
            scale.data_ptr(),
            low.data_ptr(),
            self.weights.data_ptr(),
            None if self.sums is None else self.sums.data_ptr(),
            channel_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        layer = (scale, low, packed, channel_scale, bias)
        return make_plan(self.kernel, structure, self.shape, self.strides, dtype, *layer, self)
