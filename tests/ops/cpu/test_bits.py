"""Packing and unpacking by every kernel that this processor can run agree with the specification of the layout."""

import pytest
import torch

from bitorch_engine.bits import pack, unpack
from bitorch_engine.ops import cpu


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 200_003])
def test_pack_and_unpack_agree_with_the_reference(isa: str, bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    with cpu.cap_isa(isa):
        packed = torch.ops.bitorch_engine.pack(values, bits)
        assert torch.equal(packed, pack(values, bits))
        assert torch.equal(torch.ops.bitorch_engine.unpack(packed, bits, count), unpack(packed, bits, count))
