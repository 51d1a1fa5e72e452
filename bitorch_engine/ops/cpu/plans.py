"""Plans: calls that a layer repeats, of which all but the input is looked up and handed to the kernel once."""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from bitorch_engine.ops import calls
from bitorch_engine.ops.cpu.loading import INT, POINTER, current_isa, function, of_other_sources, threads
from bitorch_engine.ops.library import LISTENERS, Plan, is_plain


def planned(name: str) -> Any:
    """A kernel that reads all but its input and its result from one structure. It returns an Outcome,
    csrc/runtime/watch.h."""
    return function(name, POINTER, POINTER, POINTER, result=INT)


# As compiled code makes its results: torch.empty takes twice as long.
_empty_strided = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]

_CHANGED = 2  # an Outcome
_MOST_SOURCES = 3


class Watch(ctypes.Structure):
    """csrc/runtime/watch.h: numbers that must be what they were."""

    _fields_ = (
        ("places", ctypes.c_void_p * _MOST_SOURCES),
        ("bytes", ctypes.c_int64 * _MOST_SOURCES),
        ("held", (ctypes.c_uint8 * 8) * _MOST_SOURCES),
    )

    def set(self, sources: Sequence[Tensor]) -> None:
        """Watch the numbers of these tensors, of one element each."""
        for i, source in enumerate(sources):
            self.places[i], self.bytes[i] = source.data_ptr(), source.element_size()
            ctypes.memmove(self.held[i], source.data_ptr(), source.element_size())


class _Planned(ctypes.Structure):
    """Planned of csrc/qconv/qconv.h."""

    _fields_ = (
        ("watch", Watch),
        *((name, ctypes.c_void_p) for name in ("arguments", "scale", "low", "weights", "sums", "factor", "bias")),
    )


def can_plan(
    sources: Sequence[Tensor] | None, packed: Tensor, channel_scale: Tensor, bias: Tensor | None, *others: Tensor
) -> bool:
    """Whether a plan sees it when one of a layer's tensors changes, and a kernel reads them where they are.

    Those of ``torch.inference_mode`` count no versions, and other processes write to shared ones unseen. So does
    who writes through ``packed.data``.
    """
    if packed.is_inference() or packed.is_shared() or not (is_plain(packed) and packed.is_contiguous()):
        return False
    if sources is not None and not all(is_plain(t) and t.numel() == 1 for t in sources):
        return False
    if not fits(bias, channel_scale.numel()):
        return False
    tensors = (t for t in (channel_scale, bias, *others) if t is not None)
    return all(is_plain(t) and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)


def fits(bias: Tensor | None, channels: int) -> bool:
    """Whether there is one bias a channel, as kernels read them; torch takes others, or says what is wrong."""
    return bias is None or bias.shape == (channels,)


def make_plan(
    kernel: Any,
    structure: Any,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    sources: Sequence[Tensor] | None,
    packed: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    *used: Any,
) -> Plan:
    """A plan of results of ``shape``. structure: what ``kernel`` reads. used: what else that points to, kept alive.

    ``packed`` is what weights were arranged of: its version tells of writes. Scales and biases are read by every call,
    so that only their places count; the kernel looks at the values of ``sources``.
    """
    if sources is not None:
        structure.watch.set(sources)
    facts = _Facts(
        kernel=ctypes.cast(kernel, ctypes.c_void_p).value,
        structure=ctypes.addressof(structure),
        sources=sources,
        packed=packed,
        channel_scale=channel_scale,
        bias=bias,
        version=packed._version,
        packed_place=packed.data_ptr(),
        scale_place=channel_scale.data_ptr(),
        bias_place=None if bias is None else bias.data_ptr(),
        bias_size=None if bias is None else bias.numel(),
        threads=threads(),
        isa=current_isa(),
        shape=tuple(shape),
        strides=tuple(strides),
        dtype=dtype,
        # Memory that is held is given to no other tensor, which would then be found at the same place.
        held=(structure, used, [t.detach() for t in (packed, channel_scale, bias, *(sources or ())) if t is not None]),
    )
    return functools.partial(_run, kernel, facts) if calls.CALLS is None else calls.CALLS.bind(facts)


class _Facts(NamedTuple):
    """What a plan hands on, and what must be as it was. csrc/python/calls.cpp has the same fields."""

    kernel: int | None
    structure: int
    sources: Sequence[Tensor] | None
    packed: Tensor
    channel_scale: Tensor
    bias: Tensor | None
    version: int
    packed_place: int
    scale_place: int
    bias_place: int | None
    bias_size: int | None
    threads: int
    isa: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    held: Any


def _run(
    kernel: Any,
    facts: _Facts,
    x: Tensor,
    sources: Sequence[Tensor] | None,
    packed: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
) -> Tensor | None:
    """A plan's call. csrc/python/calls.cpp does the same."""
    if (
        sources is not facts.sources
        or packed is not facts.packed
        or channel_scale is not facts.channel_scale
        or bias is not facts.bias
        or packed._version != facts.version
        or packed.data_ptr() != facts.packed_place
        or channel_scale.data_ptr() != facts.scale_place
        or not channel_scale.is_contiguous()
        or threads() != facts.threads
        or current_isa() != facts.isa  # the order of the weights depends on it
    ):
        return None
    if bias is not None and (
        bias.data_ptr() != facts.bias_place
        or bias.numel() != facts.bias_size
        or bias.dtype is not torch.float32
        or not bias.is_contiguous()
    ):
        return None
    y = _empty_strided(facts.shape, facts.strides, facts.dtype)
    if outcome := kernel(facts.structure, x.data_ptr(), y.data_ptr()):
        return None if outcome == _CHANGED else y.fill_(math.nan)
    return y


if calls.CALLS is not None:
    of_tensors = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous
    try:
        calls.CALLS.use(LISTENERS, *of_tensors, _empty_strided, torch.float32, torch.get_num_threads, current_isa)
    except TypeError:
        raise of_other_sources(calls.CALLS.__file__) from None


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
        sources: Sequence[Tensor] | None,
        packed: Tensor,
        channel_scale: Tensor,
        bias_now: Tensor | None,
    ) -> Tensor | None:
        if bias_now is not bias or bias.shape != copy.shape:
            return None
        copy.copy_(bias)
        return made(x, sources, packed, channel_scale, copy)

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
        sources: Sequence[Tensor] | None,
        packed: Tensor,
        channel_scale: Tensor,
        bias: Tensor | None,
    ) -> Plan:
        """The plan for one layer's tensors; ``can_plan`` them."""
        structure = _Planned(
            Watch(),
            self.problem.address,
            scale.data_ptr(),
            low.data_ptr(),
            self.weights.data_ptr(),
            None if self.sums is None else self.sums.data_ptr(),
            channel_scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        layer = (sources, packed, channel_scale, bias)
        return make_plan(self.kernel, structure, self.shape, self.strides, dtype, *layer, self, scale, low)
