"""What layers of 1-bit weights and 1-bit activations have in common: both are -1 or +1, times a scale."""

from typing import Any

from torch import Tensor

from bitorch_engine.layers.low_bit import LowBitLayer


class BinaryLayer(LowBitLayer):
    """A low-bit layer with one bit for each weight and one for each element of the input.

    The weight has a scale an output channel. The input's scale is learned, and the first batch sets it to the mean
    size; backward is straight through where the input is within +- scale, and zero beyond. 0 counts as +1, but padding
    is zero.
    """

    def __init__(self, *args: Any, g_bit: int | None = None, learn_scale: bool = False, **kwargs: Any) -> None:
        for name in ("w_bit", "a_bit"):
            if kwargs.pop(name, 1) != 1:
                raise ValueError(f"{name} of {type(self).__name__} is 1; for other bits take an nBit layer.")
        super().__init__(*args, w_bit=1, a_bit=1, g_bit=g_bit, learn_scale=learn_scale, **kwargs)

    def quantize_(
        self,
        w_bit: int = 1,
        a_bit: int | None = 1,
        g_bit: int | None = None,
        *,
        scale: Tensor | float | None = None,
        learn_scale: bool = False,
    ) -> None:
        """Turn the float weight into signs with a scale, and set up activation and gradient quantization."""
        if (w_bit, a_bit) != (1, 1):
            name = type(self).__name__
            raise ValueError(
                f"{name} has one bit for weights and input, got w_bit={w_bit}, a_bit={a_bit}; for these make the nBit "
                f"layer of the same arguments and call its weight.quantize_(layer.weight.dequantize()). "
                f"layer.activation = None lets {name} take a float input."
            )
        super().quantize_(w_bit, a_bit, g_bit, scale=scale, learn_scale=learn_scale)
