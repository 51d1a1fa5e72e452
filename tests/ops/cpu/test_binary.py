"""Products of signs, and of 2-bit codes, on packed bits are torch's convolution in float64, with true zero padding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.bits import pack
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import binary
from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.conv import Convolution

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")
each_isa = pytest.mark.parametrize("isa", cpu.available_isas())


class Case(NamedTuple):
    """Shapes and geometry of one convolution."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    pad: tuple[int, ...] = ()

    @property
    def geometry(self) -> list[Any]:
        """As the ops take it."""
        rank = len(self.weight) - 2
        wide = [list(value) * rank if len(value) == 1 else list(value) for value in self[2:5]]
        return [list(self.weight), *wide, False, [0] * rank, self.groups, list(self.pad)]

    def products(self, x: Tensor, weight: Tensor) -> Tensor:
        """By torch.nn.functional."""
        plain = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        _, stride, padding, dilation, *_ = self.geometry
        return plain(F.pad(x, self.pad) if self.pad else x, weight, None, stride, padding, dilation, self.groups)


CASES = {
    "3x3": Case((2, 64, 9, 10), (64, 64, 3, 3), padding=(1,)),
    "3x3-of-a-small-map": Case((8, 32, 3, 3), (70, 32, 3, 3), padding=(1,)),
    "3x3-of-128-channels-strided": Case((1, 128, 13, 14), (80, 128, 3, 3), stride=(2,), padding=(1,)),
    "1x1": Case((2, 128, 5, 7), (130, 128, 1, 1)),
    "1x1-strided": Case((2, 33, 7, 8), (17, 33, 1, 1), stride=(2,)),
    "7x7-of-rgb": Case((1, 3, 23, 21), (20, 3, 7, 7), stride=(2,), padding=(3,)),
    "one-channel": Case((2, 1, 6, 5), (3, 1, 3, 3), padding=(1,)),
    "31-channels": Case((2, 31, 6, 5), (16, 31, 3, 2), stride=(1, 2), padding=(2, 0)),
    "100-channels": Case((1, 100, 6, 5), (100, 100, 3, 3), padding=(1,)),
    "dilated": Case((1, 32, 12, 13), (7, 32, 3, 3), stride=(2, 3), padding=(2, 1), dilation=(2, 3)),
    "groups": Case((2, 99, 8, 8), (30, 33, 3, 3), padding=(1,), groups=3),
    "groups-of-64": Case((1, 128, 6, 6), (64, 64, 3, 3), padding=(1,), groups=2),
    "padding-that-differs": Case((1, 64, 6, 7), (9, 64, 4, 2), stride=(2, 1), pad=(1, 0, 2, 1)),
    "padding-wider-than-the-image": Case((1, 32, 1, 2), (16, 32, 3, 3), padding=(4,)),
    "kernel-wider-than-the-image": Case((1, 32, 2, 3), (16, 32, 5, 9), padding=(3, 4)),
    "pixels-never-read": Case((1, 32, 9, 9), (8, 32, 1, 2), stride=(4, 3)),
    "1d": Case((3, 40, 50), (18, 40, 5), stride=(2,), padding=(3,)),
    "1d-of-many-taps": Case((1, 32, 90), (16, 32, 60), padding=(30,)),
    "linear": Case((37, 200, 1), (70, 200, 1)),
    "linear-of-one-row": Case((1, 4096, 1), (200, 4096, 1)),
    "3d": Case((1, 32, 4, 5, 6), (17, 32, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Layer(NamedTuple):
    """The tensors of a layer, and the signs that its packed weight stands for."""

    case: Case
    weight: Tensor
    packed: Tensor
    channel_scale: Tensor
    bias: Tensor
    scale: Tensor

    def expected(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Exact integers, then float32 operations in the order in which the op defines them."""
        signs = torch.where(x < 0, -1.0, 1.0).double()
        tail = [1] * (x.dim() - 2)
        value = self.case.products(signs, self.weight).float() * (self.channel_scale * self.scale).view(-1, *tail)
        return (value if bias is None else value + bias.view(-1, *tail)).to(x.dtype)

    def convolve(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The kernel itself: for few channels the op takes another one.
        low = torch.tensor(-1.0)
        return binary.conv(x, self.scale, low, 1, self.packed, self.channel_scale, 1, bias, *self.case.geometry)

    def convolve_codes(self, x: Tensor, dtype: torch.dtype, channels_last: bool, poison: float = 0.0) -> Tensor:
        codes = pack((x >= 0).to(torch.uint8).movedim(1, -1).contiguous(), 1)
        head = (codes, list(x.shape), self.scale, torch.tensor(-1.0), torch.tensor(poison), 1)
        tail = (*self.case.geometry, dtype, channels_last)
        return binary.conv_codes(*head, self.packed, self.channel_scale, 1, *tail)


def layer(case: Case, scale: float = 0.37) -> Layer:
    index = torch.randint(0, 2, case.weight, dtype=torch.uint8)
    rows = case.weight[0]
    return Layer(
        case, index.double() * 2 - 1, pack(index, 1), torch.rand(rows) + 0.5, torch.randn(rows), torch.tensor(scale)
    )


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@each_isa
@each_case
def test_the_product_is_that_of_torch(isa: str, case: Case) -> None:
    o, x = layer(case), torch.randn(case.shape)
    with cpu.cap_isa(isa):
        for order in (x, channels_last(x)):
            for bias in (None, o.bias):
                y = o.convolve(order, bias)
                assert torch.equal(y, o.expected(x, bias))
                assert (y.movedim(1, -1) if ops.is_channels_last(order) else y).is_contiguous()


@each_isa
@each_case
def test_packed_codes_are_multiplied_as_they_are(isa: str, case: Case) -> None:
    o, x = layer(case), torch.randn(case.shape)
    with cpu.cap_isa(isa):
        for last in (False, True):
            assert torch.equal(o.convolve_codes(x, torch.float32, last), o.expected(x, None))
        assert o.convolve_codes(x, torch.float32, True, poison=float("nan")).isnan().all()


@each_isa
@pytest.mark.parametrize("channels", [1, 8, 247, 248, 249, 256, 1000, 32760, 32761, 65528, 65529])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_largest_totals_fit(isa: str, channels: int, rows: int) -> None:
    # Counts are held in 8 bits, then in 16, then in 32.
    o = layer(Case((rows, channels, 1), (40, channels, 1)))
    o.packed.fill_(0)  # every weight is -1
    with cpu.cap_isa(isa):
        for sign in (1.0, -1.0):
            y = o.convolve(torch.full(o.case.shape, sign))
            assert torch.equal(y, (-sign * channels * (o.channel_scale * o.scale)).view(1, -1, 1).expand_as(y))


@each_isa
@pytest.mark.parametrize("channels", [252, 255, 256, 257, 512])
@pytest.mark.parametrize("outputs", [20, 64, 128])
def test_the_largest_totals_are_found_beside_others(isa: str, channels: int, outputs: int) -> None:
    # 256 signs are counted in 8 bits.
    o, x = layer(Case((7, channels, 1), (outputs, channels, 1))), torch.randn(7, channels, 1)
    index = (o.weight > 0).to(torch.uint8)
    for row in range(7):
        index[2 * row], index[2 * row + 1] = x[row] >= 0, x[row] < 0
    o = o._replace(weight=index.double() * 2 - 1, packed=pack(index, 1))
    with cpu.cap_isa(isa):
        y = o.convolve(x, o.bias)
    assert torch.equal(y, o.expected(x, o.bias))
    totals = o.case.products(torch.where(x < 0, -1.0, 1.0).double(), o.weight)
    assert totals.max() == channels and totals.min() == -channels


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "31-channels", "groups", "linear"])
def test_short_floats_are_read_and_written(isa: str, dtype: torch.dtype, name: str) -> None:
    o = layer(CASES[name])
    x = torch.randn(o.case.shape, dtype=dtype)
    with cpu.cap_isa(isa):
        for order in (x, channels_last(x)):
            assert torch.equal(o.convolve(order, o.bias), o.expected(x, o.bias))
        assert torch.equal(o.convolve_codes(x, dtype, True), o.expected(x, None))


@each_isa
@pytest.mark.parametrize("name", ["3x3", "31-channels", "3d", "linear"])
def test_views_are_read_as_they_lie(isa: str, name: str) -> None:
    o = layer(CASES[name])
    shape = o.case.shape
    everything = torch.randn([2 * length for length in shape])
    every_other = everything[tuple(slice(None, None, 2) for _ in shape)]
    first = everything[tuple(slice(0, length) for length in shape)]
    with cpu.cap_isa(isa):
        for x in (every_other, first, channels_last(everything)[tuple(slice(0, length) for length in shape)]):
            assert torch.equal(o.convolve(x), o.expected(x, None))


@each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["3x3", "31-channels", "groups", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_makes_everything_nan(isa: str, value: float, name: str, dtype: torch.dtype) -> None:
    o = layer(CASES[name])
    for place in (0, -1):
        x = torch.randn(o.case.shape, dtype=dtype)
        x.view(-1)[place] = value
        with cpu.cap_isa(isa):
            assert o.convolve(x).isnan().all()
            assert o.convolve(channels_last(x), o.bias).isnan().all()


@each_isa
@pytest.mark.parametrize("scale", [0.37, 8.0])
def test_zeros_and_the_smallest_numbers_are_those_of_the_reference(isa: str, scale: float) -> None:
    # x / scale is what has a sign: a denormal that it rounds to -0 counts as +1.
    o = layer(CASES["3x3"], scale)
    x = torch.randn(o.case.shape) * 1e-44
    x[:, ::3] = 0.0
    x[:, 1::3] = -0.0
    low = torch.tensor(-1.0)
    wanted = reference.conv(x, o.scale, low, 1, o.packed, o.channel_scale, 1, None, *o.case.geometry)
    with cpu.cap_isa(isa):
        assert torch.equal(o.convolve(x), wanted)
        assert torch.equal(o.convolve(channels_last(x)), wanted)


@pytest.mark.parametrize("name", ["3x3", "1x1", "groups", "linear", "linear-of-one-row"])
def test_results_are_the_same_with_any_number_of_threads(name: str) -> None:
    o = layer(CASES[name])
    o = o._replace(case=o.case._replace(shape=(max(o.case.shape[0], 24), *o.case.shape[1:])))  # enough for several
    x, before = torch.randn(o.case.shape), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = o.convolve(x), o.convolve(channels_last(x), o.bias)
        torch.set_num_threads(before)
        assert torch.equal(found[0], o.expected(x, None))
        assert torch.equal(found[1], o.expected(x, o.bias))


@pytest.mark.parametrize("count", [1, 2])
def test_large_batches_are_taken_in_lots(count: int) -> None:
    o = layer(Case((5, 64, 36, 33), (40, 64, 2, 3), padding=(1,)))  # 300 KiB a sample: lots of 2, 2 and 1
    x, before = torch.randn(o.case.shape), torch.get_num_threads()
    torch.set_num_threads(count)
    for order in (x, channels_last(x), x[:1].expand(o.case.shape)):
        assert torch.equal(o.convolve(order, o.bias), o.expected(order, o.bias))
    x[4, 63, 35, 32] = float("nan")
    assert o.convolve(x).isnan().all()
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 32, 5, 6), (2, 32, 2, 3)])
def test_nothing_in_or_out_gives_what_the_reference_gives(shape: tuple[int, ...]) -> None:
    o = layer(Case(shape, (3, 32, 3, 3)))
    if shape[0]:
        with pytest.raises(RuntimeError, match="greater than actual input size"):
            o.convolve(torch.zeros(shape))
    else:
        assert o.convolve(torch.zeros(shape)).shape == (0, 3, 3, 4)
        assert o.convolve_codes(torch.zeros(shape), torch.float32, True).shape == (0, 3, 3, 4)


def test_weights_that_change_are_arranged_anew() -> None:
    o, other = layer(CASES["3x3"]), layer(CASES["3x3"])
    x = torch.randn(o.case.shape)
    o.convolve(x)
    o.packed.copy_(other.packed)
    assert torch.equal(o.convolve(x), o._replace(weight=other.weight).expected(x, None))


looks_up_pairs = pytest.mark.skipif("avx2" not in cpu.available_isas(), reason="2 bits are looked up by AVX2")


def convolve_pairs(case: Case, x: Tensor, weight: Tensor, low: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the kernel and by torch: codes low .. low + 3 and -2 .. 1. Scales are powers of two: no result rounds."""
    scale, channel_scale = torch.tensor(0.5), torch.full((case.weight[0],), 0.25)
    packed = pack((weight + 2).to(torch.uint8), 2)
    sources = (scale, torch.tensor(low))
    arguments = (*sources, 2, packed, channel_scale, 2, bias, *case.geometry)
    with cpu.cap_isa("avx2"):
        assert binary.suits_pairs(x.shape, 2, 2, *case.geometry)
        y = ops.conv(x, *arguments)
        with torch.no_grad():
            plan = ops.plan("conv", sources, x, *arguments)
        assert plan is not None
        again = plan(x, sources, packed, channel_scale, bias)
        assert again is not None
        torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)
    codes = (x.double() * 2).round().clamp(low, low + 3)
    wanted = case.products(codes, weight).to(x.dtype) * 0.125
    return y, wanted if bias is None else wanted + bias.view(-1, *[1] * (x.dim() - 2))


@looks_up_pairs
@pytest.mark.parametrize("low", [0.0, -2.0])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.weight[1] >= 12])
def test_products_of_two_bits_are_those_of_torch(name: str, low: float) -> None:
    case = CASES[name]
    if name == "linear-of-one-row":
        case = case._replace(shape=(6, *case.shape[1:]))
    x = torch.randn(case.shape) + low / 4
    weight = torch.randint(-2, 2, case.weight).double()
    for bias in (None, torch.randn(case.weight[0])):
        for order in (x, channels_last(x)):
            y, wanted = convolve_pairs(case, order, weight, low, bias)
            assert torch.equal(y, wanted)


@looks_up_pairs
@pytest.mark.parametrize("low", [0.0, -2.0])
@pytest.mark.parametrize("channels", [12, 27, 28, 29, 39, 40, 41, 256, 7280])
def test_the_largest_totals_of_two_bits_fit(channels: int, low: float) -> None:
    case = Case((7, channels, 1), (40, channels, 1))
    for code in (low, low + 3):
        for value in (-2.0, 1.0):
            x, weight = torch.full(case.shape, code / 2), torch.full(case.weight, value).double()
            y, wanted = convolve_pairs(case, x, weight, low, None)
            assert torch.equal(y, wanted)


@looks_up_pairs
def test_what_is_too_deep_too_small_or_for_another_processor_is_not_looked_up() -> None:
    geometry = CASES["linear"].geometry[1:]
    with cpu.cap_isa("avx2"):
        assert binary.suits_pairs((7, 7280, 1), 2, 2, [40, 7280, 1], *geometry)
        assert not binary.suits_pairs((7, 7281, 1), 2, 2, [40, 7281, 1], *geometry)
        assert not binary.suits_pairs((5, 64, 1), 2, 2, [40, 64, 1], *geometry)
        assert not binary.suits_pairs((7, 64, 1), 2, 4, [40, 64, 1], *geometry)
    with cpu.cap_isa("scalar"):
        assert not binary.suits_pairs((7, 64, 1), 2, 2, [40, 64, 1], *geometry)


@looks_up_pairs
def test_what_is_not_finite_makes_everything_nan_at_two_bits() -> None:
    case = CASES["3x3"]
    for value in (float("inf"), -float("inf"), float("nan")):
        x = torch.randn(case.shape)
        x[-1, -1, -1, -1] = value
        y, _ = convolve_pairs(case, x, torch.ones(case.weight).double(), 0.0, None)
        assert y.isnan().all()


@looks_up_pairs
@pytest.mark.parametrize("name", ["3x3", "31-channels", "groups"])
def test_views_and_short_floats_become_codes_of_two_bits(name: str) -> None:
    case = CASES[name]
    weight = torch.randint(-2, 2, case.weight).double()
    everything = torch.randn([2 * length for length in case.shape])
    every_other = everything[tuple(slice(None, None, 2) for _ in case.shape)]
    first = channels_last(everything)[tuple(slice(0, length) for length in case.shape)]
    for x in (every_other, first, every_other.bfloat16(), channels_last(every_other.half())):
        y, wanted = convolve_pairs(case, x, weight, -2.0, None)
        assert torch.equal(y, wanted)


@looks_up_pairs
def test_large_batches_of_two_bits_are_taken_in_lots() -> None:
    few = Case((7, 64, 64, 65), (40, 64, 2, 3), stride=(64,))  # one result a lot, which alone would not be looked up
    for case in (Case((5, 64, 36, 33), (40, 64, 2, 3), padding=(1,)), few):
        x, weight = torch.randn(case.shape), torch.randint(-2, 2, case.weight).double()
        for order in (x, channels_last(x)):
            y, wanted = convolve_pairs(case, order, weight, 0.0, None)
            assert torch.equal(y, wanted)


def test_the_op_takes_this_kernel_for_signs_only() -> None:
    case = CASES["3x3"]
    assert binary.suits(case.shape, 1, 1, *case.geometry)
    assert not binary.suits(case.shape, 2, 1, *case.geometry)
    assert not binary.suits(case.shape, 1, 2, *case.geometry)
    transposed = Convolution([1, 1], [1, 1], [1, 1], True, [0, 0], 1, [])
    assert not binary.suits(case.shape, 1, 1, case.weight, *transposed)
    rgb = CASES["7x7-of-rgb"]
    assert not binary.suits(rgb.shape, 1, 1, *rgb.geometry)


def test_the_op_is_registered_as_torch_wants() -> None:
    o = layer(CASES["3x3"])
    x, low = channels_last(torch.randn(o.case.shape)), torch.tensor(-1.0)
    arguments = (x, o.scale, low, 1, o.packed, o.channel_scale, 1, o.bias, *o.case.geometry)
    assert torch.equal(ops.conv(*arguments), o.expected(x, o.bias))
    torch.library.opcheck(torch.ops.bitorch_engine.conv.default, arguments)


@st.composite
def any_case(draw: Callable[..., Any]) -> Case:
    """Two dimensions; channels on both sides of every block that the kernels have."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = number(1, 3)
    inputs, results = (draw(st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100])) for _ in range(2))
    kernel, stride, dilation = ((number(1, 4), number(1, 4)) for _ in range(3))
    case = Case(
        (number(1, 9), inputs * groups, number(1, 20), number(1, 20)),
        (results * groups, inputs, *kernel),
        stride,
        (number(0, 4), number(0, 4)),
        dilation,
        groups,
        tuple(draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))),
    )
    place = Convolution(*case.geometry[1:])
    assume(min(place.output_shape(case.shape, case.weight)) > 0)
    return case


@each_isa
@given(case=any_case(), last=st.booleans(), with_bias=st.booleans())
@settings(max_examples=40)
def test_any_geometry(isa: str, case: Case, last: bool, with_bias: bool) -> None:
    o, x = layer(case), torch.randn(case.shape)
    bias = o.bias if with_bias else None
    with cpu.cap_isa(isa):
        assert torch.equal(o.convolve(channels_last(x) if last else x, bias), o.expected(x, bias))
        assert torch.equal(o.convolve_codes(x, torch.float32, last), o.expected(x, None))
