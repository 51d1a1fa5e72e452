"""Packing, unpacking and dequantizing by the GPU's kernels agree with the specification of the layout."""

import pytest
import torch
from torch import Tensor

from bitorch_engine.bits import bit_format, pack, packed_size
from bitorch_engine.ops.triton import bits as kernels


def bytes_of(values: list[int], bits: int) -> list[int]:
    """The packed bytes of Python integers: one big integer, least significant value first."""
    stream = sum(value << (bits * place) for place, value in enumerate(values))
    return list(stream.to_bytes(packed_size(len(values), bits), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 65, 2051])
def test_pack_and_unpack_follow_the_layout(bits: int, count: int, device: torch.device) -> None:
    values = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)
    packed = kernels.pack(values.to(device), bits)
    assert packed.tolist() == bytes_of(values.tolist(), bits)
    assert torch.equal(kernels.unpack(packed, bits, count).cpu(), values)


@pytest.mark.parametrize("bits", [3, 4])
def test_values_with_gaps_between_them_are_packed_in_their_order(bits: int, device: torch.device) -> None:
    values = torch.randint(0, 1 << bits, (6, 10), dtype=torch.uint8).to(device)
    assert kernels.pack(values.T, bits).tolist() == bytes_of(values.T.flatten().tolist(), bits)
    packed = kernels.pack(values, bits)
    spread = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(kernels.unpack(spread, bits, 60).view(6, 10), values)


def test_a_stream_of_the_wrong_length_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="9 values of 3 bits are packed in 4 bytes, got 3 bytes"):
        kernels.unpack(torch.zeros(3, dtype=torch.uint8, device=device), 3, 9)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 300), (300, 5), (0, 4), (4, 0)])
def test_dequantize_gives_code_times_scale(bits: int, rows: int, columns: int, device: torch.device) -> None:
    form = bit_format(bits)
    index = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows)
    codes = form.low + form.step * index.to(torch.float64)
    exact: Tensor = codes * scale.to(torch.float64)[:, None]  # a product of 8 by 24 bits
    packed = pack(index, bits).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = kernels.dequantize(packed, scale.to(device), bits, columns, dtype)
        wanted = exact.to(torch.float32).to(dtype)
        assert torch.equal(found.cpu(), wanted)
        if columns % 3 == 0 < columns:
            found = kernels.dequantize(packed, scale.to(device), bits, columns, dtype, 3)
            assert torch.equal(found.cpu(), wanted.view(rows, -1, 3).movedim(1, 2).flatten(1))
