"""What a code is: the integers of each width, and how they are packed into bytes."""

from bitorch_engine.bits.formats import BitFormat, bit_format, has_values
from bitorch_engine.bits.packing import check_packed, pack, packed_size, unpack

__all__ = ["BitFormat", "bit_format", "check_packed", "has_values", "pack", "packed_size", "unpack"]
