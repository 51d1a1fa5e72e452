"""The noise is what independent uniform bits would be, and depends on nothing but key and element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitorch_engine.ops import noise_bits, noise_key, uniform24

CPU = torch.device("cpu")
COUNT = 1 << 18


def uniform(key: int, start: int = 0, count: int = COUNT) -> torch.Tensor:
    return uniform24(noise_bits(key, start, count, CPU)).double()


def mix(x: int) -> int:
    """lowbias32 in Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def chi_square_z(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic of equally likely cells lies off its mean."""
    expected = counts.double().mean()
    cells = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - cells) / math.sqrt(2 * cells))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 8))
def test_noise_is_the_named_hash_of_element_and_key(key: int, start: int) -> None:
    expected = [mix((start + i) ^ key) for i in range(8)]
    assert [bits % 2**32 for bits in noise_bits(key, start, 8, CPU).tolist()] == expected


def test_a_key_may_be_a_tensor() -> None:
    key = -123456789
    assert torch.equal(
        noise_bits(torch.tensor(key, dtype=torch.int32), 5, 99, CPU), noise_bits(key % 2**32, 5, 99, CPU)
    )


@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF, noise_key(7, 7)])
def test_every_byte_of_the_noise_is_uniform(key: int) -> None:
    bits = noise_bits(key, 0, COUNT, CPU)
    for byte in bits.view(torch.uint8).view(-1, 4).unbind(1):
        assert abs(chi_square_z(torch.bincount(byte.long(), minlength=256))) < 5


def test_uniform24_is_in_0_to_1_in_steps_of_two_to_the_minus_24() -> None:
    assert float(uniform24(torch.tensor([-1], dtype=torch.int32))) == 1 - 2**-24
    assert float(uniform24(torch.tensor([255], dtype=torch.int32))) == 0
    assert float(uniform24(torch.tensor([256], dtype=torch.int32))) == 2**-24
    u = uniform(3)
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / COUNT) ** 0.5
    assert abs(float(u.square().mean()) - 1 / 3) < 5 * (4 / 45 / COUNT) ** 0.5


@pytest.mark.parametrize("probability", [2e-4, 1e-3, 0.5])
def test_rare_events_have_their_probability(probability: float) -> None:
    count = 1 << 22
    hits = sum(float((uniform(noise_key(seed), 0, count) < probability).sum()) for seed in range(2))
    assert abs(hits - 2 * count * probability) < 4 * (2 * count * probability) ** 0.5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((noise_key(1, 5), 0), (noise_key(1, 5), 1)),
        ((noise_key(1, 5), 0), (noise_key(1, 5), 8)),
        ((noise_key(1, 5), 0), (noise_key(1, 5), 1024)),
        ((noise_key(1, 5), 0), (noise_key(1, 6), 0)),
        ((noise_key(1, 5), 0), (noise_key(2, 5), 0)),
        ((noise_key(1, 5), 0), (noise_key(5, 1), 0)),
        ((noise_key(1, 5, 1), 0), (noise_key(1, 5, 2), 0)),
        ((noise_key(noise_key(1, 5), 1), 0), (noise_key(noise_key(1, 5), 2), 0)),
        ((noise_key(1, 5), 0), (noise_key(1, 5), 1 << 32)),
        ((noise_key(1, 5), 1 << 32), (noise_key(1, 5), 2 << 32)),
    ],
    ids=[
        "neighbours",
        "one byte on",
        "one row on",
        "the next step",
        "the next seed",
        "seed and step exchanged",
        "another stream",
        "another nested stream",
        "2**32 elements on",
        "2**33 elements on",
    ],
)
def test_noise_does_not_correlate_with_that_of(first: tuple[int, int], second: tuple[int, int]) -> None:
    a, b = uniform(*first) - 0.5, uniform(*second) - 0.5
    for left, right in ((a, b), (a.sign(), b.sign()), (a.abs() - 0.25, b.abs() - 0.25)):
        correlation = float((left * right).mean() / (left.square().mean() * right.square().mean()).sqrt())
        assert abs(correlation) < 5 / COUNT**0.5
    cells = ((a + 0.5) * 16).long() * 16 + ((b + 0.5) * 16).long()
    assert abs(chi_square_z(torch.bincount(cells, minlength=256))) < 5


def test_the_halves_of_one_draw_do_not_correlate() -> None:
    bits = noise_bits(11, 0, COUNT, CPU).view(torch.int16).view(-1, 2).double()
    low, high = (bits % 2**16).unbind(1)
    correlation = float(torch.corrcoef(torch.stack([low, high]))[0, 1])
    assert abs(correlation) < 5 / COUNT**0.5


@pytest.mark.parametrize("start", [0, 1000, 2**31 - 300, 2**32 - 300, 2**32, 5 * 2**32 - 300, 2**40])
def test_noise_is_the_same_however_it_is_sliced(start: int) -> None:
    whole = noise_bits(42, start, 600, CPU)
    for cut in (1, 8, 299, 300, 301, 599):
        parts = [noise_bits(42, start, cut, CPU), noise_bits(42, start + cut, 600 - cut, CPU)]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() > 590


def test_no_noise_for_no_elements() -> None:
    assert noise_bits(1, 0, 0, CPU).shape == (0,)


def test_keys_differ_wherever_any_part_does() -> None:
    parts = [(a, b) for a in range(60) for b in range(60)]
    parts += [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    parts += [(1 << 32,), (1 << 33,), (1,), (2,), (2**40 + 1, 0), (0, 2**40 + 1), (2**63,), (0,), ()]
    keys = {noise_key(*each) for each in parts}
    assert len(keys) == len(parts)
    assert all(0 <= key < 2**32 for key in keys)
