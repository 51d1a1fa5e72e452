"""Every op: its schema, its reference, its shape function. ``ops/cpu`` and ``ops/triton`` register over them."""

from bitorch_engine.ops.library import define
from bitorch_engine.ops.reference import bits

pack = define("pack(Tensor values, int bits) -> Tensor", bits.pack, bits.pack_fake)
unpack = define("unpack(Tensor packed, int bits, int count) -> Tensor", bits.unpack, bits.unpack_fake)
