"""The differentiable convolution of packed weights, quantized activations and quantized gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitorch_engine import ops
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.quantizers.gradient import new_seed


class QuantizedConvolution(torch.autograd.Function):
    """Convolve a float input with a packed weight, in integers where both operands of a product are quantized.

    x: (N, C, *spatial).  weight: PackedParameter, or float (as functional_call may pass).
    scale, low: of the activation quantizer; None for float activations.  a_bit, g_bit: bits of activation and gradient.
    Backward keeps the packed weight and, of the activation, its packed codes and one more bit an element; the float
    activation only where a_bit is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        low: Tensor | None,
        geometry: ops.Convolution,
        a_bit: int | None,
        g_bit: int | None,
    ) -> Tensor:
        ctx.geometry, ctx.a_bit, ctx.g_bit, ctx.shape, ctx.dtype = geometry, a_bit, g_bit, x.shape, x.dtype
        ctx.channels_last = ops.is_channels_last(x)
        if a_bit is None or scale is None or low is None:
            ctx.save_for_backward(weight, x)
            return geometry.forward(x, _float(weight, x.dtype, ctx.channels_last))
        codes, beyond, poison = ops.quantize_activation(x, scale, low, a_bit)
        ctx.save_for_backward(weight, codes, beyond, scale, low)
        if not isinstance(weight, PackedParameter):
            values = ops.activation_values(codes, scale, low, a_bit, x.shape, x.dtype, ctx.channels_last)
            return geometry.forward(values + poison.to(x.dtype), weight.to(x.dtype))
        return ops.conv_codes(
            codes,
            x.shape,
            scale,
            low,
            poison,
            a_bit,
            weight.packed,
            weight.channel_scale,
            weight.w_bit,
            weight.shape,
            *geometry,
            x.dtype,
            ctx.channels_last,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        need_x, need_weight, need_scale, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_scale = None
        if need_x or need_scale:
            grad_x = _grad_input(ctx, grad, weight)
        if need_weight:
            grad_weight = _grad_weight(ctx, grad, weight, *kept)
        if grad_x is not None and ctx.a_bit is not None:
            codes, beyond, _, low = kept
            grad_x, grad_scale = ops.activation_grads(grad_x, codes, beyond, low, ctx.a_bit)
        return grad_x if need_x else None, grad_weight, grad_scale if need_scale else None, None, None, None, None


def _grad_input(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
    geometry, g_bit = ctx.geometry, ctx.g_bit
    if g_bit is None:
        floats = _float(weight, grad.dtype, ops.is_channels_last(grad))
        return geometry.grad_input(grad, floats, ctx.shape).to(ctx.dtype)
    if not isinstance(weight, PackedParameter):
        grad = _round_gradient(grad, g_bit, 0).to(weight.dtype)
        return geometry.grad_input(grad, weight, ctx.shape).to(ctx.dtype)
    # The weight has one scale an output channel, and the sum runs over those: it goes into the gradient first.
    codes, scale = ops.quantize_gradient(grad, weight.channel_scale, g_bit, 0, new_seed(grad.device))
    return ops.conv_grad_input(
        codes, scale, weight.packed, weight.w_bit, ctx.shape, weight.shape, *geometry, ctx.dtype, ctx.channels_last
    )


def _grad_weight(
    ctx: Any,
    grad: Tensor,
    weight: Tensor,
    kept: Tensor,
    beyond: Tensor | None = None,
    scale: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """kept: the float activation, or its packed codes, which then come with scale and low."""
    geometry, a_bit, g_bit, shape = ctx.geometry, ctx.a_bit, ctx.g_bit, weight.shape
    if a_bit is None or scale is None or low is None:
        if g_bit is not None:
            grad = _round_gradient(grad, g_bit, 1)
        return ops.conv_grad_weight_dense(grad, kept.to(grad.dtype), shape, *geometry).to(weight.dtype)
    rest = (kept, scale, low, a_bit, ctx.shape, shape, *geometry, weight.dtype)
    if g_bit is None:
        return ops.conv_grad_weight_float(grad, *rest, ctx.channels_last)
    codes, grad_scale = ops.quantize_gradient(grad, None, g_bit, 1, new_seed(grad.device))
    return ops.conv_grad_weight(codes, grad_scale, *rest)


def _round_gradient(grad: Tensor, g_bit: int, keep: int) -> Tensor:
    """The gradient, rounded stochastically to g_bit bits."""
    codes, scale = ops.quantize_gradient(grad, None, g_bit, keep, new_seed(grad.device))
    return (codes.movedim(-1, 1) * scale).to(grad.dtype)


def _float(weight: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return (weight.dequantize(channels_last=channels_last) if isinstance(weight, PackedParameter) else weight).to(dtype)
