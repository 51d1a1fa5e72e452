"""The integer convolution engine, on every instruction set, computes exactly what torch.nn.functional computes."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.bits import bit_format, pack
from bitorch_engine.ops import cpu
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution

ISAS = cpu.available_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels are not compiled")


class Case(NamedTuple):
    """Shapes and geometry of one convolution."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    transposed: bool = False
    output_padding: tuple[int, ...] = (0,)
    groups: int = 1
    pad: tuple[int, ...] = ()

    @property
    def convolution(self) -> Convolution:
        rank = len(self.shape) - 2
        wide = [value * rank if len(value) == 1 else value for value in self[2:5]]
        output_padding = self.output_padding * rank if len(self.output_padding) == 1 else self.output_padding
        return Convolution(*wide, self.transposed, output_padding, self.groups, self.pad)

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    def expected(self, x: Tensor, weight: Tensor) -> Tensor:
        """By torch.nn.functional."""
        c = self.convolution
        rank = len(self.shape) - 2
        if self.transposed:
            transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
            return transposed(x, weight, None, c.stride, c.padding, c.output_padding, c.groups, c.dilation)
        plain = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return plain(F.pad(x, c.pad) if c.pad else x, weight, None, c.stride, c.padding, c.dilation, c.groups)


CASES = {
    "3x3": Case((2, 64, 9, 10), (40, 64, 3, 3), padding=(1,)),
    "3x3-of-a-wide-row": Case((1, 64, 5, 41), (64, 64, 3, 3), padding=(1,)),
    "3x3-of-128-channels-strided": Case((1, 128, 13, 14), (80, 128, 3, 3), stride=(2,), padding=(1,)),
    "3x3-of-short-lines": Case((3, 64, 7, 7), (70, 64, 3, 3), padding=(1,)),
    "3x3-of-many-short-lines": Case((2, 64, 41, 9), (24, 64, 3, 3), padding=(1,)),
    "winograd": Case((1, 64, 15, 16), (48, 64, 3, 3), padding=(1,)),
    "winograd-of-odd-channels": Case((2, 45, 19, 14), (51, 45, 3, 3), padding=(1, 2)),
    "winograd-without-padding": Case((3, 32, 18, 10), (16, 32, 3, 3)),
    "winograd-with-padding-that-differs": Case((1, 64, 15, 15), (64, 64, 3, 3), pad=(3, 0, 1, 2)),
    "winograd-in-panels": Case((2, 16, 32, 33), (130, 16, 3, 3), padding=(1,)),
    "winograd-of-groups": Case((1, 160, 16, 15), (72, 80, 3, 3), padding=(1,), groups=2),
    "winograd-of-deep-images": Case((2, 200, 12, 12), (20, 200, 3, 3), padding=(1,)),
    "winograd-transposed": Case((1, 64, 14, 16), (64, 50, 3, 3), padding=(1,), transposed=True),
    "1x1": Case((2, 128, 5, 7), (130, 128, 1, 1)),
    "1x1-strided": Case((2, 12, 7, 8), (17, 12, 1, 1), stride=(2,)),
    "7x7-of-rgb": Case((1, 3, 23, 21), (20, 3, 7, 7), stride=(2,), padding=(3,)),
    "odd-channels": Case((2, 33, 6, 5), (19, 33, 3, 2), stride=(1, 2), padding=(2, 0)),
    "dilated": Case((1, 5, 12, 13), (7, 5, 3, 3), stride=(2, 3), padding=(2, 1), dilation=(2, 3)),
    "groups": Case((2, 12, 8, 8), (30, 4, 3, 3), padding=(1,), groups=3),
    "groups-of-odd-size": Case((1, 21, 6, 6), (14, 3, 3, 3), padding=(1,), groups=7),
    "groups-of-64": Case((1, 128, 6, 6), (64, 64, 3, 3), padding=(1,), groups=2),
    "depthwise": Case((2, 19, 7, 6), (19, 1, 3, 3), stride=(2,), padding=(1,), groups=19),
    "depthwise-5x5-in-bands": Case((1, 70, 40, 33), (70, 1, 5, 5), padding=(2,), groups=70),
    "square": Case((2, 70, 13, 14), (70, 1, 3, 3), padding=(1,), groups=70),
    "square-in-bands": Case((2, 96, 45, 33), (96, 1, 3, 3), padding=(1,), groups=96),
    "square-strided": Case((2, 50, 9, 8), (50, 1, 3, 3), stride=(2,), padding=(1,), groups=50),
    "square-without-padding": Case((1, 33, 5, 37), (33, 1, 3, 3), stride=(2, 1), groups=33),
    "square-with-padding-that-differs": Case((1, 32, 6, 7), (32, 1, 3, 3), stride=(2,), groups=32, pad=(0, 1, 2, 0)),
    "square-of-lines-far-apart": Case((1, 17, 9, 6), (17, 1, 3, 3), padding=(2, 1), dilation=(2, 1), groups=17),
    "square-with-several-results": Case((2, 24, 6, 5), (48, 1, 3, 3), padding=(1,), groups=24),
    "square-transposed": Case((1, 40, 5, 6), (40, 1, 3, 3), padding=(1,), transposed=True, groups=40),
    "depthwise-dilated": Case((2, 64, 9, 8), (64, 1, 3, 3), padding=(2,), dilation=(2,), groups=64),
    "depthwise-with-several-results": Case((2, 9, 8, 7), (27, 1, 3, 2), stride=(2, 1), groups=9),
    "pairs-of-channels": Case((1, 66, 6, 5), (66, 2, 3, 3), padding=(1,), groups=33),
    "depthwise-1d": Case((2, 33, 30), (33, 1, 7), stride=(2,), padding=(3,), groups=33),
    "depthwise-3d": Case((1, 11, 5, 6, 4), (11, 1, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=11),
    "depthwise-transposed": Case(
        (1, 35, 4, 5), (35, 1, 3, 4), stride=(2,), padding=(1,), transposed=True, output_padding=(1, 0), groups=35
    ),
    "5x5-of-a-small-map": Case((2, 96, 7, 6), (72, 96, 5, 5), stride=(1, 2), padding=(2,)),
    "dilated-of-a-small-map": Case((1, 128, 7, 8), (64, 128, 3, 3), padding=(2,), dilation=(2,)),
    "groups-of-a-small-map": Case((2, 256, 5, 5), (128, 128, 3, 3), padding=(1,), groups=2),
    "1d-of-a-short-line": Case((4, 128, 6), (64, 128, 5), padding=(2,)),
    "3d-of-a-small-map": Case((1, 64, 3, 4, 5), (48, 64, 3, 3, 3), padding=(1,)),
    "transposed-of-a-small-map": Case((1, 128, 5, 5), (128, 64, 4, 4), stride=(2,), padding=(1,), transposed=True),
    "padding-that-differs": Case((1, 6, 6, 7), (9, 6, 4, 2), stride=(2, 1), pad=(1, 0, 2, 1)),
    "padding-wider-than-the-image": Case((1, 4, 1, 2), (3, 4, 3, 3), padding=(4,)),
    "transposed-of-one-line-that-no-tap-reaches": Case(
        (1, 20, 1, 12), (20, 16, 1, 3), stride=(4, 1), padding=(1, 2), transposed=True, output_padding=(3, 0)
    ),
    "a-line-that-no-tap-reaches": Case((2, 20, 1, 12), (16, 20, 1, 3), stride=(4, 1), padding=(1, 2), pad=(0, 0, 2, 2)),
    "depthwise-of-a-line-that-no-tap-reaches": Case(
        (2, 20, 1, 12), (20, 1, 1, 3), stride=(4, 1), padding=(1, 2), groups=20, pad=(0, 0, 2, 2)
    ),
    "pixels-never-read": Case((1, 8, 9, 9), (8, 8, 1, 2), stride=(4, 3)),
    "1d": Case((3, 10, 50), (18, 10, 5), stride=(2,), padding=(3,)),
    "linear": Case((37, 200, 1), (70, 200, 1)),
    "3d": Case((1, 6, 4, 5, 6), (17, 6, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    "transposed": Case((2, 20, 5, 6), (20, 9, 4, 3), stride=(2,), padding=(1,), transposed=True, output_padding=(0, 1)),
    "transposed-of-64-channels": Case((1, 64, 4, 5), (64, 33, 2, 2), stride=(2,), transposed=True),
    "transposed-groups": Case(
        (1, 12, 4, 4), (12, 5, 3, 3), stride=(3, 2), dilation=(1, 2), transposed=True, groups=2, output_padding=(1, 0)
    ),
    "transposed-gaps": Case((1, 4, 3, 3), (4, 6, 2, 1), stride=(3,), transposed=True),
    "transposed-1d": Case((2, 6, 9), (6, 4, 5), stride=(2,), padding=(2,), transposed=True, output_padding=(1,)),
    "transposed-3d": Case((1, 4, 2, 3, 3), (4, 5, 3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 1), transposed=True),
}
each_isa = pytest.mark.parametrize("isa", ISAS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Operands(NamedTuple):
    """A layer's tensors, and the integers that they stand for."""

    case: Case
    a_bit: int
    w_bit: int
    index: Tensor  # of the activation: uint8, (N, C, *spatial)
    low: Tensor
    scale: Tensor
    weight: Tensor  # codes: int8, of weight_shape
    packed: Tensor
    channel_scale: Tensor

    @property
    def codes(self) -> Tensor:
        return self.index.double() * bit_format(self.a_bit).step + self.low

    @property
    def geometry(self) -> tuple[object, ...]:
        return (list(self.case.weight), *self.case.convolution)

    def packed_codes(self) -> Tensor:
        return pack(self.index.movedim(1, -1).contiguous(), self.a_bit)

    def expected(self, bias: Tensor | None = None) -> Tensor:
        """Exact integers, then float32 operations in the order in which the op defines them."""
        total = self.case.expected(self.codes, self.weight.double())
        tail = [1] * (total.dim() - 2)
        value = total.float() * (self.channel_scale * self.scale).view(-1, *tail)
        return value if bias is None else value + bias.view(-1, *tail)


def operands(case: Case, a_bit: int = 8, w_bit: int = 4, *, signed: bool = True) -> Operands:
    low = -1 if a_bit == 1 else -(1 << (a_bit - 1)) if signed else 0
    index = torch.randint(0, 1 << a_bit, case.shape, dtype=torch.uint8)
    weight_index = torch.randint(0, 1 << w_bit, case.weight, dtype=torch.uint8)
    return with_integers(case, a_bit, w_bit, index, low, weight_index)


def with_integers(case: Case, a_bit: int, w_bit: int, index: Tensor, low: int, weight_index: Tensor) -> Operands:
    form = bit_format(w_bit)
    weight = form.codes(weight_index)
    rows = weight_index
    if case.transposed:  # rows are output channels
        per_group = (case.groups, case.weight[0] // case.groups, *case.weight[1:])
        rows = weight_index.view(per_group).transpose(1, 2).contiguous()
    return Operands(
        case,
        a_bit,
        w_bit,
        index,
        torch.tensor(float(low)),
        torch.tensor(0.37),
        weight,
        pack(rows, w_bit),
        torch.rand(case.out_channels) + 0.5,
    )


def run_codes(o: Operands, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    poison = torch.zeros(())
    head = (o.packed_codes(), list(o.case.shape), o.scale, o.low, poison, o.a_bit, o.packed, o.channel_scale, o.w_bit)
    return ops.conv_codes(*head, *o.geometry, dtype, channels_last)


def run_floats(o: Operands, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.conv(x, o.scale, o.low, o.a_bit, o.packed, o.channel_scale, o.w_bit, bias, *o.geometry)


def grad_input(o: Operands, grad: Tensor, grad_scale: Tensor, *rest: object) -> Tensor:
    codes = grad.to(torch.int8).movedim(1, -1).contiguous()
    return ops.conv_grad_input(codes, grad_scale, o.packed, o.w_bit, list(o.case.shape), *o.geometry, *rest)


def expected_grad_input(o: Operands, grad: Tensor, grad_scale: Tensor) -> Tensor:
    """By autograd, in float64."""
    x = torch.zeros(o.case.shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (total,) = torch.autograd.grad(o.case.expected(x, o.weight.double()), x, grad.double())
    return total.float() * grad_scale


@each_isa
@each_case
def test_the_product_of_codes_is_that_of_torch(isa: str, case: Case) -> None:
    with cpu.cap_isa(isa):
        for a_bit, w_bit, signed in ((8, 4, True), (8, 8, False), (1, 1, True), (3, 5, True), (2, 2, False)):
            o = operands(case, a_bit, w_bit, signed=signed)
            torch.testing.assert_close(run_codes(o), o.expected(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [(8, 4), (1, 1), (2, 2)], ids=str)
def test_a_bias_that_is_no_dense_vector_is_read_as_what_it_says(bits: tuple[int, int]) -> None:
    case = Case((2, 16, 4, 5), (24, 16, 3, 3), padding=(1,))
    o = operands(case, *bits)
    x = (o.codes * o.scale).float()
    for bias in (torch.randn(1).expand(24), torch.randn(48)[::2], torch.randn(24).to(torch.float64)):
        assert torch.equal(run_floats(o, x, bias), o.expected(bias.to(torch.float32)))


@each_isa
@each_case
def test_floats_are_quantized_on_the_way(isa: str, case: Case) -> None:
    bias = torch.randn(case.out_channels)
    with cpu.cap_isa(isa):
        for a_bit, w_bit in ((8, 4), (4, 8), (1, 2)):
            o = operands(case, a_bit, w_bit)
            # Nearer to a code's value than to any other's; at 1 bit, any size.
            x = (o.codes + 0.8 * (torch.rand(case.shape) - 0.5)).float() * o.scale
            for y in (run_floats(o, x, bias), run_floats(o, x.movedim(1, -1).contiguous().movedim(-1, 1), bias)):
                torch.testing.assert_close(y, o.expected(bias), rtol=0, atol=0)


@each_isa
@each_case
def test_the_gradient_of_the_input_is_that_of_autograd(isa: str, case: Case) -> None:
    with cpu.cap_isa(isa):
        for w_bit in (1, 4, 8):
            o = operands(case, 8, w_bit)
            out = ops.Convolution(*case.convolution).output_shape(case.shape, case.weight)
            grad = torch.randint(-128, 128, out).float()
            grad_scale = torch.rand(case.shape[0], *[1] * (len(case.shape) - 1))
            expected = expected_grad_input(o, grad, grad_scale)
            for channels_last in (False, True):
                found = grad_input(o, grad, grad_scale, torch.float32, channels_last)
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                assert found.movedim(1, -1).is_contiguous() or not channels_last


@each_isa
@pytest.mark.parametrize("a_bit", range(1, 9))
@pytest.mark.parametrize("w_bit", range(1, 9))
def test_every_width_is_exact(isa: str, a_bit: int, w_bit: int) -> None:
    with cpu.cap_isa(isa):
        for case in (Case((2, 67, 5, 4), (35, 67, 2, 3), padding=(1,)), Case((5, 256, 1), (96, 256, 1))):
            o = operands(case, a_bit, w_bit, signed=a_bit % 2 == 0 or a_bit == 1)
            assert torch.equal(run_codes(o), o.expected())
            # Kept for inference, the weights stay packed.
            assert torch.equal(run_floats(o, (o.codes * o.scale).float()), o.expected())


@each_isa
@pytest.mark.parametrize("case", [Case((3, 7740, 1), (20, 7740, 1)), Case((1, 65535, 1), (3, 65535, 1))], ids=str)
@pytest.mark.parametrize("w_bit", [2, 7, 8])
def test_the_largest_products_neither_saturate_nor_overflow(isa: str, case: Case, w_bit: int) -> None:
    lowest = torch.zeros(case.weight, dtype=torch.uint8)
    largest = torch.full(case.shape, 255, dtype=torch.uint8)
    with cpu.cap_isa(isa):
        for weight_index in (lowest, torch.full_like(lowest, (1 << w_bit) - 1)):
            o = with_integers(case, 8, w_bit, largest, 0, weight_index)
            assert torch.equal(run_codes(o), o.expected())
            grad = torch.full((case.shape[0], case.weight[0], 1), -128.0)
            ones = torch.ones(case.shape[0], 1, 1)
            found = grad_input(o, grad, ones, torch.float32, False)
            assert torch.equal(found, expected_grad_input(o, grad, ones))


@each_isa
@pytest.mark.parametrize("low", [0, -128])
def test_the_largest_sums_of_a_square_fit(isa: str, low: int) -> None:
    case = CASES["square"]
    with cpu.cap_isa(isa):
        for index, weight_index in itertools.product((0, 255), (0, 15)):
            full = torch.full(case.shape, index, dtype=torch.uint8)
            o = with_integers(case, 8, 4, full, low, torch.full(case.weight, weight_index, dtype=torch.uint8))
            x = (o.codes * o.scale).float().contiguous(memory_format=torch.channels_last)
            assert torch.equal(run_floats(o, x), o.expected())


@each_isa
@pytest.mark.parametrize("a_bit", [2, 5, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_values_far_beyond_the_range_have_the_last_codes(isa: str, a_bit: int, signed: bool) -> None:
    o = operands(CASES["square"], a_bit, signed=signed)
    x = (o.codes * o.scale).float()
    far = torch.tensor([-3e38, -1e30, -2e9, -4e4, -3e4, 3e4, 4e4, 2e9, 1e30, 3e38])
    x[0, ::7, 2, 3] = far
    index = o.index.clone()
    index[0, ::7, 2, 3] = torch.where(far > 0, (1 << a_bit) - 1, 0).to(torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    with cpu.cap_isa(isa):
        assert torch.equal(run_floats(o, x), o._replace(index=index).expected())


def test_sums_that_32_bits_do_not_hold_go_to_the_reference() -> None:
    case = Case((1, 70_000, 1), (2, 70_000, 1))
    full = torch.full(case.shape, 255, dtype=torch.uint8)
    o = with_integers(case, 8, 8, full, 0, torch.zeros(case.weight, dtype=torch.uint8))
    assert torch.equal(run_codes(o), o.expected())


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["3x3", "odd-channels", "1d", "groups", "transposed-3d", "linear", "depthwise", "square"]
)
def test_results_have_the_dtype_and_memory_order_of_the_input(isa: str, dtype: torch.dtype, name: str) -> None:
    o = operands(CASES[name])
    bias = torch.randn(o.case.out_channels)
    x = (o.codes * o.scale).to(dtype)
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    every_other = torch.stack([x, x], -1)[..., 0]  # steps of two elements
    expected = reference.conv(x, o.scale, o.low, o.a_bit, o.packed, o.channel_scale, o.w_bit, bias, *o.geometry)
    with cpu.cap_isa(isa):
        for given_x in (x, channels_last, every_other):
            y = run_floats(o, given_x, bias)
            assert y.dtype == dtype
            assert torch.equal(y, expected)
            assert ops.is_channels_last(y) == (ops.is_channels_last(given_x) and y.movedim(1, -1).is_contiguous())
        for last in (False, True):
            assert torch.equal(run_codes(o, dtype, last), o.expected().to(dtype))


def test_an_image_of_gigabytes_of_padding_goes_to_the_reference() -> None:
    o = operands(Case((1, 3, 8, 8), (4, 3, 3, 3), padding=(20_000,), dilation=(20_000,)))
    assert torch.equal(run_codes(o), o.expected())


def test_scales_of_a_layer_that_was_cast_go_to_the_reference() -> None:
    o = operands(CASES["3x3"])
    o = o._replace(scale=torch.tensor(0.375, dtype=torch.bfloat16), channel_scale=o.channel_scale.bfloat16())
    x = torch.randn(o.case.shape)
    arguments = (x, o.scale, o.low, 8, o.packed, o.channel_scale, o.w_bit, None, *o.geometry)
    assert torch.equal(ops.conv(*arguments), reference.conv(*arguments))


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd-channels", "depthwise-5x5-in-bands", "square"])
def test_an_activation_that_is_not_finite_poisons_the_result(
    isa: str, bad: float, dtype: torch.dtype, name: str
) -> None:
    o = operands(CASES[name])
    for channels_last in (False, True):
        x = torch.randn(o.case.shape, dtype=dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
        x[-1, 17, 3, 2] = bad
        with cpu.cap_isa(isa):
            assert run_floats(o, x).isnan().all()
            codes, _, poison = ops.quantize_activation(x, o.scale, o.low, 8)
            head = (codes, list(x.shape), o.scale, o.low, poison, 8, o.packed, o.channel_scale, o.w_bit)
            assert ops.conv_codes(*head, *o.geometry, torch.float32, False).isnan().all()


@each_isa
def test_denormals_and_zeros_of_both_signs_are_like_any_value(isa: str) -> None:
    o = operands(CASES["3x3"], 1, 1)
    x = torch.randn(o.case.shape) * 1e-40
    x[:, ::3] = 0.0
    x[:, 1::3] = -0.0
    arguments = (x, o.scale, o.low, 1, o.packed, o.channel_scale, 1, None, *o.geometry)
    with cpu.cap_isa(isa):
        assert torch.equal(ops.conv(*arguments), reference.conv(*arguments))


@pytest.mark.parametrize(
    "name", ["3x3", "1x1", "groups", "transposed", "linear", "depthwise-5x5-in-bands", "square-in-bands"]
)
def test_results_are_the_same_with_any_number_of_threads(name: str) -> None:
    o = operands(CASES[name])
    x = torch.randn(o.case.shape)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run_floats(o, x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_an_empty_batch_gives_an_empty_result() -> None:
    o = operands(Case((0, 4, 5, 6), (3, 4, 3, 3)))
    assert run_floats(o, torch.zeros(o.case.shape)).shape == (0, 3, 3, 4)
    assert run_codes(o).shape == (0, 3, 3, 4)
    grad_x = grad_input(o, torch.zeros(0, 3, 3, 4), torch.zeros(0, 1, 1, 1), torch.float32, False)
    assert grad_x.shape == o.case.shape


def test_weights_that_change_are_arranged_anew() -> None:
    o = operands(CASES["3x3"])
    x = torch.randn(o.case.shape)
    run_floats(o, x)
    other = operands(o.case)
    o.packed.copy_(other.packed)
    assert torch.equal(run_floats(o, x), run_floats(o._replace(packed=other.packed.clone()), x))


@pytest.mark.parametrize("name", ["3x3", "groups", "transposed"])
def test_the_ops_are_registered_as_torch_wants(name: str) -> None:
    o = operands(CASES[name])
    x = torch.randn(o.case.shape)
    torch.library.opcheck(
        torch.ops.bitorch_engine.conv.default,
        (x, o.scale, o.low, 8, o.packed, o.channel_scale, o.w_bit, None, *o.geometry),
    )
    head = (o.packed_codes(), list(x.shape), o.scale, o.low, torch.zeros(()), 8, o.packed, o.channel_scale, o.w_bit)
    torch.library.opcheck(torch.ops.bitorch_engine.conv_codes.default, (*head, *o.geometry, torch.bfloat16, True))
    out = o.expected()
    codes = torch.zeros(out.shape[0], *out.shape[2:], out.shape[1], dtype=torch.int8)
    scale = torch.ones(out.shape[0], *[1] * (out.dim() - 1))
    tail = (list(x.shape), *o.geometry, torch.float32, False)
    torch.library.opcheck(torch.ops.bitorch_engine.conv_grad_input.default, (codes, scale, o.packed, o.w_bit, *tail))


@st.composite
def any_case(draw: Callable[..., int]) -> Case:
    """Two dimensions; channels on both sides of every block that the kernels have."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 2, 3, 40]))
    channels = [draw(st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 63, 64, 65, 100])) for _ in range(2)]
    channels = [min(c, 3) for c in channels] if groups == 40 else channels
    transposed = draw(st.booleans())
    kernel, stride, dilation = ((number(1, 4), number(1, 4)) for _ in range(3))
    padding = (number(0, 2), number(0, 2))
    output_padding = tuple(number(0, max(stride[d], dilation[d]) - 1) for d in range(2)) if transposed else (0, 0)
    pad = () if transposed else tuple(draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)))
    case = Case(
        (number(1, 2), channels[0] * groups, number(1, 20), number(1, 20)),
        (channels[0] * groups, channels[1], *kernel) if transposed else (channels[1] * groups, channels[0], *kernel),
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        pad,
    )
    assume(min(case.convolution.output_shape(case.shape, case.weight)) > 0)
    return case


@each_isa
@given(case=any_case(), a_bit=st.integers(1, 8), w_bit=st.integers(1, 8), channels_last=st.booleans())
@settings(max_examples=40)
def test_any_geometry(isa: str, case: Case, a_bit: int, w_bit: int, channels_last: bool) -> None:
    o = operands(case, a_bit, w_bit)
    with cpu.cap_isa(isa):
        assert torch.equal(run_codes(o, channels_last=channels_last), o.expected())
        grad = torch.randint(-128, 128, o.case.convolution.output_shape(case.shape, case.weight)).float()
        grad_scale = torch.rand(case.shape[0], 1, 1, 1)
        found = grad_input(o, grad, grad_scale, torch.float32, channels_last)
        assert torch.equal(found, expected_grad_input(o, grad, grad_scale))
