"""What a code of 1 to 8 bits is: which integers it can hold."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class BitFormat:
    """The integers of one width. A code is ``low + step * index``; what is packed is the index, 0 .. 2**bits - 1.

    A stored weight is worth ``code * scale``, so one step of the index is worth ``step * scale``.
    """

    bits: int
    low: int
    high: int
    step: int = 1

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def hidden_bits(self) -> int:
        """Bits of the training residual below the code: code and residual together fill one byte."""
        return 8 - self.bits

    def codes(self, index: Tensor) -> Tensor:
        """int8 codes of a uint8 index, any shape."""
        # uint8 arithmetic wraps modulo 256, and reading the byte as int8 undoes the wrap.
        return (index * self.step + self.low % 256).view(torch.int8)

    def index(self, codes: Tensor) -> Tensor:
        """uint8 index of integer codes, any shape. Raises ValueError where a code is not one of this format's."""
        wide = codes.to(torch.int64)
        valid = (wide >= self.low) & (wide <= self.high) & ((wide - self.low) % self.step == 0)
        if has_values(codes) and not bool(valid.all()):
            wrong = wide[~valid][0].item()
            raise ValueError(f"codes of {self.bits} bits are {self._range()}, got {wrong}; choose a wider w_bit.")
        return (wide - self.low).div(self.step, rounding_mode="floor").to(torch.uint8)

    def _range(self) -> str:
        return "-1 or +1" if self.bits == 1 else f"{self.low} to {self.high}"


def has_values(x: Tensor) -> bool:
    """Whether a tensor can be looked at: it is neither on the meta device nor made under a FakeTensorMode."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def bit_format(bits: int) -> BitFormat:
    """The format of signed codes of that many bits: two's complement range for 2 to 8 bits, -1 and +1 for 1 bit.

    Raises ValueError for any other width, TypeError where ``bits`` is not an int.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits must be an int from 1 to 8, got {bits!r} of type {type(bits).__name__}.")
    if bits not in _FORMATS:
        raise ValueError(f"bits must be 1 to 8, got {bits}.")
    return _FORMATS[bits]


_FORMATS = {1: BitFormat(1, -1, 1, step=2)}
_FORMATS |= {bits: BitFormat(bits, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in range(2, 9)}
