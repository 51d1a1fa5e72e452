"""Products of signs by xor and popcount equal torch's convolution of signs, with true zero padding."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import binary

ISAS = pytest.mark.parametrize("isa", cpu.available_isas())
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Any]]:
    """(x, weight signs, channel scale, bias, geometry) of a random convolution that the kernel takes."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    rank, groups = dice.choice([1, 2, 2, 3]), dice.choice([1, 1, 2, 3])
    c_in, c_out = groups * dice.choice([16, 31, 32, 33, 64, 100]), groups * dice.choice([1, 5, 16, 48, 70])
    kernel, stride, dilation = ([dice.randint(1, 3) for _ in range(rank)] for _ in range(3))
    padding, spatial = ([dice.randint(low, high) for _ in range(rank)] for low, high in ((0, 2), (7, 9)))
    x = torch.randn(dice.choice([1, 3]), c_in, *spatial)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-42, -1e-42])
    if dice.random() < 0.5:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.randint(0, 2, (c_out, c_in // groups, *kernel)).double() * 2 - 1
    bias = torch.randn(c_out) if dice.random() < 0.5 else None
    geometry = [list(weight.shape), stride, padding, dilation, False, [0] * rank, groups, []]
    return x, weight, torch.rand(c_out) + 0.5, bias, geometry


def expected(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: list[Any]) -> Tensor:
    signs = torch.where(x >= 0, 1.0, -1.0).double()
    _, stride, padding, dilation, _, _, groups, _ = geometry
    total = CONV[x.dim() - 2](signs, weight, None, stride, padding, dilation, groups).float()
    y = total * (scale * 0.3).view(-1, *[1] * (x.dim() - 2))
    return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))


def convolve(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: list[Any]) -> Tensor:
    assert binary.suits(x.shape, 1, 1, *geometry)
    packed = ops.pack((weight > 0).to(torch.uint8), 1)
    return ops.conv(x, torch.tensor(0.3), torch.tensor(-1.0), 1, packed, scale, 1, bias, *geometry)


@ISAS
@pytest.mark.parametrize("seed", range(40))
def test_it_equals_the_convolution_of_signs(isa: str, seed: int) -> None:
    arguments = problem(seed)
    with cpu.cap_isa(isa):
        found = convolve(*arguments)
    wanted = expected(*arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    if arguments[3] is None:
        assert torch.equal(found, wanted)


@ISAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(isa: str, dtype: torch.dtype) -> None:
    x, weight, scale, _, geometry = problem(1)
    with cpu.cap_isa(isa):
        found = convolve(x.to(dtype), weight, scale, None, geometry)
    assert torch.equal(found, expected(x.to(dtype), weight, scale, None, geometry).to(dtype))


@ISAS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost(isa: str, value: float) -> None:
    x, weight, scale, bias, geometry = problem(2)
    x.view(-1)[-1] = value
    with cpu.cap_isa(isa):
        assert bool(convolve(x, weight, scale, bias, geometry).isnan().all())
