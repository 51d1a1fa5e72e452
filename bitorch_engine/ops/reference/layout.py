"""Channels-last order: (N, *spatial, C), the order in which codes of activations and gradients are stored."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the values of (N, C, *spatial) lie in memory in channels-last order, not in the order of the shape.

    There may be gaps between them, as in some of the channels or pixels of a larger tensor: torch's convolutions see
    the same order in these, and give it to their results.
    """
    if x.dim() < 3 or x.is_contiguous() or x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), *([0] if x.shape[0] > 1 else [])):
        stride = x.stride(dim)
        if stride < least:
            return False
        least = stride * x.shape[dim]
    return True


def channels_last_shape(shape: Sequence[int]) -> list[int]:
    """(N, *spatial, C) of (N, C, *spatial)."""
    return [shape[0], *shape[2:], shape[1]]


def in_memory_format(x: Tensor, channels_last: bool) -> Tensor:
    """The same values, with memory in channels-last order or in that of the shape."""
    return new_output(x, x.shape, x.dtype, channels_last).copy_(x)


def new_output(like: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An empty tensor (N, C, *spatial) with memory in that order."""
    if channels_last:
        return like.new_empty(channels_last_shape(shape), dtype=dtype).movedim(-1, 1)
    return like.new_empty(shape, dtype=dtype)
