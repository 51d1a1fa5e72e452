"""The GPU's products of packed weights with float activations agree with float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.bits import bit_format, pack
from bitorch_engine.ops.triton import linear as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(rows: int, columns: int, bits: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, scale, value): a weight of random codes, and what it stands for in float64."""
    index = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows, groups) + 0.5
    codes = bit_format(bits).codes(index).double()
    value = (codes.view(rows, groups, -1) * scale.double().unsqueeze(-1)).view(rows, columns)
    return pack(index, bits), scale, value


def assert_as_near_as_torch(x: Tensor, weight: Tensor, bias: Tensor | None, found: Tensor) -> None:
    """At most twice the error of torch's product in the same dtype, and nowhere more than a few of its steps."""
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    plain = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    error, allowed = (found.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.mean() <= 2 * allowed.mean() + 1e-9
    size = F.linear(x.double().abs(), weight.abs()) + (0 if bias is None else bias.abs())
    assert (error <= 4 * torch.finfo(x.dtype).eps * size).all()


def run(x: Tensor, packed: Tensor, scale: Tensor, bits: int, bias: Tensor | None, *rest: int) -> Tensor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bias = None if bias is None else bias.to(device)
    return kernels.linear_weight_only(x.to(device), packed.to(device), scale.to(device), bits, bias, *rest).cpu()


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test with this computes, a kernel has computed."""
    monkeypatch.setattr(kernels.reference, "linear_weight_only", None)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_of_any_type(dtype: torch.dtype) -> None:
    check_a_single_row(4, dtype)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_row_with_any_width(bits: int) -> None:
    check_a_single_row(bits, DTYPES[bits % 3])


def check_a_single_row(bits: int, dtype: torch.dtype) -> None:
    packed, scale, weight = weight_of(19, 96, bits)
    x, bias = torch.randn(1, 96).to(dtype), torch.randn(19)
    found = run(x, packed, scale.view(-1), bits, bias, 96)
    assert found.dtype == dtype
    assert_as_near_as_torch(x, weight, bias, found)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_few_rows(bits: int) -> None:
    # Rows of whole words that hold whole codes have a way of their own.
    dtype, columns = (torch.bfloat16, 45) if bits in (3, 5, 7) else (DTYPES[bits % 3], 96)
    packed, scale, weight = weight_of(19, columns, bits)
    x = torch.randn(2, 5, columns).to(dtype)
    found = run(x, packed, scale.view(-1), bits, None, columns)
    assert found.shape == (2, 5, 19)
    assert_as_near_as_torch(x, weight, None, found)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize(("count", "bits", "group"), [(1, 4, 32), (1, 3, 64), (7, 4, 64), (7, 3, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_have_scales_of_their_own(count: int, bits: int, group: int, dtype: torch.dtype) -> None:
    packed, scale, weight = weight_of(18, 128, bits, 128 // group)
    x = torch.randn(count, 256).to(dtype)[:, ::2]
    assert_as_near_as_torch(x, weight, None, run(x, packed, scale, bits, None, 128, group))


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("count", [1, 40])
def test_long_rows_and_several_blocks(count: int) -> None:
    packed, scale, weight = weight_of(37, 1120, 4)
    x = torch.randn(count, 1120)
    assert_as_near_as_torch(x, weight, None, run(x, packed, scale.view(-1), 4, None, 1120))


@pytest.mark.parametrize(
    ("rows", "bits", "dtype"), [(7, 4, torch.float32), (1, 3, torch.bfloat16), (0, 8, torch.float16)]
)
def test_the_gradient_of_the_input_is_the_product_with_the_weight(rows: int, bits: int, dtype: torch.dtype) -> None:
    packed, scale, weight = weight_of(19, 45, bits)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grad = torch.randn(rows, 19).to(dtype)
    found = kernels.linear_grad_input(grad.to(device), packed.to(device), scale.view(-1).to(device), bits, 45).cpu()
    assert found.dtype == dtype
    assert torch.allclose(found.double(), grad.double() @ weight, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_what_the_kernels_do_not_suit_goes_to_the_reference() -> None:
    packed, scale, weight = weight_of(6, 45, 3, 3)
    x = torch.randn(2, 45)
    assert_as_near_as_torch(x, weight, None, run(x, packed, scale, 3, None, 45, 15))
    torch.testing.assert_close(run(x.double(), packed, scale, 3, None, 45, 15), F.linear(x.double(), weight))
    assert run(x[:0], packed, scale, 3, None, 45, 15).shape == (0, 6)
    with pytest.raises(ValueError, match="with group_size 7, channel_scale must be"):
        run(x, packed, scale, 3, None, 45, 7)
