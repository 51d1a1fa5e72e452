"""Quantized gradients are the gradient on average, in codes that fit, and zero where it is zero."""

import pytest
import torch

from bitorch_engine import ops
from bitorch_engine.quantizers.gradient import new_seed

WIDTHS = range(2, 9)


def quantized(grad: torch.Tensor, bits: int, keep: int, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the shape of the gradient, float32, and the scale."""
    codes, scale = ops.quantize_gradient(grad, None, bits, keep, seed)
    assert codes.dtype == torch.int8 and codes.is_contiguous()
    return codes.movedim(-1, 1).to(torch.float32), scale


def seed(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32)


@pytest.mark.parametrize("keep", [0, 1], ids=["a scale a sample", "a scale a channel"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_integers_of_that_width_and_the_largest_reaches_its_end(bits: int, keep: int) -> None:
    grad = torch.randn(3, 4, 5, 6) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1, 1)
    codes, scale = quantized(grad, bits, keep, seed(1))
    limit = 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round()) and float(codes.abs().max()) == limit
    assert scale.shape == ((3, 1, 1, 1) if keep == 0 else (1, 4, 1, 1)) and codes.dtype == scale.dtype == torch.float32
    others = [d for d in range(4) if d != keep]
    assert torch.equal(codes.abs().amax(others), torch.full((grad.shape[keep],), float(limit)))
    assert float(((codes * scale - grad).abs() / scale).max()) <= 1 + 1e-5


@pytest.mark.parametrize("keep", [0, 1], ids=["a scale a sample", "a scale a channel"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_mean_over_seeds_is_the_gradient(bits: int, keep: int) -> None:
    grad = torch.randn(4, 5, 7)
    seeds = 1000
    draws = [quantized(grad, bits, keep, seed(37 * number - 5000)) for number in range(seeds)]
    values = torch.stack([codes * scale for codes, scale in draws]).double()
    step = draws[0][1].double()
    off = (values.mean(0) - grad) / step
    assert float(off.abs().max()) < 5 * 0.5 / seeds**0.5
    assert abs(float(off.mean())) < 5 * 0.5 / (seeds * off.numel()) ** 0.5


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_stays_zero_exactly(bits: int) -> None:
    grad = torch.randn(3, 4, 6)
    grad[1], grad[:, 2], grad[0, 0, 0] = 0, 0, -0.0
    for number in range(20):
        codes, scale = quantized(grad, bits, 0, seed(number))
        assert not (codes * scale)[grad == 0].any()
    codes, scale = quantized(torch.zeros(2, 3, 4), bits, 1, seed(0))
    assert not codes.any() and bool((codes * scale == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_not_lost(value: float) -> None:
    grad = torch.randn(3, 4, 6)
    grad[1, 2, 3] = value
    for keep in (0, 1):
        codes, scale = quantized(grad, 4, keep, seed(0))
        assert not bool((codes * scale).isfinite().all())


def test_neighbours_and_seeds_are_rounded_independently() -> None:
    grad = torch.full((1, 1, 1 << 16), 0.5)
    grad[0, 0, 0] = 7.0  # sets the scale to 1 at 4 bits
    draws = [quantized(grad, 4, 0, seed(number))[0].view(-1)[1:] - 0.5 for number in (3, 4)]
    for a, b in ((draws[0][:-1], draws[0][1:]), (draws[0], draws[1])):
        assert abs(float((a * b).mean()) * 4) < 5 / (1 << 8)


def test_the_same_seed_gives_the_same_codes() -> None:
    grad = torch.randn(3, 4, 6)
    assert torch.equal(quantized(grad, 4, 0, seed(9))[0], quantized(grad, 4, 0, seed(9))[0])


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = new_seed(torch.device("cpu"))
    torch.manual_seed(5)
    again, other = new_seed(torch.device("cpu")), new_seed(torch.device("cpu"))
    assert (
        first.dtype == torch.int32 and first.shape == () and torch.equal(first, again) and not torch.equal(first, other)
    )
    seeds = [int(new_seed(torch.device("cpu"))) for _ in range(200)]
    assert len(set(seeds)) == 200 and min(seeds) < -(2**30) and max(seeds) > 2**30


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...]) -> None:
    codes, scale = quantized(torch.zeros(shape), 4, 1, seed(0))
    assert codes.shape == (codes * scale).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_float_types_are_widened(dtype: torch.dtype) -> None:
    codes, scale = quantized(torch.randn(2, 3, 4).to(dtype), 8, 0, seed(0))
    assert codes.dtype == scale.dtype == torch.float32
