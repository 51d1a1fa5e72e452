"""Convolutions whose weight is 1 to 8 bits: the parameter, the six layers, and the base class of bitorch-engine."""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_engine import ops
from bitorch_engine.bits import bit_format
from bitorch_engine.layers.qconv.function import QuantizedConvolution
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.quantizers.activation import ActivationQuantizer
from bitorch_engine.quantizers.weight import normal_scale


class nBitConvParameter(PackedParameter):
    """A parameter for n-bit convolution layers: the codes are the weight, and ``update`` trains them in place."""


class nBitConv(nn.modules.conv._ConvNd):
    """What the six layers share; it stands before their torch.nn class, whose geometry and checks they keep.

    w_bit: bits of the weight, 1 to 8.
    a_bit: bits of the input, quantized with a learned scale; None: float.
    g_bit: bits of the gradient on its way into the two backward convolutions, 2 to 8; None: float.
    learn_scale: the weight's scale is trained too. Worth it where no normalization layer follows.
    """

    weight: Tensor
    activation: ActivationQuantizer | None

    def __init__(
        self,
        *args: Any,
        w_bit: int = 4,
        a_bit: int | None = None,
        g_bit: int | None = None,
        learn_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        check_bits(w_bit, a_bit, g_bit)
        super().__init__(*args, **kwargs)
        weight = self.weight
        self.quantize_(w_bit, a_bit, g_bit, scale=_initial_scale(weight, w_bit), learn_scale=learn_scale)

    def __init_subclass__(cls) -> None:
        """Show torch.nn's arguments and ours in help() and in editors."""
        if "__init__" in cls.__dict__:
            own = list(inspect.signature(cls.__init__).parameters.values())
            cls.__signature__ = inspect.Signature(own[1:])  # type: ignore[attr-defined]
            return
        for base in cls.__mro__:
            if "__init__" in base.__dict__ and not issubclass(base, nBitConv):
                theirs = list(inspect.signature(base).parameters.values())
                ours = list(inspect.signature(nBitConv.__init__).parameters.values())
                keywords = [p for p in ours if p.kind is inspect.Parameter.KEYWORD_ONLY]
                cls.__signature__ = inspect.Signature([*theirs, *keywords])  # type: ignore[attr-defined]
                return

    def quantize_(
        self,
        w_bit: int,
        a_bit: int | None = None,
        g_bit: int | None = None,
        *,
        scale: Tensor | float | None = None,
        learn_scale: bool = False,
    ) -> None:
        """Turn the float weight into codes of ``w_bit`` bits, and set up activation and gradient quantization."""
        check_bits(w_bit, a_bit, g_bit)
        weight = self.weight
        self.weight = nBitConvParameter(
            weight,
            weight.requires_grad,
            w_bit=w_bit,
            scale=scale,
            transposed=self.transposed,
            groups=self.groups,
            learn_scale=learn_scale,
        )
        self.w_bit, self.a_bit, self.g_bit = w_bit, a_bit, g_bit
        self.activation = None
        if a_bit is not None:
            self.activation = ActivationQuantizer(a_bit, weight.device, weight.dtype).train(self.training)

    def reset_parameters(self) -> None:
        """torch.nn's initialization; a packed weight gets a new scale with it."""
        if not isinstance(self.weight, PackedParameter):
            super().reset_parameters()
            return
        weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.weight.quantize_(weight, _initial_scale(weight, self.w_bit))
        if self.activation is not None:
            self.activation.reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, _fan_in(weight)))
            nn.init.uniform_(self.bias, -bound, bound)

    def _convolve(
        self, x: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...] = (), pad: tuple[int, ...] = ()
    ) -> Tensor:
        """Quantize, convolve, add the bias. padding: zeros on both sides; pad: where the sides differ, as F.pad's."""
        spatial = len(self.kernel_size)
        if x.dim() not in (spatial + 1, spatial + 2):
            raise ValueError(
                f"the input must have {spatial + 1} (unbatched) or {spatial + 2} dimensions, got {tuple(x.shape)}."
            )
        if x.shape[-spatial - 1] != self.in_channels:
            raise ValueError(f"the input must have in_channels (={self.in_channels}) channels, got {tuple(x.shape)}.")
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        scale = low = None
        if self.activation is not None:
            self.activation.prepare_(batched)
            scale, low = self.activation.scale, self.activation.low
        weight, bias = self.weight, self.bias
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            batched = batched.to(torch.get_autocast_dtype(x.device.type))
        geometry = ops.Convolution(
            self.stride, padding, self.dilation, self.transposed, output_padding or (0,) * spatial, self.groups, pad
        )
        y = QuantizedConvolution.apply(batched, weight, scale, low, geometry, self.a_bit, self.g_bit)
        if bias is not None:
            y = y + bias.to(y.dtype).view(-1, *[1] * spatial)
        return y if x.dim() == spatial + 2 else y.squeeze(0)

    def extra_repr(self) -> str:
        bits = f", w_bit={self.w_bit}"
        bits += f", a_bit={self.a_bit}" if self.a_bit is not None else ""
        bits += f", g_bit={self.g_bit}" if self.g_bit is not None else ""
        return super().extra_repr() + bits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint is quantized on the way in; it has nothing to say about the activation's scale."""
        key = prefix + "weight"
        value: Tensor | None = state_dict.get(key)
        weight = self.weight
        if (
            isinstance(weight, PackedParameter)
            and value is not None
            and not isinstance(value, PackedParameter)
            and value.is_floating_point()
            and value.shape == weight.shape
        ):
            state_dict[key] = nBitConvParameter(
                value.to(weight.dtype),
                w_bit=self.w_bit,
                transposed=self.transposed,
                groups=self.groups,
                learn_scale=weight.learn_scale,
            )
            if self.activation is not None:
                for name, current in self.activation.state_dict(prefix=prefix + "activation.").items():
                    state_dict.setdefault(name, current)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Forward(nBitConv):
    """Forward of the three convolutions that are not transposed."""

    def forward(self, input: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if self.a_bit is None and self.g_bit is None:
            # torch's own operator: autograd saves the weight as it is, packed.
            return self._conv_forward(input, self.weight, self.bias)
        padding = self._reversed_padding_repeated_twice  # (left, right) of the last dimension first
        left, right = tuple(padding[-2::-2]), tuple(padding[::-2])
        if self.padding_mode != "zeros":
            return self._convolve(F.pad(input, padding, mode=self.padding_mode), (0,) * spatial)
        if left == right:
            return self._convolve(input, left)
        return self._convolve(input, (0,) * spatial, pad=tuple(padding))


class _ForwardTransposed(nBitConv):
    """Forward of the three transposed convolutions."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.a_bit is None and self.g_bit is None:
            return super().forward(input, output_size)
        spatial, padding = len(self.kernel_size), tuple(int(p) for p in self.padding)
        output_padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return self._convolve(input, padding, tuple(output_padding))


class nBitConv1d(_Forward, nn.Conv1d):
    """``torch.nn.Conv1d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConv2d(_Forward, nn.Conv2d):
    """``torch.nn.Conv2d`` with a weight of 1 to 8 bits that is stored, and trained, packed.

    Takes torch.nn.Conv2d's arguments, then by keyword:

    w_bit: bits of the weight, 1 to 8.
    a_bit: bits of the input, quantized with a learned scale that the first batch sets; None: float.
    g_bit: bits of the gradient on its way into the two backward convolutions, 2 to 8; None: float.
    learn_scale: the weight's scale is trained too. Worth it where no normalization layer follows.
    """


class nBitConv3d(_Forward, nn.Conv3d):
    """``torch.nn.Conv3d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose1d(_ForwardTransposed, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose2d(_ForwardTransposed, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConvTranspose3d(_ForwardTransposed, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with a weight of ``w_bit`` bits; see ``nBitConv2d``."""


class nBitConv2dBase(nBitConv2d):
    """``nBitConv2d`` under the name and constructor of bitorch-engine: no bias, no groups, 4-bit activations."""

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

    def prepare_params(self) -> None:
        """Nothing to prepare: the weight is packed from the start."""

    def set_weight_data(self, x: Tensor) -> None:
        """Take new float weights, with a new scale."""
        self._packed_weight().quantize_(x)

    def set_quantized_weight_data(self, x: Tensor) -> None:
        """Take new integer codes of the weight's shape; the scale stays."""
        weight = self._packed_weight()
        if x.shape != weight.shape or x.is_floating_point():
            raise ValueError(f"codes must be integers of shape {tuple(weight.shape)}, got {x.dtype} {tuple(x.shape)}.")
        weight.data = nBitConvParameter(x.to(weight.device), w_bit=self.w_bit, scale=weight.channel_scale)

    def generate_quantized_weight(self, qweight_only: bool = False) -> None:
        """Drop the training state where ``qweight_only``: what stays are the codes and their scale."""
        if qweight_only:
            self._packed_weight().drop_residual_()

    @property
    def qweight(self) -> Tensor:
        """The packed codes, uint8."""
        return self._packed_weight().packed

    @property
    def opt_weight(self) -> Tensor:
        """The weight that the optimizer steps and forward uses: they are one."""
        return self.weight

    def _packed_weight(self) -> PackedParameter:
        if not isinstance(self.weight, PackedParameter):
            raise TypeError(
                f"the weight was replaced by a {type(self.weight).__name__}; it must be an nBitConvParameter."
            )
        return self.weight


def check_bits(w_bit: int, a_bit: int | None, g_bit: int | None) -> None:
    """Raise ValueError or TypeError for a width that the layers do not have."""
    bit_format(w_bit)
    if a_bit is not None:
        bit_format(a_bit)
    if g_bit is not None and bit_format(g_bit).bits == 1:
        raise ValueError("g_bit must be 2 to 8, or None for float gradients, got 1: a gradient needs a zero.")


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()  # as torch.nn.init counts it


def _initial_scale(weight: Tensor, w_bit: int) -> float:
    """The scale of a new layer, from the initialization's known spread, uniform in +- 1 / sqrt(fan_in).

    It does not depend on the drawn values: ranks of a distributed run that drew different ones still share one grid,
    so that DistributedDataParallel's first broadcast is exact. At 1 bit it is the standard deviation itself, with which
    the codes have the variance of the float weights.
    """
    deviation = (3 * max(1, _fan_in(weight))) ** -0.5
    return deviation if w_bit == 1 else deviation * normal_scale(bit_format(w_bit))
