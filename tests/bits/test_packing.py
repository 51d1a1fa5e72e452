"""Packing against its specification: one stream of bits, written here as one Python integer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitorch_engine.bits import pack, packed_size, unpack

WIDTHS = range(1, 9)


@st.composite
def values_of_a_width(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


def stream(values: list[int], bits: int) -> bytes:
    """The layout as its docstring states it, in big integers."""
    whole = sum(value << (i * bits) for i, value in enumerate(values))
    return whole.to_bytes((len(values) * bits + 7) // 8, "little")


@given(values_of_a_width())
def test_the_layout_is_one_bit_stream_least_significant_bit_first(case: tuple[list[int], int]) -> None:
    values, bits = case
    assert bytes(pack(torch.tensor(values, dtype=torch.uint8), bits).tolist()) == stream(values, bits)


@given(values_of_a_width())
def test_unpack_reads_the_stream(case: tuple[list[int], int]) -> None:
    values, bits = case
    packed = torch.tensor(list(stream(values, bits)), dtype=torch.uint8)
    assert unpack(packed, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_then_unpack_is_identity_at_every_length(bits: int) -> None:
    for count in [*range(40), 129, 1000]:
        values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        packed = pack(values, bits)
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        assert packed.numel() == packed_size(count, bits) == -(-count * bits // 8)
        assert torch.equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_stream_may_be_cut_at_any_multiple_of_eight_values(bits: int) -> None:
    values = torch.randint(0, 2**bits, (80,), dtype=torch.uint8)
    packed = pack(values, bits)
    for start in range(0, 80, 8):
        assert torch.equal(unpack(packed[start * bits // 8 :], bits, 80 - start), values[start:])
        assert torch.equal(pack(values[start:], bits), packed[start * bits // 8 :])


@pytest.mark.parametrize("bits", WIDTHS)
def test_unused_bits_of_the_last_byte_are_zero(bits: int) -> None:
    for count in range(1, 9):
        last = int(pack(torch.full((count,), 2**bits - 1, dtype=torch.uint8), bits)[-1])
        used = (count * bits - 1) % 8 + 1
        assert last == 2**used - 1


def test_values_are_read_in_row_major_order_whatever_their_strides() -> None:
    values = torch.randint(0, 8, (5, 7, 3), dtype=torch.uint8)
    permuted = values.permute(2, 0, 1)
    assert torch.equal(pack(permuted, 3), pack(permuted.contiguous().view(-1), 3))


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_comes_back_shares_no_memory_with_what_went_in(bits: int) -> None:
    values = torch.zeros(16, dtype=torch.uint8)
    packed = pack(values, bits)
    values.fill_(1)
    assert not packed.any()
    unpacked = unpack(packed, bits, 16)
    packed.fill_(255)
    assert not unpacked.any()


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_value_that_does_not_fit_is_refused(bits: int) -> None:
    for value in {2**bits, 255}:
        with pytest.raises(ValueError, match=rf"values of {bits} bits are 0 to {2**bits - 1}, got {value}"):
            pack(torch.tensor([0, value], dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_an_unknown_width_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        packed_size(3, bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"pack takes a uint8 tensor of indices, got {dtype}"):
        pack(torch.zeros(3, dtype=dtype), 4)
    with pytest.raises(TypeError, match=f"packed values must be a uint8 tensor, got {dtype}"):
        unpack(torch.zeros(3, dtype=dtype), 4, 6)


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_a_stream_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"5 values of 3 bits are packed in 2 bytes, got {length} bytes"):
        unpack(torch.zeros(length, dtype=torch.uint8), 3, 5)


def test_packing_works_on_the_meta_device() -> None:
    packed = pack(torch.zeros(9, dtype=torch.uint8, device="meta"), 3, check=False)
    assert packed.device.type == "meta" and packed.numel() == 4
    assert unpack(packed, 3, 9).shape == (9,)
