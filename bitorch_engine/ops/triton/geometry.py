"""The geometry of a convolution as the Triton kernels take it: lines of results that meet taps of one pattern."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

from bitorch_engine.ops.reference.conv import Convolution

Triple = tuple[int, int, int]


class Phase(NamedTuple):
    """Results, and the taps that they meet; three numbers a field, one a dimension.

    Result j (of ``results``) is element ``first + j * every`` of the map of results. Its tap k (of ``taps``) is tap
    ``tap_first + k * tap_every`` of the weight, and meets element ``origin + j * step + k * tap_step`` of the source.
    """

    origin: Triple
    step: Triple
    tap_step: Triple
    first: Triple
    every: Triple
    results: Triple
    tap_first: Triple
    tap_every: Triple
    taps: Triple


def triple(values: Sequence[int], fill: int = 1) -> Triple:
    """Three numbers for the one to three (or none, of a linear layer) spatial dimensions."""
    a, b, c = (*[fill] * (3 - len(values)), *values)
    return a, b, c


def phases(results: Sequence[int], kernel: Sequence[int], convolution: Convolution, *, scatter: bool) -> list[Phase]:
    """What makes the map of ``results`` (spatial lengths) from a source, by sums over taps.

    Gathering, as a convolution does, is one phase: result y meets source ``y * stride - padding + tap * dilation``.
    Scattering, as its gradient and a transposed convolution do: y meets p where ``y + padding = p * stride + tap *
    dilation``. All y with one remainder modulo the stride meet the same taps; each remainder is a phase.
    """
    c = convolution
    rank = len(results)
    before = [c.padding[i] + (c.pad[2 * (rank - 1 - i)] if c.pad else 0) for i in range(rank)]
    key = tuple(zip(results, kernel, c.stride, before, c.dilation, strict=True))
    return _phases(tuple(tuple(line) for line in key), scatter)


@lru_cache(maxsize=4096)
def _phases(dimensions: tuple[tuple[int, ...], ...], scatter: bool) -> list[Phase]:
    lines = [(_scattered if scatter else _gathered)(*dimension) for dimension in dimensions]
    alone = [(0, 1, 1, 0, 1, 1, 0, 1, 1)]
    return [Phase(*zip(*three, strict=True)) for three in product(*[alone] * (3 - len(lines)), *lines)]


_Line = tuple[int, int, int, int, int, int, int, int, int]  # one dimension of a Phase


def _gathered(results: int, taps: int, stride: int, before: int, dilation: int) -> list[_Line]:
    return [(-before, stride, dilation, 0, 1, results, 0, 1, taps)]


def _scattered(results: int, taps: int, stride: int, before: int, dilation: int) -> list[_Line]:
    lines: list[_Line] = []
    common = gcd(stride, dilation)
    tap_every = stride // common
    for remainder in range(stride):
        first = (remainder - before) % stride
        count = -(-(results - first) // stride)
        if count > 0:
            met = [tap for tap in range(min(taps, tap_every)) if tap * dilation % stride == remainder]
            tap_first = met[0] if met else 0
            tap_count = -(-(taps - tap_first) // tap_every) if met else 0
            origin = (first + before - tap_first * dilation) // stride
            lines.append((origin, 1, -(dilation // common), first, stride, count, tap_first, tap_every, tap_count))
    return lines
