"""The GPU's integer convolutions compute exactly what torch.nn.functional computes."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.ops.reference import quantized_conv as reference
from bitorch_engine.ops.reference.layout import is_channels_last
from bitorch_engine.ops.triton import quantized_conv as kernels
from tests.ops.cpu.test_conv import Case, Operands, expected_grad_input, operands, with_integers

# Programs are slow in the interpreter: the smallest maps that have an inside, a border and a rest.
CASES = {
    "3x3": Case((2, 20, 3, 4), (18, 20, 3, 3), padding=(1,)),
    "3x3-of-64-channels": Case((1, 64, 3, 3), (33, 64, 3, 3), padding=(1,)),
    "1x1-strided": Case((2, 36, 3, 4), (5, 36, 1, 1), stride=(2,)),
    "1x1-of-16-channels": Case((2, 16, 3, 2), (5, 16, 1, 1)),
    "1x1-strided-of-48-channels": Case((2, 48, 3, 4), (5, 48, 1, 1), stride=(2,)),
    "rgb": Case((1, 3, 5, 4), (5, 3, 3, 3), stride=(2,), padding=(1,)),
    "dilated": Case((1, 5, 5, 7), (7, 5, 3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 3)),
    "groups": Case((2, 15, 3, 3), (12, 5, 3, 3), padding=(1,), groups=3),
    "depthwise": Case((2, 9, 5, 4), (9, 1, 3, 3), stride=(2,), padding=(1,), groups=9),
    "depthwise-of-two-results": Case((1, 3, 4, 3), (6, 1, 2, 3), groups=3),
    "narrow-groups": Case((1, 6, 3, 4), (4, 3, 3, 2), padding=(1, 0), groups=2),
    "padding-that-differs": Case((1, 6, 4, 5), (9, 6, 4, 2), stride=(2, 1), pad=(1, 0, 2, 1)),
    "padding-wider-than-the-image": Case((1, 4, 1, 2), (3, 4, 3, 3), padding=(4,)),
    "1d": Case((2, 10, 9), (18, 10, 5), stride=(2,), padding=(3,)),
    "linear": Case((5, 40, 1), (7, 40, 1)),
    "3d": Case((1, 6, 3, 4, 3), (17, 6, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    "transposed": Case((1, 20, 3, 2), (20, 9, 4, 3), stride=(2,), padding=(1,), transposed=True, output_padding=(0, 1)),
    "transposed-groups": Case(
        (1, 12, 2, 2), (12, 5, 3, 3), stride=(3, 2), dilation=(1, 2), transposed=True, groups=2, output_padding=(1, 0)
    ),
    "transposed-narrow": Case((1, 4, 3, 3), (4, 2, 3, 2), stride=(2, 1), transposed=True, groups=2),
    "transposed-gaps": Case((1, 4, 2, 2), (4, 6, 2, 1), stride=(3,), transposed=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def on(device: torch.device, o: Operands) -> Operands:
    return o._replace(**{name: value.to(device) for name, value in o._asdict().items() if isinstance(value, Tensor)})


def run_codes(o: Operands, device: torch.device, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    o = on(device, o)
    poison = torch.zeros((), device=device)
    head = (o.packed_codes(), list(o.case.shape), o.scale, o.low, poison, o.a_bit, o.packed, o.channel_scale, o.w_bit)
    return kernels.conv_codes(*head, *o.geometry, dtype, last).cpu()


def run_floats(o: Operands, x: Tensor, device: torch.device, bias: Tensor | None = None) -> Tensor:
    o = on(device, o)
    bias = None if bias is None else bias.to(device)
    head = (x.to(device), o.scale, o.low, o.a_bit, o.packed, o.channel_scale, o.w_bit, bias)
    return kernels.conv(*head, *o.geometry).cpu()


def grad_input(o: Operands, grad: Tensor, grad_scale: Tensor, device: torch.device, *rest: object) -> Tensor:
    o = on(device, o)
    codes = grad.to(torch.int8).movedim(1, -1).contiguous().to(device)
    shape = list(o.case.shape)
    return kernels.conv_grad_input(codes, grad_scale.to(device), o.packed, o.w_bit, shape, *o.geometry, *rest).cpu()


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test with this computes, a kernel has computed."""
    monkeypatch.setattr(kernels, "reference", None)


@pytest.mark.usefixtures("no_reference")
@each_case
def test_the_product_of_codes_is_that_of_torch(case: Case, device: torch.device) -> None:
    o = operands(case, 8, 4, signed=False)
    assert torch.equal(run_codes(o, device), o.expected())


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize(
    "name",
    [
        "3x3",
        "1x1-of-16-channels",
        "1x1-strided-of-48-channels",
        "linear",
        "rgb",
        "depthwise",
        "padding-that-differs",
        "3d",
        "transposed",
    ],
)
def test_floats_are_quantized_on_the_way(name: str, device: torch.device) -> None:
    case = CASES[name]
    o = operands(case, 3, 5)
    bias = torch.randn(case.out_channels)
    # Nearer to a code's value than to any other's.
    x = (o.codes + 0.8 * (torch.rand(case.shape) - 0.5)).float() * o.scale
    assert torch.equal(run_floats(o, x, device, bias), o.expected(bias))


@pytest.mark.usefixtures("no_reference")
@each_case
def test_the_gradient_of_the_input_is_that_of_autograd(case: Case, device: torch.device) -> None:
    o = operands(case, 8, 4)
    grad = torch.randint(-128, 128, case.convolution.output_shape(case.shape, case.weight)).float()
    grad_scale = torch.rand(case.shape[0], *[1] * (len(case.shape) - 1))
    found = grad_input(o, grad, grad_scale, device, torch.float32, True)
    assert torch.equal(found, expected_grad_input(o, grad, grad_scale))
    assert found.movedim(1, -1).is_contiguous()


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("w_bit", range(1, 9))
def test_every_width_is_exact(w_bit: int, device: torch.device) -> None:
    a_bit = 1 + w_bit * 3 % 8
    o = operands(Case((5, 33, 1), (9, 33, 1)), a_bit, w_bit)
    assert torch.equal(run_codes(o, device), o.expected())
    assert torch.equal(run_floats(o, (o.codes * o.scale).float(), device), o.expected())
    grad, one = torch.randint(-128, 128, (5, 9, 1)).float(), torch.ones(5, 1, 1)
    assert torch.equal(grad_input(o, grad, one, device, torch.float32, False), expected_grad_input(o, grad, one))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a minute in the interpreter")
@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("w_bit", [2, 8])
def test_the_largest_products_neither_saturate_nor_overflow(w_bit: int, device: torch.device) -> None:
    case = Case((3, 65535, 1), (2, 65535, 1))
    lowest = torch.zeros(case.weight, dtype=torch.uint8)
    o = with_integers(case, 8, w_bit, torch.full(case.shape, 255, dtype=torch.uint8), 0, lowest)
    assert torch.equal(run_codes(o, device), o.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["1x1-strided", "depthwise"])
def test_results_have_the_dtype_and_memory_order_of_the_input(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    o = operands(CASES[name])
    bias = torch.randn(o.case.out_channels)
    x = (o.codes * o.scale).to(dtype)
    every_other = torch.stack([x, x], -1)[..., 0]  # steps of two elements
    expected = reference.conv(x, o.scale, o.low, o.a_bit, o.packed, o.channel_scale, o.w_bit, bias, *o.geometry)
    for given in (x.movedim(1, -1).contiguous().movedim(-1, 1), every_other):
        y = run_floats(o, given, device, bias)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        assert is_channels_last(y) == is_channels_last(given)


@pytest.mark.parametrize("name", ["1x1-strided", "depthwise"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_activation_that_is_not_finite_poisons_the_result(name: str, bad: float, device: torch.device) -> None:
    o = operands(CASES[name])
    x = torch.randn(o.case.shape)
    x[1, 7, 2, 3] = bad
    assert run_floats(o, x, device).isnan().all()


def test_denormals_zeros_and_ties_are_quantized_as_the_reference_does(device: torch.device) -> None:
    case = Case((4, 40, 1), (7, 40, 1))
    for bits in (1, 8):
        o = operands(case, bits, 4)._replace(scale=torch.tensor(0.5))
        x = torch.cat([torch.randn(80) * 1e-40, torch.arange(-40, 38) / 4, torch.tensor([0.0, -0.0])]).view(case.shape)
        found = run_floats(o, x, device)
        head = (x, o.scale, o.low, bits, o.packed, o.channel_scale, 4, None)
        assert torch.equal(found, reference.conv(*head, *o.geometry))


def test_what_the_kernels_do_not_suit_goes_to_the_reference(device: torch.device) -> None:
    deep = Case((1, 70_000, 1), (2, 70_000, 1))  # sums that 32 bits do not hold
    full = torch.full(deep.shape, 255, dtype=torch.uint8)
    o = with_integers(deep, 8, 8, full, 0, torch.zeros(deep.weight, dtype=torch.uint8))
    assert torch.equal(run_codes(o, device), o.expected())
    cast = operands(CASES["linear"])
    cast = cast._replace(scale=torch.tensor(0.375, dtype=torch.bfloat16), channel_scale=cast.channel_scale.bfloat16())
    x = torch.randn(cast.case.shape)
    arguments = (x, cast.scale, cast.low, 8, cast.packed, cast.channel_scale, cast.w_bit, None, *cast.geometry)
    assert torch.equal(run_floats(cast, x, device), reference.conv(*arguments))


def test_an_empty_batch_gives_an_empty_result(device: torch.device) -> None:
    o = operands(Case((0, 4, 5, 6), (3, 4, 3, 3)))
    assert run_floats(o, torch.zeros(o.case.shape), device).shape == (0, 3, 3, 4)
    assert run_codes(o, device).shape == (0, 3, 3, 4)
    grad_x = grad_input(o, torch.zeros(0, 3, 3, 4), torch.zeros(0, 1, 1, 1), device, torch.float32, False)
    assert grad_x.shape == o.case.shape
