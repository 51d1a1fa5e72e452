"""Convolutions of float pixels of few channels with packed weights agree with torch's on the weights they stand for."""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from bitorch_engine import nBitConv2d, ops
from bitorch_engine.bits import bit_format, pack
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import float_conv
from bitorch_engine.ops.reference.conv import Convolution

ISAS = cpu.available_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the kernels are not compiled")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_order = pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])


@pytest.fixture(autouse=True, scope="module")
def _on_every_instruction_set() -> Iterator[None]:
    """Also where the kernel is not the faster way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_conv, "_MOST_CHANNELS", dict.fromkeys(ISAS, 32))
        patch.setattr(float_conv, "_DEEPEST", 1 << 20)
        yield


class Case(NamedTuple):
    """The operands of one convolution, and the weight that they stand for."""

    x: Tensor
    packed: Tensor
    channel_scale: Tensor
    bits: int
    bias: Tensor | None
    weight: Tensor
    convolution: Convolution

    def found(self) -> Tensor:
        *head, weight, convolution = self
        return ops.conv_weight_only(*head, weight.shape, *convolution)

    def by_torch(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """On floats, in that precision, from a weight in x's memory order."""
        weight = ops.in_memory_format(self.weight.to(dtype), ops.is_channels_last(self.x))
        return self.convolution.forward(self.x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))

    def has_kernel(self) -> bool:
        return float_conv._suited(self.x, self.bias, self.weight.shape, tuple(self.convolution)) is not None


def case(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bits: int = 4,
    *,
    channels_last: bool = False,
    **fields: Any,
) -> Case:
    rank = len(shape) - 2
    plain = {"stride": (1,) * rank, "padding": (0,) * rank, "dilation": (1,) * rank, "transposed": False}
    convolution = Convolution(**{**plain, "output_padding": (0,) * rank, "groups": 1, **fields})
    index = torch.randint(0, 1 << bits, weight_shape, dtype=torch.uint8)
    outputs = weight_shape[1] * convolution.groups if convolution.transposed else weight_shape[0]
    scale = (torch.rand(outputs) + 0.5) * torch.tensor([1.0, -1.0]).repeat(outputs)[:outputs]
    weight = bit_format(bits).codes(index).double() * convolution.per_output_channel(scale.double(), weight_shape)
    rows = index
    if convolution.transposed:  # rows are output channels
        rows = index.unflatten(0, (convolution.groups, -1)).transpose(1, 2).contiguous()
    x = torch.randn(shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    return Case(x, pack(rows, bits), scale, bits, torch.randn(outputs), weight, convolution)


def assert_near(c: Case, found: Tensor, tolerance: float = 1e-6) -> None:
    expected = c.by_torch(torch.float64)
    size = c._replace(x=c.x.abs(), weight=c.weight.abs(), bias=None).by_torch(torch.float64)
    assert ((found.double() - expected).abs() <= tolerance * (size + 1)).all()


def order(x: Tensor) -> list[int]:
    """The strides, but those of dimensions of length 1, which say nothing."""
    return [stride for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1]


@st.composite
def any_case(draw: Callable[..., Any]) -> Case:
    """One to three dimensions, in either memory order; outputs on both sides of every tile that the kernels have."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    rank = number(1, 3)
    triple = lambda low, high: tuple(number(low, high) for _ in range(rank))  # noqa: E731
    channels, outputs = draw(st.sampled_from([1, 2, 3, 4, 8, 17])), number(1, 70)
    lengths = (*[number(1, 9) for _ in range(rank - 1)], number(1, 45))
    kernel, stride, dilation, padding = triple(1, 4), triple(1, 4), triple(1, 3), triple(0, 3)
    pad = tuple(number(0, 2) for _ in range(2 * rank)) if number(0, 3) == 0 else ()
    fields = {"stride": stride, "padding": padding, "dilation": dilation, "pad": pad}
    shape = (number(1, 3), channels, *lengths)
    plain = Convolution(**fields, transposed=False, output_padding=(0,) * rank, groups=1)
    assume(min(plain.output_shape(shape, (outputs, channels, *kernel))) > 0)
    made = case(shape, (outputs, channels, *kernel), number(1, 8), channels_last=number(0, 1) == 1, **fields)
    return made._replace(bias=None) if number(0, 3) == 0 else made


@each_isa
@given(c=any_case())
@settings(max_examples=150)
def test_any_geometry(isa: str, c: Case) -> None:
    with cpu.cap_isa(isa):
        assert c.has_kernel() or math.prod(c.x.shape[2:]) == 1
        found = c.found()
    assert_near(c, found)
    # torch's own are in one or the other order in three dimensions, as they are large or small. In float32 torch 2.13
    # reads beyond few channels in channels last, dilated and padded by more than there is.
    assert found.dim() == 5 or order(found) == order(c.by_torch(torch.float64))


LAYERS = {
    "7x7 of RGB": ((1, 3, 45, 61), (64, 3, 7, 7), {"stride": (2, 2), "padding": (3, 3)}),
    "3x3 of RGB": ((2, 3, 32, 32), (20, 3, 3, 3), {"padding": (1, 1)}),
    "5x5 of one channel": ((2, 1, 28, 28), (6, 1, 5, 5), {}),
    "3x3 of 32 channels": ((1, 32, 14, 15), (40, 32, 3, 3), {"padding": (1, 1), "dilation": (2, 1)}),
    "patches": ((1, 3, 64, 64), (96, 3, 16, 16), {"stride": (16, 16)}),
    "sound": ((2, 2, 500), (24, 2, 11), {"stride": (3,), "padding": (5,)}),
}


@each_isa
@each_order
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_results_are_as_near_as_torchs(isa: str, name: str, bits: int, channels_last: bool) -> None:
    shape, weight_shape, fields = LAYERS[name]
    c = case(shape, weight_shape, bits, channels_last=channels_last, **fields)
    with cpu.cap_isa(isa):
        found = c.found()
    exact = c.by_torch(torch.float64)
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (found, c.by_torch()))
    assert ours <= 2 * theirs


@each_isa
@each_order
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_results_that_read_it(isa: str, odd: float, channels_last: bool) -> None:
    c = case((2, 3, 9, 21), (19, 3, 3, 3), 8, channels_last=channels_last, padding=(1, 1))
    c.x[1, 2, 0, 20] = odd
    with cpu.cap_isa(isa):
        found = c.found()
    torch.testing.assert_close(found, c.by_torch(), equal_nan=True, rtol=1e-5, atol=1e-3)
    assert found.isfinite().all(1)[1, :, :19].all()


@each_order
def test_results_are_the_same_with_any_number_of_threads(channels_last: bool) -> None:
    c = case((2, 3, 70, 64), (32, 3, 7, 7), channels_last=channels_last, stride=(2, 2), padding=(3, 3))
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(c.found())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


OTHERS: dict[str, Callable[[], Case]] = {
    "many channels": lambda: case((2, 33, 6, 7), (9, 33, 3, 3), channels_last=True),
    "groups": lambda: case((2, 6, 6, 7), (8, 3, 3, 3), groups=2),
    "transposed": lambda: case((2, 6, 6, 7), (6, 5, 3, 3), transposed=True, groups=2, stride=(2, 2)),
    "an empty batch": lambda: case((0, 3, 6, 7), (8, 3, 3, 3)),
    "one pixel": lambda: case((2, 3, 1, 1), (8, 3, 3, 3), padding=(1, 1)),
    "a linear layer": lambda: case((5, 12), (8, 12)),
    "gaps": lambda: gaps(case((2, 6, 6, 7), (8, 3, 3, 3))),
    "bfloat16": lambda: cast(case((2, 3, 6, 7), (8, 3, 3, 3)), torch.bfloat16),
    "float64": lambda: cast(case((2, 3, 6, 7), (8, 3, 3, 3), channels_last=True), torch.float64),
}


def gaps(c: Case) -> Case:
    return c._replace(x=c.x[:, ::2])


def cast(c: Case, dtype: torch.dtype) -> Case:
    return c._replace(x=c.x.to(dtype), bias=torch.randn(8).to(dtype))


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_torchs(name: str) -> None:
    c = OTHERS[name]()
    assert not c.has_kernel()
    found = c.found()
    assert found.dtype == c.x.dtype
    assert order(found) == order(c.by_torch(c.x.dtype))
    assert_near(c, found, 3e-2 if found.dtype == torch.bfloat16 else 1e-6)


def test_scales_and_biases_with_gaps_or_of_another_dtype_are_read_as_what_they_say() -> None:
    c = case((2, 3, 9, 9), (24, 3, 3, 3))
    expected = c.found()
    spread = c._replace(
        channel_scale=torch.stack([c.channel_scale] * 2, 1)[:, 0], bias=torch.stack([c.bias, c.bias], 1)[:, 0]
    )
    assert torch.equal(spread.found(), expected)
    assert torch.equal(c._replace(channel_scale=c.channel_scale.double()).found(), expected)


def test_it_is_registered_as_torch_wants() -> None:
    for c in (
        case((2, 3, 9, 9), (24, 3, 3, 3)),
        case((2, 3, 9, 9), (24, 3, 3, 3), channels_last=True),
        OTHERS["transposed"](),
    ):
        *head, weight, convolution = c
        arguments = (*head, list(weight.shape), *convolution)
        torch.library.opcheck(torch.ops.bitorch_engine.conv_weight_only.default, arguments)


def layer_and_input(channels_last: bool, **options: Any) -> tuple[nBitConv2d, Tensor]:
    layer = nBitConv2d(3, 24, 3, stride=2, padding=1, w_bit=3, **options)
    x = torch.randn(2, 3, 15, 18)
    return layer, x.contiguous(memory_format=torch.channels_last) if channels_last else x


def by_torch(layer: nBitConv2d, x: Tensor) -> Tensor:
    weight = layer.weight.dequantize(channels_last=ops.is_channels_last(x)).to(x.dtype)
    return layer._conv_forward(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of the kernel."""
    kernel, called = float_conv._planned, []
    as_kernels_are = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)
    monkeypatch.setattr(float_conv, "_planned", as_kernels_are(lambda *args: (called.append(1), kernel(*args))[1]))
    return called


@each_order
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_takes_it_with_and_without_gradients(channels_last: bool, bias: bool, calls: list[int]) -> None:
    layer, x = layer_and_input(channels_last, bias=bias)
    trained = layer(x)
    with torch.no_grad():
        once, again, of_a_functional = layer(x), layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, 2, 1)
    assert len(calls) == 4
    for y in (trained, once, again, of_a_functional):
        assert torch.equal(y, trained)
        torch.testing.assert_close(y, by_torch(layer, x))
        assert order(y) == order(by_torch(layer, x))


@each_order
def test_gradients_are_those_of_torch(channels_last: bool) -> None:
    layer, x = layer_and_input(channels_last)
    x.requires_grad_()
    dense, bias = layer.weight.dequantize().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    y, expected = layer(x), torch.nn.functional.conv2d(x, dense, bias, 2, 1)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, dense, bias), grad), rtol=1e-4, atol=1e-4)


@each_order
def test_a_layer_that_changes_gives_what_it_then_is(channels_last: bool) -> None:
    layer, x = layer_and_input(channels_last)
    with torch.no_grad():
        layer(x)
        layer.weight.copy_(torch.randn(layer.weight.shape))
        torch.testing.assert_close(layer(x), by_torch(layer, x))
        layer.weight.multiply_channels_(torch.rand(24))
        torch.testing.assert_close(layer(x), by_torch(layer, x))
        layer.bias.add_(1)
        torch.testing.assert_close(layer(x), by_torch(layer, x))
        layer.bias = None
        torch.testing.assert_close(layer(x), by_torch(layer, x))


@each_order
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_a_plan_for_torchs_convolution_follows_the_layer(channels_last: bool, bits: int) -> None:
    layer = nBitConv2d(80, 24, 3, padding=2, dilation=2, groups=2, w_bit=bits)
    x = torch.randn(2, 80, 7, 9).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )

    def check() -> None:
        for _ in range(2):
            assert torch.equal(layer(x), by_torch(layer, x))
            assert order(layer(x)) == order(by_torch(layer, x))

    with torch.no_grad():
        check()
        assert layer._plans
        layer.weight.copy_(torch.randn(layer.weight.shape))
        check()
        layer.weight.multiply_channels_(torch.rand(24))
        check()
        layer.bias.add_(1)
        check()
        layer.bias = torch.nn.Parameter(torch.randn(24))
        check()
        layer.bias.data = layer.bias.double()
        check()
        layer.bias = None
        check()
        layer.weight = nBitConv2d(80, 24, 3, groups=2, w_bit=bits).weight
        check()
        prune.random_unstructured(layer, "weight", 0.5)
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, None, 1, 2, 2, 2))


@each_order
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_images_of_one_pixel(channels_last: bool, batch: int, bits: int) -> None:
    layer = nBitConv2d(160, 24, 1, stride=2, w_bit=bits)
    x = torch.randn(batch, 160, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        for _ in range(2):
            y = layer(x)
            assert y.shape == (batch, 24, 1, 1)
            torch.testing.assert_close(y, by_torch(layer, x))
        layer.weight.copy_(torch.randn(layer.weight.shape))
        torch.testing.assert_close(layer(x), by_torch(layer, x))


@each_order
@pytest.mark.parametrize("grad", [False, True])
def test_other_dtypes_stay_torchs(channels_last: bool, grad: bool, calls: list[int]) -> None:
    layer, x = layer_and_input(channels_last)
    with torch.set_grad_enabled(grad):
        wide = layer(x).detach()  # a layer in a graph cannot be cast
        before = len(calls)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), by_torch(layer, x))
        assert torch.equal(layer(x.bfloat16()), by_torch(layer, x.bfloat16()))
        assert len(calls) == before
        layer.bfloat16()
        of_cast = layer(x)
        assert torch.equal(layer(x.bfloat16()), by_torch(layer, x.bfloat16()))
    assert len(calls) == before + 1
    torch.testing.assert_close(of_cast, wide, rtol=0.01, atol=0.01)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"padding": "same", "stride": 1, "kernel_size": 4}], ids=str
)
def test_every_kind_of_padding(options: dict[str, Any]) -> None:
    layer = nBitConv2d(**{"in_channels": 3, "out_channels": 8, "kernel_size": 3, "padding": 1, **options})
    for x in (torch.randn(2, 3, 9, 10), torch.randn(3, 9, 10)):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), by_torch(layer, x))


def test_lines_that_are_zeros_for_the_most_part_are_left_to_torch() -> None:
    wide = {"padding": (300, 300), "dilation": (300, 300)}
    assert not case((1, 3, 32, 32), (4, 3, 3, 3), channels_last=True, **wide).has_kernel()
    assert case((1, 3, 160, 160), (4, 3, 3, 3), channels_last=True, **wide).has_kernel()


def test_only_lines_of_the_image_are_kept() -> None:
    """Of 381 lines between the first tap and the last, 80 lie in the image."""
    c = case((2, 3, 80, 81), (4, 3, 3, 3), channels_last=True, padding=(190, 7), dilation=(190, 7))
    assert c.has_kernel()
    assert_near(c, c.found())
