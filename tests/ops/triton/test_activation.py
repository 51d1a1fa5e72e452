"""Quantized activations on a GPU: every code is the reference's, and so is every gradient."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.ops.reference import activation as reference
from bitorch_engine.ops.triton import activation as kernels

SHAPES = [(1, 1), (5, 37), (2, 3, 7, 5), (1, 16, 4, 4), (2, 33, 3, 2, 5)]
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 1e38, -1e38]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(shape: tuple[int, ...], dtype: torch.dtype, last: bool, odd: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if odd:
        x.view(-1)[: len(ODD)] = torch.tensor(ODD)[: x.numel()]
    x = x.to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def same(found: Tensor, wanted: Tensor) -> bool:
    found = found.cpu()
    return torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)) and found.dtype == wanted.dtype


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("odd", [False, True], ids=["finite", "odd"])
def test_codes_are_those_of_the_reference(bits: int, odd: bool, device: torch.device) -> None:
    low = torch.tensor(-1.0 if bits == 1 else (0.0 if odd else -(2.0 ** (bits - 1))))
    scale = torch.tensor(0.13)
    for place, shape in enumerate(SHAPES):
        x = values(shape, DTYPES[(place + bits) % 3], place % 2 == 0, odd)
        found = kernels.quantize_activation(x.to(device), scale.to(device), low.to(device), bits)
        wanted = reference.quantize_activation(x, scale, low, bits)
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True)), shape


def test_ties_go_to_the_even_code(device: torch.device) -> None:
    x = (torch.arange(-9, 10) / 2)[None]
    one, low = torch.ones(()).to(device), torch.tensor(-8.0).to(device)
    codes, _, _ = kernels.quantize_activation(x.to(device), one, low, 4)
    shape = list(x.shape)
    found = kernels.activation_values(codes, one, low, 4, shape, torch.float32, False)
    assert found.flatten().tolist() == [float(round(value)) for value in x.flatten().tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("last", [False, True], ids=["in order", "channels last"])
def test_values_and_gradients_are_those_of_the_reference(bits: int, last: bool, device: torch.device) -> None:
    low, scale = torch.tensor(-1.0), torch.tensor(0.13)
    for place, shape in enumerate(SHAPES[1::2] if last else SHAPES[::2]):
        x, dtype = values(shape, torch.float32, last), DTYPES[(place + bits) % 3]
        codes, beyond, _ = reference.quantize_activation(x, scale, low, bits)
        held = [tensor.to(device) for tensor in (codes, beyond, low)]
        found = kernels.activation_values(held[0], scale.to(device), held[2], bits, shape, dtype, last)
        wanted = reference.activation_values(codes, scale, low, bits, shape, dtype, last)
        assert same(found, wanted) and found.stride() == wanted.stride()

        grad = (values(shape, torch.float32, last) * 3).to(dtype)
        grad_x, grad_scale = kernels.activation_grads(grad.to(device), *held, bits)
        wanted_x, _ = reference.activation_grads(grad, codes, beyond, low, bits)
        _, exact = reference.activation_grads(grad.double(), codes, beyond, low, bits)
        assert same(grad_x, wanted_x) and grad_x.stride() == wanted_x.stride()
        assert grad_scale.dtype == torch.float32 and grad_scale.shape == ()
        assert abs(float(grad_scale) - float(exact)) <= 1e-6 * float(grad.double().abs().sum()) * 2**bits


def test_nothing_at_all_and_float64_go_to_the_reference(device: torch.device) -> None:
    scale, low = torch.tensor(0.1).to(device), torch.tensor(0.0).to(device)
    codes, beyond, poison = kernels.quantize_activation(torch.zeros(0, 3, device=device), scale, low, 4)
    assert (codes.numel(), beyond.numel(), float(poison)) == (0, 0, 0.0)
    assert kernels.activation_values(codes, scale, low, 4, [0, 3], torch.float32, False).shape == (0, 3)
    x = torch.tensor([[0.26, 0.14]], dtype=torch.float64, device=device)
    codes, _, _ = kernels.quantize_activation(x, scale, low, 4)
    assert codes.tolist() == [3 | 1 << 4]
