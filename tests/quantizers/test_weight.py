"""Scales against a search for the least squared error, levels against rounding written out."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.quantizers.weight import fit_scale, from_levels, kept_scale, normal_scale, to_levels

WIDTHS = range(1, 9)
CODES = {1: [-1, 1]} | {bits: list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in range(2, 9)}
DISTRIBUTIONS = {
    "normal": lambda: torch.randn(6, 400),
    "uniform": lambda: torch.rand(6, 400) * 2 - 1,
    "heavy tails": lambda: torch.randn(6, 400) ** 3,
    "positive only": lambda: torch.randn(6, 400).abs(),
    "three values": lambda: torch.randint(-1, 2, (6, 400)).float(),
}


def squared_error(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Of the nearest codes, one value a row."""
    codes = torch.tensor(CODES[bits], dtype=torch.float64)
    ratio = rows.double() / scale.double()[:, None]
    index = torch.bucketize(ratio, (codes[1:] + codes[:-1]) / 2)
    return ((codes[index] - ratio) * scale.double()[:, None]).square().mean(1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows_of", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_the_scale_has_nearly_the_least_squared_error(rows_of: object, bits: int) -> None:
    rows = rows_of()  # type: ignore[operator]
    scale = fit_scale(rows, bit_format(bits))
    assert scale.shape == (6,) and scale.dtype == torch.float32 and bool((scale > 0).all())
    spread = rows.abs().amax(1)
    candidates = [spread * f / 2 ** max(1, bits - 1) for f in torch.logspace(-2, 0.31, 160).tolist()]
    best = torch.stack([squared_error(rows, candidate, bits) for candidate in candidates]).amin(0)
    error = squared_error(rows, scale, bits)
    # Lloyd's iteration ends in a local minimum
    assert bool((error <= best * 2 + 1e-6 * rows.square().mean(1).double()).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_scale_for_a_normal_distribution_is_the_best_one(bits: int) -> None:
    rows = torch.randn(1, 200_000)
    scale = torch.tensor([normal_scale(bit_format(bits))])
    error = squared_error(rows, scale, bits)
    for factor in (0.9, 1.1):
        assert float(error) <= 1.01 * float(squared_error(rows, scale * factor, bits))


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1.0, 1e6], ids=lambda factor: f"x{factor:g}")
def test_the_scale_follows_the_weights(factor: float) -> None:
    rows = torch.randn(4, 100)
    for bits in WIDTHS:
        form = bit_format(bits)
        assert torch.allclose(fit_scale(rows * factor, form), fit_scale(rows, form) * factor, rtol=1e-4)


def test_rows_have_scales_of_their_own() -> None:
    rows = torch.randn(3, 300) * torch.tensor([1e-3, 1.0, 50.0])[:, None]
    form = bit_format(4)
    assert torch.equal(fit_scale(rows, form), torch.cat([fit_scale(row[None], form) for row in rows]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_keeps_a_scale_that_leaves_half_of_the_bits_whatever_the_size_of_others(bits: int) -> None:
    factors = torch.tensor([1e-4, 0.01, 0.1, 0.2, 0.5, 0.8, 1.0, 1.2, 2.0, 5.0, 10.0, 100.0, 1e4])
    rows, form = torch.randn(len(factors), 4000) * torch.logspace(-6, 6, len(factors))[:, None], bit_format(bits)
    best, scale = fit_scale(rows, form), fit_scale(rows, form) * factors
    lost, least = (squared_error(rows, s, bits) for s in (scale, best))
    holds = (lost <= 0.5**bits * rows.double().square().mean(1)) | (lost <= 1.25 * least)
    assert bool(holds[(factors >= 0.8) & (factors <= 1.2)].all()) and not bool(holds[factors != 1].all())
    assert torch.equal(kept_scale(rows, scale, form), torch.where(holds, scale, best))
    assert torch.equal(kept_scale(rows, torch.where(holds, -scale, scale), form), torch.where(holds, -scale, best))
    assert torch.equal(kept_scale(torch.zeros(6, 40), torch.ones(6), form), torch.ones(6)) == (bits > 1)
    assert torch.equal(kept_scale(rows * torch.nan, scale, form), scale)


def test_a_row_that_no_scale_suits_better_keeps_its_own() -> None:
    row, scale = torch.eye(1, 16), torch.tensor([0.1])  # a single weight, at 1 bit: 0.0625 is best, and leaves 0.94
    assert torch.equal(kept_scale(row, scale, bit_format(1)), scale)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_of_zeros_takes_the_mean_of_the_others(bits: int) -> None:
    rows = torch.randn(4, 50)
    rows[2] = 0
    scale = fit_scale(rows, bit_format(bits))
    share = 1 / 64 if bits == 1 else 1  # whose codes have no zero
    assert float(scale[2]) == pytest.approx(float(scale[[0, 1, 3]].mean()) * share)


@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_alone_take_the_scale_of_a_new_layer(bits: int) -> None:
    scale = fit_scale(torch.zeros(3, 48), bit_format(bits))
    share = 1 / 64 if bits == 1 else 1
    assert scale.tolist() == pytest.approx([normal_scale(bit_format(bits)) / 12 * share] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_float_types_are_taken(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 100).to(dtype)
    form = bit_format(3)
    assert torch.equal(fit_scale(rows, form), fit_scale(rows.float(), form))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_top_bits_of_a_level_are_the_nearest_code(bits: int) -> None:
    form, codes = bit_format(bits), torch.tensor(CODES[bits])
    scale = torch.tensor([0.37, 1.0])
    rows = torch.linspace(-1.7, 1.7, 1001).expand(2, -1) * scale[:, None] * 2 ** (bits - 1)
    levels = to_levels(rows, scale, form)
    assert levels.dtype == torch.uint8
    chosen = codes[(levels >> form.hidden_bits).long()]
    ratio = rows.double() / scale.double()[:, None]
    distance = (ratio[..., None] - codes).abs()
    assert torch.allclose((chosen - ratio).abs(), distance.amin(-1), atol=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_256_levels_come_back(bits: int) -> None:
    form, scale = bit_format(bits), torch.tensor([0.01, 3.0])
    levels = torch.arange(256).to(torch.uint8).expand(2, -1)
    values = from_levels(levels, scale, form)
    assert torch.equal(to_levels(values, scale, form), levels)
    # they are evenly spaced, and the middle of a code's levels is the code
    step = scale * form.step / 2**form.hidden_bits
    assert torch.allclose(values.diff(dim=1), step[:, None].expand(-1, 255), rtol=1e-4)
    by_code = values.view(2, 2**bits, -1).mean(2)
    assert torch.allclose(by_code, torch.tensor(CODES[bits]) * scale[:, None], rtol=1e-4, atol=1e-6)
