"""Result pixels grouped by the taps that lie inside of the image: none is forgotten, and no product that counts is."""

import ctypes
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu.geometry import Geometry, geometry
from bitorch_engine.ops.cpu.loading import INT64, POINTER, function

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")

_regions = function("be_qconv_regions", POINTER, INT64, INT64, POINTER, result=INT64)


class Span(NamedTuple):
    """Result positions of one dimension, and the taps that they read."""

    positions: range
    taps: range


def regions(place: Geometry, tile_pixels: int, preparation: int = 0) -> list[tuple[Span, ...]]:
    count = _regions(place.address, tile_pixels, preparation, None)
    spans = (ctypes.c_int64 * 4 * 3 * count)()
    assert _regions(place.address, tile_pixels, preparation, ctypes.addressof(spans)) == count
    return [
        tuple(Span(range(first, first + some), range(low, high)) for first, some, low, high in region)
        for region in spans
    ]


def taps_inside(place: Geometry, d: int, position: int) -> set[int]:
    reads = {k: position * place.stride[d] + k * place.dilation[d] - place.pad[d] for k in range(place.kernel[d])}
    return {k for k, at in reads.items() if 0 <= at < place.in_[d]}


def of_a_map(channels: int, side: int, kernel: int = 3, padding: int = 1, batch: int = 1) -> Geometry:
    shape, out = (batch, channels, side, side), (batch, channels, *[side + 2 * padding - kernel + 1] * 2)
    return geometry(shape, (channels, channels, kernel, kernel), (1, 1), (padding,) * 2, (1, 1), 1, out=out)


@st.composite
def any_geometry(draw: Callable[..., int]) -> Geometry:
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    rank = number(1, 3)
    kernel, stride, dilation = ([number(1, most) for _ in range(rank)] for most in (5, 3, 3))
    padding = [number(0, 5) for _ in range(rank)]
    size = [number(1, 9) for _ in range(rank)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    assume(min(out) > 0)
    batch, channels = number(1, 40), number(1, 600)
    weight = (channels, channels, *kernel)
    return geometry((batch, channels, *size), weight, stride, padding, dilation, 1, out=(batch, channels, *out))


@given(place=any_geometry(), tile_pixels=st.sampled_from([1, 4, 6]))
def test_regions_have_every_pixel_once_and_every_tap_that_lies_inside(place: Geometry, tile_pixels: int) -> None:
    found = regions(place, tile_pixels)
    pixels = [pixel for region in found for pixel in itertools.product(*(span.positions for span in region))]
    assert sorted(pixels) == list(itertools.product(*(range(count) for count in place.out)))
    for region in found:
        for d, span in enumerate(region):
            for position in span.positions:
                assert taps_inside(place, d, position) <= set(span.taps)


def test_small_maps_leave_all_padding_out() -> None:
    for place in (of_a_map(512, 7), of_a_map(256, 14), of_a_map(128, 9, kernel=5, padding=2, batch=4)):
        for region in regions(place, 4):
            for d, span in enumerate(region):
                for position in span.positions:
                    assert taps_inside(place, d, position) == set(span.taps)


def test_what_is_prepared_for_each_region_speaks_against_several() -> None:
    assert len(regions(of_a_map(512, 7), 4, preparation=3)) < len(regions(of_a_map(512, 7), 4))
    assert len(regions(of_a_map(512, 7, batch=8), 4, preparation=3)) == 9


@pytest.mark.parametrize(
    "place",
    [
        of_a_map(64, 56, kernel=1, padding=0),
        of_a_map(64, 14, padding=0),
        of_a_map(4, 4),  # fewer products than a call is worth
        of_a_map(64, 224),  # less than a hundredth is padding
    ],
    ids=["no-padding-of-1x1", "no-padding-of-3x3", "few-channels", "a-large-map"],
)
def test_a_map_is_one_region_where_nothing_is_gained(place: Geometry) -> None:
    (region,) = regions(place, 4)
    assert [(len(span.positions), len(span.taps)) for span in region] == list(zip(place.out, place.kernel, strict=True))
