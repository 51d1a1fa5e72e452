"""Packed weights with float activations agree with float64 products of the weights they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.bits import bit_format, pack
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import linear

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


def test_opcheck_and_wrong_groups() -> None:
    packed, scale, _ = _weight(6, 16, 3, 2)
    x = torch.randn(2, 3, 16)
    torch.library.opcheck(torch.ops.bitorch_engine.linear_weight_only.default, (x, packed, scale, 3, None, 16, 8))
    with pytest.raises(ValueError, match="group_size"):
        ops.linear_weight_only(x, packed, scale, 3, None, 16, 5)


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 4, 9, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_conv(bits: int, groups: int, transposed: bool, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(bits)
    inputs, outputs = 6, 12
    columns = inputs // groups * 6
    monkeypatch.setattr(linear, "BLOCK", columns * rows_at_a_time)
    packed, scale, weight = _weight(outputs, columns, bits)
    weight = weight.view(groups, outputs // groups, inputs // groups, 2, 3)
    weight = (weight.transpose(1, 2) if transposed else weight).flatten(0, 1)
    x, bias = torch.randn(2, inputs, 7, 8), torch.randn(outputs)
    geometry = ([2, 1], [1, 0], [1, 2], transposed, [0, 0], groups)
    args = (weight.shape, *geometry, [1, 0, 0, 2])
    out = linear.conv_weight_only(x, packed, scale.view(-1), bits, bias, *args)
    padded = F.pad(x, [1, 0, 0, 2]).double()
    expected = torch.ops.aten.convolution(padded, weight, bias.double(), *geometry)
    size = torch.ops.aten.convolution(padded.abs(), weight.abs(), None, *geometry)
    _assert_near(out, expected, size)


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 64, 72, 1000, 4104])
def test_few_rows_on_every_instruction_set(isa: str, bits: int, columns: int) -> None:
    packed = ops.pack(torch.randint(0, 1 << bits, (5 * columns,), dtype=torch.uint8), bits)
    scale, bias, x = torch.rand(5), torch.randn(5), torch.randn(3, columns)
    with cpu.cap_isa(isa):
        found = ops.linear_weight_only(x, packed, scale, bits, bias, columns)
    weight = ops.dequantize(packed, scale, bits, columns, torch.float64)
    wanted = F.linear(x.double(), weight, bias.double())
    terms = F.linear(x.double().abs(), weight.abs(), bias.double().abs())
    assert bool(((found.double() - wanted).abs() <= 2e-6 * terms).all())
