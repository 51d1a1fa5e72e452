"""Packed weights with float activations agree with float64 products of the weights they stand for."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine import nBitLinear, ops
from bitorch_engine.bits import bit_format, pack
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import linear
from bitorch_engine.ops.reference import quantized_conv

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _weight(rows: int, columns: int, bits: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows, groups) + 0.5
    codes = bit_format(bits).codes(index).double()
    value = (codes.view(rows, groups, -1) * scale.double().unsqueeze(-1)).view(rows, columns)
    return pack(index, bits), scale, value


def _assert_near(out: Tensor, expected: Tensor, size: Tensor) -> None:
    assert ((out.double() - expected).abs() <= TOLERANCE[out.dtype] * (size + 1)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("m", "n", "k", "group"), [(0, 5, 7, 0), (1, 37, 13, 0), (9, 21, 96, 32), (70, 11, 45, 15)])
def test_linear(
    m: int, n: int, k: int, group: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(bits)
    monkeypatch.setattr(linear, "BLOCK", 4 * k)
    packed, scale, weight = _weight(n, k, bits, k // group if group else 1)
    x, bias = torch.randn(m, 2 * k).to(dtype)[:, ::2], torch.randn(n)
    out = ops.linear_weight_only(x, packed, scale if group else scale.view(-1), bits, bias, k, group)
    assert out.dtype == dtype
    _assert_near(out, x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 37, 13), (9, 21, 96), (2, 9, 0)])
def test_gradient_of_the_input(
    m: int, n: int, k: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BLOCK", 8 * k)
    packed, scale, weight = _weight(n, k, bits)
    grad = torch.randn(n, m).to(dtype).T
    out = ops.linear_grad_input(grad, packed, scale.view(-1), bits, k)
    assert out.dtype == dtype
    _assert_near(out, grad.double() @ weight, grad.double().abs() @ weight.abs())


def test_opcheck_and_wrong_groups() -> None:
    packed, scale, _ = _weight(6, 16, 3, 2)
    x = torch.randn(2, 3, 16)
    torch.library.opcheck(torch.ops.bitorch_engine.linear_weight_only.default, (x, packed, scale, 3, None, 16, 8))
    with pytest.raises(ValueError, match="group_size"):
        ops.linear_weight_only(x, packed, scale, 3, None, 16, 5)


def _errors(found: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    """How far found and torch's float32 product are from the float64 one, as root mean squares."""
    wanted, by_torch = F.linear(x.double(), weight), F.linear(x, weight.float())
    errors = [float((y.double() - wanted).square().mean().sqrt()) for y in (found, by_torch)]
    return errors[0], errors[1]


each_isa = pytest.mark.parametrize("isa", cpu.available_isas())


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """torch's setting, which is "highest" again afterwards."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (3, 136), (9, 1032)])
@pytest.mark.parametrize(("setting", "largest"), [("high", 1), ("medium", 1), ("high", 100), ("high", 1e5)])
def test_sixteen_bits_of_activations_where_torch_may_take_so_many(
    isa: str, rows: int, columns: int, bits: int, setting: str, largest: float, precision: Callable[[str], None]
) -> None:
    packed, scale, weight = _weight(137, columns, bits)
    x = torch.randn(rows, columns)
    x[:, ::100] *= largest
    with cpu.cap_isa(isa):
        exact = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns)
        precision(setting)
        found = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns)
        precision("highest")
        assert torch.equal(ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns), exact)
    wanted = F.linear(x.double(), weight)
    error, of_exact = ((y - wanted).square().mean().sqrt() / wanted.square().mean().sqrt() for y in (found, exact))
    assert error < 2**-14
    assert of_exact < 2**-21
    if bits < 8 and rows < 9 and largest == 1:
        assert error > 4 * of_exact  # it is the faster way


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [136, 1032, 4096])
def test_short_floats_lose_little_more_than_the_result_is_rounded(
    isa: str, columns: int, bits: int, dtype: torch.dtype
) -> None:
    packed, scale, weight = _weight(137, columns, bits)
    codes = ops.unpack(packed, bits, 137 * columns).view(137, columns)
    codes[:, ::64] = 2 ** (bits - 1)  # the index of 0
    weight[:, ::64] = 0
    x = torch.randn(2, columns).sign() * 0.07
    x[:, 1::2] *= 1e-3
    x[:, ::64] = 1  # as uneven as digits may be
    x = x.to(dtype)
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, ops.pack(codes.flatten(), bits), scale.view(-1), bits, None, columns)
    wanted = F.linear(x.double(), weight)
    error, rounding = ((y.double() - wanted).square().mean().sqrt() for y in (found, wanted.to(dtype)))
    assert error <= 1.05 * rounding


@each_isa
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 8, 13, 64, 72, 101, 150, 1000, 1001, 4104])
def test_few_rows_are_as_near_as_torch(isa: str, bits: int, columns: int) -> None:
    packed, scale, weight = _weight(137, columns, bits)
    x = torch.randn(3, columns)
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns)
        ours, theirs = _errors(found, x, weight)
        assert ours <= 2 * theirs
        bias = torch.randn(137)
        assert torch.equal(ops.linear_weight_only(x, packed, scale.view(-1), bits, bias, columns), found + bias)


GROUPS = [(96, 32), (224, 32), (192, 96), (320, 64), (1152, 128), (1536, 512), (3072, 1024), (4096, 32), (256, 256)]


@each_isa
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group"), [*GROUPS, (520, 8), (288, 144)])
def test_scales_of_groups_in_few_rows(isa: str, bits: int, columns: int, group: int) -> None:
    packed, scale, weight = _weight(137, columns, bits, columns // group)
    scale[3, -1] = weight[3, -group:] = 0
    x, bias = torch.randn(11, columns), torch.randn(137)
    x[1, ::20] *= 30  # uneven
    x[2] = 0
    for some in (x[1:2], x[:3], x[2:]):
        with cpu.cap_isa(isa):
            found = ops.linear_weight_only(some, packed, scale, bits, None, columns, group)
            with_bias = ops.linear_weight_only(some, packed, scale, bits, bias, columns, group)
        ours, theirs = _errors(found, some, weight)
        assert ours <= 2 * theirs
        assert not found[(some == 0).all(1)].any()
        torch.testing.assert_close(with_bias, found + bias, rtol=1e-4, atol=1e-6 * 2**bits * columns)


@each_isa
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_in_groups_gives_what_torch_gives(isa: str, bits: int, odd: float) -> None:
    packed, scale, weight = _weight(21, 480, bits, 15)
    x = torch.randn(2, 480)
    x[1, 479] = odd
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, packed, scale, bits, None, 480, 32)
    torch.testing.assert_close(found, F.linear(x, weight.float()), equal_nan=True, rtol=1e-5, atol=1e-4)


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1.0, 1e30])
def test_a_few_large_activations_among_small_ones(isa: str, bits: int, size: float) -> None:
    packed, scale, weight = _weight(137, 1032, bits)
    x = torch.randn(3, 1032) * size
    x[:, ::100] *= 300
    x[1, 512:] = 0
    with cpu.cap_isa(isa):
        ours, theirs = _errors(ops.linear_weight_only(x, packed, scale.view(-1), bits, None, 1032), x, weight)
    assert ours <= 2 * theirs


@each_isa
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [64, 160, 520, 1000])
@pytest.mark.parametrize(("count", "size"), [(1, 1e3), (1, 1e6), (3, 1e5), (9, 1e4), (20, 30.0)])
def test_large_activations_whose_weights_are_zero(isa: str, bits: int, columns: int, count: int, size: float) -> None:
    packed, scale, weight = _weight(137, columns, bits)
    codes = ops.unpack(packed, bits, 137 * columns).view(137, columns)
    codes[:, -count:] = 2 ** (bits - 1)  # the index of 0
    weight[:, -count:] = 0
    x = torch.randn(3, columns)
    x[:, -count:] = size
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, ops.pack(codes.flatten(), bits), scale.view(-1), bits, None, columns)
        ours, theirs = _errors(found, x, weight)
    assert ours <= 2 * theirs


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sums_of_the_lowest_digits_and_the_lowest_codes_fit(isa: str, bits: int) -> None:
    low = -128 * (1 + 256)  # two digits of -128
    x = torch.full((1, 1024), (64 * 65536 + low) / 0x7F7F7F)
    x[0, ::512] = 1
    index = torch.zeros(4, 1024, dtype=torch.uint8)
    weight = bit_format(bits).codes(index).double()
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, pack(index, bits), torch.ones(4), bits, None, 1024)
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=1e-6, atol=0)


@each_isa
@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_of_one_sign_lose_nothing_to_the_lowest_code(isa: str, bits: int) -> None:
    packed, scale, weight = _weight(137, 4096, bits)
    x = torch.rand(3, 4096) + 1
    with cpu.cap_isa(isa):
        ours, theirs = _errors(ops.linear_weight_only(x, packed, scale.view(-1), bits, None, 4096), x, weight)
    assert ours <= 2 * theirs


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("rows", "channels", "columns"), [(9, 137, 1032), (21, 64, 520), (16, 3, 4103), (33, 5, 8)])
@pytest.mark.parametrize("size", [100.0, 1e6])
def test_more_rows_of_which_some_have_more_digits_or_are_multiplied_as_floats(
    isa: str, size: float, bits: int, rows: int, channels: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_DIGIT_ROWS", {isa: rows})
    packed, scale, weight = _weight(channels, columns, bits)
    x, bias = torch.randn(3, rows // 3, columns), torch.randn(channels)
    x[1, :2, ::100] *= size
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns)
        assert found.shape == (3, rows // 3, channels)
        uneven = torch.zeros(3, rows // 3, dtype=torch.bool)
        uneven[1, :2] = True
        for some in (uneven, ~uneven):
            ours, theirs = _errors(found[some], x[some], weight)
            assert ours <= 2 * theirs
        with_bias = ops.linear_weight_only(x, packed, scale.view(-1), bits, bias, columns)
        torch.testing.assert_close(with_bias, found + bias)
        x[2, 0, 5] = float("inf")
        odd = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, columns)
    torch.testing.assert_close(odd[2, 0], F.linear(x[2, 0], weight.float()), equal_nan=True)
    assert torch.equal(odd[~uneven][: rows // 3], found[~uneven][: rows // 3])


@each_isa
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_give_what_torch_gives(isa: str, bits: int, odd: float) -> None:
    packed, scale, weight = _weight(21, 520, bits)
    x = torch.randn(2, 520)
    x[1, 515] = odd
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, packed, scale.view(-1), bits, None, 520)
    wanted = F.linear(x, weight.float())
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5 * 2**bits)


@each_isa
@pytest.mark.parametrize("w_bit", range(1, 9))
@pytest.mark.parametrize(("a_bit", "low"), [(1, -1), (3, 0), (4, -8), (8, 0), (8, -128)])
@pytest.mark.parametrize(("channels", "columns"), [(1, 8), (37, 77), (6, 520), (9, 1023), (19, 4096)])
def test_one_quantized_row_is_exact(isa: str, channels: int, columns: int, a_bit: int, low: int, w_bit: int) -> None:
    packed, channel_scale, weight = _weight(channels, columns, w_bit)
    x, scale, bias = torch.randn(1, columns), torch.tensor(0.02 * 2 ** (8 - a_bit)), torch.randn(channels)
    if columns > 500:  # the largest products and parts of sums that there are
        index = torch.zeros(channels, columns, dtype=torch.uint8)
        index[::2] = 2**w_bit - 1
        packed, x[0, :500], x[0, 500:] = pack(index, w_bit), 100.0, 128 * float(scale)
    fields: tuple[Any, ...] = ((), (), (), False, (), 1, ())
    arguments = (scale, torch.tensor(float(low)), a_bit, packed, channel_scale.view(-1), w_bit, bias, weight.shape)
    expected = quantized_conv.conv(x, *arguments, *fields)
    with cpu.cap_isa(isa):
        assert torch.equal(ops.conv(x, *arguments, *fields), expected)
        assert torch.equal(ops.conv(-x, *arguments, *fields), quantized_conv.conv(-x, *arguments, *fields))
        x[0, 7] = float("nan")
        assert ops.conv(x, *arguments, *fields).isnan().all()


@each_isa
def test_a_layer_of_quantized_activations_gives_for_one_row_what_it_gives_for_several(isa: str) -> None:
    torch.manual_seed(0)
    layer = nBitLinear(264, 37, w_bit=4, a_bit=8)
    x = torch.randn(3, 264)
    with cpu.cap_isa(isa), torch.no_grad():
        layer(x)
        layer.eval()
        several = layer(x)
        for _ in range(3):  # at first, then as planned
            assert torch.equal(layer(x[1:2]), several[1:2])
        layer.weight.copy_(layer.weight.dequantize().flip(0))
        assert torch.equal(layer(x[1:2]), layer(x)[1:2])
        assert layer(x[1:2] / 0).isnan().all()
