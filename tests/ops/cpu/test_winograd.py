"""Winograd's algorithm: where it is used, and that its whole numbers are right to the last bit at both ends."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu.geometry import geometry
from bitorch_engine.ops.cpu.loading import INT, POINTER, function
from tests.ops.cpu.test_conv import CASES, Case, Operands, operands, run_codes, with_integers

pytestmark = pytest.mark.skipif("avx2" not in cpu.available_isas(), reason="the kernels for AVX2 cannot run here")

_suits = function("be_winograd_suits", POINTER, INT, INT, INT, result=INT)


def suits(case: Case, a_bit: int = 8, w_bit: int = 4) -> bool:
    c = case.convolution
    out = tuple(c.output_shape(case.shape, case.weight))
    if c.transposed:
        place = geometry(out, case.weight, c.stride, c.padding, c.dilation, c.groups, out=case.shape)
    else:
        place = geometry(case.shape, case.weight, c.stride, c.padding, c.dilation, c.groups, c.pad, out=out)
    with cpu.cap_isa("avx2"):
        return bool(_suits(place.address, c.transposed, a_bit, w_bit))


def square(channels: int, side: int, **changes: object) -> Case:
    return Case((1, channels, side, side), (channels, channels, 3, 3), padding=(1,))._replace(**changes)


def test_the_cases_of_the_agreement_tests_that_are_named_so_go_this_way() -> None:
    named = [case for name, case in CASES.items() if name.startswith("winograd")]
    assert named
    assert all(suits(case, w_bit=w_bit) for case in named for w_bit in range(1, 9))


def test_it_is_used_where_it_saves_most_products() -> None:
    assert suits(square(64, 56))
    assert suits(square(128, 28))
    assert not suits(square(512, 7))  # four tiles, of which each prepares all weights
    assert not suits(square(8, 32))  # half of the channels would be padding
    assert not suits(square(64, 56, stride=(2,)))
    assert not suits(square(64, 56, dilation=(2,), padding=(2,)))
    assert not suits(square(64, 56, weight=(64, 64, 3, 1), padding=(1, 0)))
    assert not suits(Case((1, 64, 9, 16, 16), (64, 64, 1, 3, 3), padding=(0, 1, 1)))


@pytest.mark.parametrize("w_bit", range(1, 9))
def test_the_largest_sums_are_exact(w_bit: int) -> None:
    """All codes at one end of their range, and in a chessboard of both ends, which the transforms make largest."""
    case = CASES["winograd-of-deep-images"]
    board = (torch.arange(12).view(-1, 1) + torch.arange(12)) % 2
    taps = (torch.arange(3).view(-1, 1) + torch.arange(3)) % 2
    with cpu.cap_isa("avx2"):
        for ends, weight_ends in itertools.product(((0, 0), (255, 255), (0, 255)), ((0, 0), (1, 1), (0, 1), (1, 0))):
            index = torch.where(board.bool(), *ends).to(torch.uint8).expand(case.shape)
            top = (1 << w_bit) - 1
            weight_index = (
                torch.where(taps.bool(), *(top * end for end in weight_ends)).to(torch.uint8).expand(case.weight)
            )
            o = with_integers(case, 8, w_bit, index.contiguous(), 0, weight_index.contiguous())
            assert torch.equal(run_codes(o), o.expected())


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(13, 140), st.integers(8, 21), st.integers(8, 21)),
    st.integers(9, 70),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
)
def test_any_map_is_exact(
    shape: tuple[int, ...], results: int, padding: tuple[int, int], a_bit: int, w_bit: int, at_the_ends: bool
) -> None:
    case = Case(shape, (results, shape[1], 3, 3), padding=padding)
    o = operands(case, a_bit, w_bit)
    if at_the_ends:
        index = torch.randint(0, 2, shape, dtype=torch.uint8) * ((1 << a_bit) - 1)
        weight_index = torch.randint(0, 2, case.weight, dtype=torch.uint8) * ((1 << w_bit) - 1)
        o = with_integers(case, a_bit, w_bit, index, int(o.low), weight_index)
    with cpu.cap_isa("avx2"):
        assert torch.equal(run_codes(o), o.expected())


def check_grad_weight(o: Operands, grad: Tensor) -> None:
    """grad: whole numbers, -128 .. 127. In integers the gradient is that of autograd, in float64, to the last bit."""
    shape, one = o.case.shape, torch.ones(())
    scale = torch.rand(1, grad.shape[1], 1, 1)
    head = (grad.to(torch.int8).movedim(1, -1).contiguous(), scale, o.packed_codes(), one, o.low, o.a_bit)
    weight = torch.zeros(o.case.weight, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (total,) = torch.autograd.grad(o.case.expected(o.codes, weight), weight, grad.double())
    with cpu.cap_isa("avx2"):
        found = ops.conv_grad_weight(*head, shape, *o.geometry, torch.float32)
    assert torch.equal(found, total.float() * scale.view(-1, 1, 1, 1))


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 21), st.integers(1, 21)),
    st.integers(1, 40),
    st.integers(1, 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 8),
    st.booleans(),
)
def test_the_gradient_of_the_weight_of_any_map_is_exact(
    shape: tuple[int, ...], results: int, groups: int, padding: tuple[int, int], a_bit: int, at_the_ends: bool
) -> None:
    batch, channels, height, width = shape
    case = Case((batch, groups * channels, height, width), (groups * results, channels, 3, 3), (1,), padding)
    o = operands(case._replace(groups=groups), a_bit)
    grad = torch.randint(-128, 128, (batch, groups * results, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2))
    if at_the_ends:
        index = torch.randint(0, 2, o.index.shape, dtype=torch.uint8) * ((1 << a_bit) - 1)
        o, grad = o._replace(index=index), grad % 2 * 255 - 128
    check_grad_weight(o, grad)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_gradient_of_the_weight_is_that_with_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_grad_weight(
            o := operands(square(20, 61)), torch.randint(-128, 128, o.case.shape)
        )  # which share the tiles
        check_grad_weight(o := operands(square(140, 9)), torch.randint(-128, 128, o.case.shape))  # or the results
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("index", "code"), list(itertools.product((0, 255), (-128, 127))))
def test_the_largest_gradient_of_a_weight_is_exact(index: int, code: int) -> None:
    case = square(17, 40, shape=(5, 17, 40, 40))
    o = operands(case, signed=False)._replace(index=torch.full(case.shape, index, dtype=torch.uint8))
    check_grad_weight(o, torch.full(case.shape, code))


def test_a_gradient_of_the_weight_beyond_32_bits_is_exact() -> None:
    case = square(2, 257)
    o = operands(case, signed=False)._replace(index=torch.full(case.shape, 255, dtype=torch.uint8))
    check_grad_weight(o, torch.full(case.shape, -128))
