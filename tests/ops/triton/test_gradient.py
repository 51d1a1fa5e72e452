"""Gradients are rounded on a GPU to the codes of the reference, and to the gradient on average."""

import pytest
import torch

from bitorch_engine.ops.reference import gradient as reference
from bitorch_engine.ops.triton import gradient as kernels

SHAPES = [(1, 1), (5, 37), (3, 2, 300), (2, 3, 7, 5), (2, 17, 3, 3)]


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("keep", [0, 1], ids=["a scale a sample", "a scale a channel"])
@pytest.mark.parametrize("odd", [False, True], ids=["finite", "odd"])
def test_codes_and_scales_are_those_of_the_reference(bits: int, keep: int, odd: bool, device: torch.device) -> None:
    for place, shape in enumerate(SHAPES):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(place))
        if odd:
            grad.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1e-42])[: grad.numel()]
        grad = grad.to((torch.float32, torch.bfloat16, torch.float16)[(place + bits) % 3])
        if place % 2:
            grad = grad.movedim(1, -1).contiguous().movedim(-1, 1)
        seed = torch.tensor(-77, dtype=torch.int32)
        factor = torch.rand(shape[1]) + 0.1 if place % 3 else None
        found = kernels.quantize_gradient(
            grad.to(device), None if factor is None else factor.to(device), bits, keep, seed.to(device)
        )
        codes, scale = reference.quantize_gradient(grad, factor, bits, keep, seed)
        assert torch.equal(found[0].cpu(), codes) and found[0].is_contiguous(), shape
        assert torch.equal(found[1].cpu().nan_to_num(nan=7.0), scale.nan_to_num(nan=7.0)), shape


def test_the_mean_of_many_roundings_is_the_gradient(device: torch.device) -> None:
    grad, total, rounds = torch.randn(2, 512, dtype=torch.float64), torch.zeros(2, 512, dtype=torch.float64), 16
    for seed in range(rounds):
        key = torch.tensor(seed, dtype=torch.int32, device=device)
        codes, scale = kernels.quantize_gradient(grad.float().to(device), None, 4, 0, key)
        total += (codes * scale).cpu().double()
    # An error of one rounding has a standard deviation of at most 1/2 code, the mean of 16 one of 1/8.
    assert float(((total / rounds - grad) / scale.cpu()).abs().max()) < 5 / 8
    # The mean of all 16 * 1024 errors, 1/256.
    assert abs(float(((total / rounds - grad) / scale.cpu()).mean())) < 4 / 256


def test_zeros_stay_zero_and_nothing_at_all_is_taken(device: torch.device) -> None:
    seed = torch.tensor(3, dtype=torch.int32, device=device)
    codes, scale = kernels.quantize_gradient(torch.zeros(2, 3, 4, device=device), None, 8, 1, seed)
    assert codes.shape == (2, 4, 3) and not codes.any() and not scale.any() and scale.shape == (1, 3, 1)
    codes, scale = kernels.quantize_gradient(torch.zeros(0, 3, device=device), None, 8, 1, seed)
    assert codes.shape == (0, 3) and scale.shape == (1, 3)
