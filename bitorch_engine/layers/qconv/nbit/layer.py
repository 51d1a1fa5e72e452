"""Convolutions whose weight is 1 to 8 bits: the parameter, the six layers, the original BITorch Engine's base class."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_engine import ops
from bitorch_engine.layers.low_bit import LowBitLayer, check_floats
from bitorch_engine.layers.weight_access import WeightAccess
from bitorch_engine.parameters import PackedParameter


class nBitConvParameter(PackedParameter):
    """A parameter for n-bit convolution layers: the codes are the weight, and ``update`` trains them in place."""


class nBitConv(LowBitLayer, nn.modules.conv._ConvNd):
    """What the six layers share; it stands before their torch.nn class."""

    parameter_class: ClassVar[type[PackedParameter]] = nBitConvParameter

    def _convolve(
        self, x: Tensor, padding: tuple[int, ...], pad: tuple[int, ...] = (), output_padding: tuple[int, ...] = ()
    ) -> Tensor:
        """Quantize, convolve, add the bias. padding: zeros on both sides; pad: where the sides differ, as F.pad's."""
        spatial, shape = len(self.kernel_size), x.shape
        if not 1 <= len(shape) - spatial <= 2:
            raise ValueError(
                f"the input must have {spatial + 1} (unbatched) or {spatial + 2} dimensions, got {tuple(x.shape)}."
            )
        if shape[-spatial - 1] != self.in_channels:
            raise ValueError(f"the input must have in_channels (={self.in_channels}) channels, got {tuple(x.shape)}.")
        geometry = self._geometry(padding, pad, output_padding)
        if len(shape) == spatial + 2:
            return self.multiply(x, geometry)
        return self.multiply(x.unsqueeze(0), geometry).squeeze(0)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) for torch's own operator, in the input's dtype. Autograd saves the weight as it is, packed.
        Where it saves none, the weight is floats: a tensor subclass takes 0.15 ms through torch's dispatcher."""
        check_floats(x)
        weight, bias = self.weight.to(x.dtype), self.bias
        if isinstance(weight, PackedParameter) and not torch.is_grad_enabled():
            # Circular padding makes a new input, in the order of the shape.
            weight = weight.dequantize(channels_last=self.padding_mode != "circular" and ops.is_channels_last(x))
        return weight, None if bias is None else bias.to(x.dtype)

    def _geometry(
        self, padding: tuple[int, ...], pad: tuple[int, ...] = (), output_padding: tuple[int, ...] = ()
    ) -> ops.Convolution:
        zeros = (0,) * len(self.kernel_size)
        return ops.Convolution(
            self.stride, padding, self.dilation, self.transposed, output_padding or zeros, self.groups, pad
        )

    def _as_planned(self, input: Tensor, output_padding: tuple[int, ...] = ()) -> Tensor | None:
        """The result where a backend has a plan; else None."""
        result = self.planned(input, output_padding)
        weight = self._parameters.get("weight")
        if result is None and isinstance(weight, PackedParameter) and self._has_plain_bias():
            bias = self._parameters["bias"]
            arguments = (weight.packed, weight.channel_scale)
            geometry = self._geometry(*self._padding_and_pad(), output_padding)
            plan = ops.plan("conv_weight_only", None, input, *arguments, weight.w_bit, bias, weight.shape, *geometry)
            self._remember(plan, input, weight.packed, output_padding)
            if plan is not None:
                result = plan(input, None, *arguments, bias)
        return result

    def _padding_and_pad(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Zeros on both sides, and those of ``F.pad`` where the sides differ."""
        if not isinstance(self.padding, str):  # where the padding is set anew, torch's convolutions take that
            given: tuple[int, ...] | int = self.padding
            return (given,) * len(self.kernel_size) if isinstance(given, int) else tuple(given), ()
        padding = self._reversed_padding_repeated_twice  # (left, right) of the last dimension first
        left = padding[-2::-2]
        return (tuple(left), ()) if left == padding[::-2] else ((0,) * len(left), tuple(padding))


class _Forward(nBitConv):
    """Forward of the three convolutions that are not transposed."""

    def forward(self, input: Tensor) -> Tensor:
        if self.a_bit is not None and self.padding_mode == "zeros":
            planned = self.planned(input, self.output_padding)
            if planned is not None:
                return planned
        if self.a_bit is None and self.g_bit is None:
            return self._convolve_floats(input)
        check_floats(input)
        if input.dim() == len(self.kernel_size) + 1:
            return _Forward.forward(self, input.unsqueeze(0)).squeeze(0)
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            planned = self.planned(padded, self.output_padding)
            return self._convolve(padded, (0,) * len(self.kernel_size)) if planned is None else planned
        return self._convolve(input, *self._padding_and_pad())

    def _convolve_floats(self, input: Tensor) -> Tensor:
        """By torch's own operator, or as planned."""
        planned = not torch.is_grad_enabled() and self.padding_mode == "zeros"
        result = self._as_planned(input) if planned else None
        return self._conv_forward(input, *self._operands(input)) if result is None else result


class _ForwardTransposed(nBitConv):
    """Forward of the three transposed convolutions."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        spatial, (padding, _) = len(self.kernel_size), self._padding_and_pad()
        output_padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        if self.a_bit is None and self.g_bit is None:
            result = None if torch.is_grad_enabled() else self._as_planned(input, tuple(output_padding))
            if result is not None:
                return result
            convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
            weight, bias = self._operands(input)
            return convolve(input, weight, bias, self.stride, padding, output_padding, self.groups, self.dilation)
        planned = self.planned(input, tuple(output_padding))
        if planned is not None:
            return planned
        check_floats(input)
        return self._convolve(input, padding, output_padding=tuple(output_padding))


class nBitConv1d(_Forward, nn.Conv1d):
    """``torch.nn.Conv1d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConv2d(_Forward, nn.Conv2d):
    """``torch.nn.Conv2d`` with a weight of 1 to 8 bits that is stored, and trained, packed.

    Takes torch.nn.Conv2d's arguments, then by keyword:

    w_bit: bits of the weight, 1 to 8.
    a_bit: bits of the input, quantized with a learned scale that the first batch sets; None: float. One NaN or Inf in
        the input makes all results of the batch NaN.
    g_bit: bits of the gradient on its way into the two backward convolutions, 2 to 8; None: float.
    learn_scale: the weight's scale is trained too. Worth it where no normalization layer follows.

    The result has the dtype of the input, whatever that of the parameters, where torch.nn refuses one that differs.
    """


class nBitConv3d(_Forward, nn.Conv3d):
    """``torch.nn.Conv3d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose1d(_ForwardTransposed, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose2d(_ForwardTransposed, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose3d(_ForwardTransposed, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConv2dBase(WeightAccess, nBitConv2d):
    """``nBitConv2d`` under the name and constructor of the original BITorch Engine: no bias or groups, 4-bit input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        a_bit: int | None = 4,
        w_bit: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=False,
            device=device,
            dtype=dtype,
            w_bit=w_bit,
            a_bit=a_bit,
        )
