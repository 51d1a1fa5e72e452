"""The geometry of a convolution as the C++ kernels take it."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_Triple = ctypes.c_int64 * 3


class Geometry(ctypes.Structure):
    """csrc/runtime/geometry.h: a convolution that is not transposed, always with three spatial dimensions."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("in_channels", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("in_", _Triple),
        ("kernel", _Triple),
        ("stride", _Triple),
        ("dilation", _Triple),
        ("pad", _Triple),
        ("out", _Triple),
    )

    @property
    def address(self) -> int:
        """What a kernel takes."""
        return ctypes.addressof(self)


def geometry(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int] = (),
    *,
    out: Sequence[int],
) -> Geometry:
    """Of a convolution, not transposed, of an input of ``shape``, (N, C, *spatial), to one of shape ``out``.

    Arguments as ``ops.Convolution``.
    One object per set of arguments: do not write to it.
    """
    return _geometry(
        tuple(shape),
        tuple(weight_shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        tuple(pad),
        tuple(out),
    )


@lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    pad: tuple[int, ...],
    out: tuple[int, ...],
) -> Geometry:
    rank = len(shape) - 2
    before = [padding[i] + (pad[2 * (rank - 1 - i)] if pad else 0) for i in range(rank)]
    fields: list[tuple[Sequence[int], int]] = [
        (shape[2:], 1),
        (weight_shape[2:], 1),
        (stride, 1),
        (dilation, 1),
        (before, 0),
        (out[2:], 1),
    ]
    triples = [_Triple(*[fill] * (3 - rank), *values) for values, fill in fields]
    return Geometry(shape[0], shape[1], out[1], groups, *triples)


def is_narrow(g: Geometry, scatter: bool) -> bool:
    """Whether groups have so few channels that the kernels of csrc/depthwise/ do less work than those of csrc/qconv/.

    scatter: results are channels of the input, as in csrc/qconv/product.h.
    """
    inputs, outputs = g.in_channels // g.groups, g.out_channels // g.groups
    deep, wide = (outputs, inputs) if scatter else (inputs, outputs)
    # Multiplications, with what fills up blocks of 16 results by 4 channels, and blocks of 32 lanes.
    blocks = g.groups * -(-wide // 16) * 16 * -(-deep // 4) * 4
    lanes = -(-g.groups * wide // 32) * 32 * deep
    return g.groups > 1 and 2 * lanes <= blocks


def hashable(fields: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of an op as a key. Through torch's dispatcher tuples arrive as lists."""
    if fields and type(fields[0]) is tuple and type(fields) is tuple:
        return fields
    return tuple([tuple(field) if isinstance(field, list) else field for field in fields])
