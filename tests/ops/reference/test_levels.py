"""Levels are moved by exactly what was asked, on average, wherever the move is in the weight."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.bits import bit_format, pack, unpack
from bitorch_engine.ops import add_, dither_levels, level_rate, load_levels, store_levels_
from bitorch_engine.ops.reference.levels import move_levels_, step_noise

WIDTHS = range(1, 9)


def move_(packed: Tensor, residual: Tensor, bits: int, *, start: int, move: Tensor, key: int) -> None:
    noise = step_noise(key, start, move.numel(), move.device)
    move_levels_(packed, residual, bits, start=start, move=move, noise=noise)


def planes(levels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Both planes of levels, by their definition: the byte cut in two."""
    hidden = 8 - bits
    low = levels & (2**hidden - 1)
    return pack(levels >> hidden, bits), pack(low, hidden) if hidden else low.new_empty(0)


def levels_of(packed: Tensor, residual: Tensor, bits: int, count: int) -> Tensor:
    hidden = 8 - bits
    index = unpack(packed, bits, count)
    return (index << hidden) | unpack(residual, hidden, count) if hidden else index


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_read_and_written_at_any_multiple_of_eight(bits: int) -> None:
    form = bit_format(bits)
    levels = torch.randint(0, 256, (83,), dtype=torch.uint8)
    packed, residual = planes(levels, bits)
    for start in (0, 8, 40, 80):
        assert torch.equal(load_levels(packed, residual, form, start, 83 - start), levels[start:])
    part = torch.randint(0, 256, (16,), dtype=torch.uint8)
    store_levels_(packed, residual, form, 24, part)
    levels[24:40] = part
    assert torch.equal(levels_of(packed, residual, bits, 83), levels)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("move", [-3.0, -1.0, 0.0, 2.0, 300.0, -1e9, 1e9], ids=lambda move: f"move={move:g}")
def test_a_whole_move_is_exact_and_clamped(bits: int, move: float) -> None:
    levels = torch.arange(256).to(torch.uint8)
    packed, residual = planes(levels, bits)
    move_(packed, residual, bits, start=0, move=torch.full((256,), move), key=1)
    expected = (torch.arange(256) + move).clamp(0, 255).to(torch.uint8)
    assert torch.equal(levels_of(packed, residual, bits, 256), expected)


@pytest.mark.parametrize("move", [2e-4, -2e-4, 0.3, -0.3, 1.75, -2.5], ids=lambda move: f"move={move:g}")
def test_a_fraction_of_a_level_is_moved_on_average(move: float) -> None:
    count, steps = 1 << 20, 4
    levels = torch.full((count,), 128, dtype=torch.uint8)
    packed, residual = planes(levels, 3)
    for key in range(steps):
        move_(packed, residual, 3, start=0, move=torch.full((count,), move), key=key)
    moved = levels_of(packed, residual, 3, count).double() - 128
    part = abs(move) % 1
    error = (part * (1 - part) / count / steps) ** 0.5
    assert abs(float(moved.mean()) / steps - move) < 4 * error
    assert float(moved.sub(steps * move).abs().max()) <= steps


def test_the_rounding_of_an_element_does_not_depend_on_the_slicing() -> None:
    move = torch.randn(800)
    whole, parts = planes(torch.full((800,), 100, dtype=torch.uint8), 4), planes(torch.full((800,), 100).byte(), 4)
    move_(*whole, 4, start=0, move=move, key=9)
    for start, stop in ((0, 8), (8, 256), (256, 800)):
        move_(*parts, 4, start=start, move=move[start:stop], key=9)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_code_is_worth_two_to_the_hidden_bits_levels(bits: int) -> None:
    code_step = 2 if bits == 1 else 1  # -1 and +1 are two apart
    scale = torch.tensor([0.5, 0.1])
    assert torch.allclose(level_rate(scale, bits), 2 ** (8 - bits) / (code_step * scale), rtol=1e-6)


def test_add_moves_each_row_in_units_of_its_own_scale() -> None:
    bits, scale = 4, torch.tensor([1.0, 0.25])
    packed, residual = planes(torch.full((2 * 24,), 64, dtype=torch.uint8), bits)
    delta = torch.full((2, 24), 0.5)
    add_(packed, residual, scale, delta, bits=bits, key=0)
    moved = levels_of(packed, residual, bits, 48).view(2, 24).int() - 64
    assert (moved[0] == 8).all() and (moved[1] == 32).all()  # 16 levels a code


@pytest.mark.parametrize("bits", WIDTHS)
def test_dithered_levels_keep_the_code_and_depend_on_the_element_alone(bits: int) -> None:
    form = bit_format(bits)
    index = torch.randint(0, 2**bits, (4096,), dtype=torch.uint8)
    levels = dither_levels(index, form, 0)
    assert torch.equal(levels >> form.hidden_bits, index)
    assert torch.equal(dither_levels(index[512:1024], form, 512), levels[512:1024])


@pytest.mark.parametrize("bits", range(2, 8))
def test_dithered_residuals_are_uniform(bits: int) -> None:
    form = bit_format(bits)
    low = dither_levels(torch.zeros(1 << 16, dtype=torch.uint8), form, 0).long()
    counts = torch.bincount(low, minlength=2**form.hidden_bits).double()
    expected = (1 << 16) / 2**form.hidden_bits
    assert float((counts - expected).abs().max()) < 6 * expected**0.5


def test_at_one_bit_dithered_residuals_lean_towards_the_other_code_and_are_symmetric() -> None:
    form = bit_format(1)
    index = torch.tensor([0, 1], dtype=torch.uint8).repeat_interleave(1 << 15)
    below, above = dither_levels(index, form, 0).double().view(2, -1)
    # weights of a normal distribution are denser near zero, which lies between level 127 and 128
    assert float(below.mean()) > 64 + 10 and float(above.mean()) < 192 - 10
    assert abs(float(below.mean() + above.mean()) - 255) < 1.5


def test_the_noise_of_an_element_does_not_depend_on_where_one_starts() -> None:
    whole = step_noise(5, 0, 1000, torch.device("cpu"))
    for start, stop in ((0, 8), (8, 64), (64, 136), (120, 1000), (999, 1000)):
        assert torch.equal(step_noise(5, start, stop - start, torch.device("cpu")), whole[start:stop])
    assert whole.unique().numel() > 990


@pytest.mark.parametrize(("first", "second"), [(23, 23), (19, 19), (-19, -19), (-19, 23), (23, -19)])
def test_elements_that_share_a_hash_have_noise_that_does_not_correlate(first: int, second: int) -> None:
    """Widths of noise, upper bits, or lower ones where negative."""
    noise = step_noise(3, 0, 1 << 20, torch.device("cpu")).view(-1, 2, 64)

    def uniform(bits: Tensor, width: int) -> Tensor:
        shift = 32 - abs(width)
        part = (bits >> shift if width > 0 else bits) & ((1 << abs(width)) - 1)
        return part.double().view(-1) / 2 ** abs(width)

    a, b = uniform(noise[:, 0], first), uniform(noise[:, 1], second)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / a.numel() ** 0.5
    counts = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256).double()
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(statistic - 255) < 5 * 510**0.5
