"""Linear layers whose weight is 1 to 8 bits: the parameter, the layer, and the original BITorch Engine's base class."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from bitorch_engine import ops
from bitorch_engine.layers.low_bit import LowBitLayer, check_floats, in_autocast_dtype
from bitorch_engine.layers.qlinear.function import WeightOnlyLinear
from bitorch_engine.layers.weight_access import WeightAccess
from bitorch_engine.parameters import PackedParameter

_GEOMETRY = ops.Convolution((), (), (), False, (), 1)
"""A linear layer is a convolution without spatial dimensions."""


class nBitLinearParameter(PackedParameter):
    """A parameter for n-bit linear layers: the codes are the weight, and ``update`` trains them in place."""


class nBitLinear(LowBitLayer, nn.Linear):
    """``torch.nn.Linear`` with a weight of 1 to 8 bits that is stored, and trained, packed.

    Takes torch.nn.Linear's arguments, then by keyword:

    w_bit: bits of the weight, 1 to 8.
    a_bit: bits of the input, quantized with a learned scale that the first batch sets; None: float. One NaN or Inf in
        the input makes all results of the batch NaN.
    g_bit: bits of the gradient on its way into the two backward products, 2 to 8; None: float.
    learn_scale: the weight's scale is trained too. Worth it where no normalization layer follows.

    The result has the dtype of the input, whatever that of the parameters, where torch.nn refuses one that differs.

    On a CPU, few rows of a float input meet weights of 1, 2 and 4 bits without becoming floats, in training too:
    as exactly as torch multiplies float32, or faster with 16 bits of each activation, off by 3e-5 of the result's size,
    where ``torch.set_float32_matmul_precision`` is "high" or "medium", or the input is bfloat16.
    """

    parameter_class: ClassVar[type[PackedParameter]] = nBitLinearParameter

    def forward(self, input: Tensor) -> Tensor:
        planned = self.planned(input)
        if planned is not None:
            return planned
        check_floats(input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"the input's last dimension must have in_features (={self.in_features}) elements, got "
                f"{tuple(input.shape)}."
            )
        if self.a_bit is None and self.g_bit is None:
            return self._multiply_float(in_autocast_dtype(input))
        if input.dim() == 2:
            return self.multiply(input, _GEOMETRY)
        rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        # Not self.forward, which a subclass may wrap.
        return nBitLinear.forward(self, rows).view(*input.shape[:-1], self.out_features)

    def _multiply_float(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if not isinstance(weight, PackedParameter) or torch.is_grad_enabled():
            return WeightOnlyLinear.apply(x, self.weight, self.bias)
        bias: Tensor | None = self.bias
        head, tail = (x, weight.packed, weight.channel_scale, weight.w_bit), self.in_features
        if self._has_plain_bias():
            self._remember(ops.plan("linear_weight_only", None, *head, bias, tail), x, weight.packed)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return ops.linear_weight_only(*head, bias, tail)


class nBitLinearBase(WeightAccess, nBitLinear):
    """``nBitLinear`` under the name and constructor of the original BITorch Engine: no bias, 4-bit activations."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        a_bit: int | None = 4,
        w_bit: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float,
    ) -> None:
        super().__init__(in_channels, out_channels, bias=False, device=device, dtype=dtype, w_bit=w_bit, a_bit=a_bit)
