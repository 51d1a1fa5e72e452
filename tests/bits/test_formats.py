"""The integers of each width, counted out by hand."""

import pytest
import torch

from bitorch_engine.bits import bit_format

CODES = {1: [-1, 1]} | {bits: list(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in range(2, 9)}


@pytest.mark.parametrize("bits", CODES)
def test_every_index_stands_for_its_code_and_back(bits: int) -> None:
    form = bit_format(bits)
    index = torch.arange(2**bits, dtype=torch.int16).to(torch.uint8)
    codes = form.codes(index)
    assert codes.dtype == torch.int8 and codes.tolist() == CODES[bits]
    for dtype in (torch.int8, torch.int16, torch.int64):
        back = form.index(codes.to(dtype))
        assert back.dtype == torch.uint8 and torch.equal(back, index)


@pytest.mark.parametrize("bits", CODES)
def test_the_fields_say_what_the_codes_are(bits: int) -> None:
    form = bit_format(bits)
    assert (form.bits, form.low, form.high, form.levels) == (bits, CODES[bits][0], CODES[bits][-1], len(CODES[bits]))
    assert form.step == CODES[bits][1] - CODES[bits][0]
    assert form.bits + form.hidden_bits == 8
    assert (0 in CODES[bits]) == (bits > 1)


@pytest.mark.parametrize("bits", CODES)
def test_every_integer_that_is_not_a_code_is_refused(bits: int) -> None:
    for wrong in set(range(-300, 300)) - set(CODES[bits]):
        with pytest.raises(ValueError, match=rf"codes of {bits} bits? are .*, got {wrong}; choose a wider w_bit"):
            bit_format(bits).index(torch.tensor([CODES[bits][0], wrong]))


def test_the_shape_of_an_index_is_kept() -> None:
    index = torch.zeros(2, 0, 3, dtype=torch.uint8)
    assert bit_format(3).codes(index).shape == (2, 0, 3)
    assert bit_format(3).index(index.to(torch.int8)).shape == (2, 0, 3)


@pytest.mark.parametrize("bits", [0, 9, 16, -4])
def test_other_widths_do_not_exist(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        bit_format(bits)


@pytest.mark.parametrize("bits", [4.0, "4", None, True, torch.tensor(4)], ids=str)
def test_a_width_is_an_int(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be an int from 1 to 8, got"):
        bit_format(bits)  # type: ignore[arg-type]
