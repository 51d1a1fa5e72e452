"""The differentiable convolution of packed weights, quantized activations and quantized gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.bits import pack, unpack
from bitorch_engine.ops.reference.activation import activation_codes, activation_grads, quantize_activation
from bitorch_engine.ops.reference.gradient import quantize_gradient
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
        if a_bit is None or scale is None or low is None:
            ctx.save_for_backward(weight, x)
            return geometry.forward(x, _float(weight, x.dtype))
        index, beyond = quantize_activation(x, scale, low, a_bit)
        ctx.save_for_backward(weight, pack(index, a_bit, check=False), pack(beyond, 1, check=False), scale, low)
        codes = activation_codes(index, low, a_bit)
        # Codes have no NaN: without this a network that has diverged would go on as if nothing had happened.
        poison = sum(extreme * 0 for extreme in x.aminmax()) if x.numel() else 0.0  # 0, or NaN where x is not finite
        if not isinstance(weight, PackedParameter):
            return geometry.forward((codes * scale + poison).to(x.dtype), weight.to(x.dtype))
        bound = _bound(weight, a_bit, weight.numel() // weight.channel_scale.numel())
        total = ops.multiply_exact(geometry.forward, codes, weight.unpack_codes(), bound)
        return (total.to(torch.float32) * (_per_channel(weight, x) * scale) + poison).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry, a_bit, g_bit = ctx.geometry, ctx.a_bit, ctx.g_bit
        weight, *kept = ctx.saved_tensors
        need_x, need_weight, need_scale, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_scale = None
        if need_x or need_scale:
            grad_x = _grad_input(geometry, grad, weight, ctx.shape, g_bit).to(ctx.dtype)
        if a_bit is None:
            (x,) = kept
            if need_weight:
                grad_weight = _grad_weight(geometry, grad, x, None, weight, None, g_bit)
        else:
            packed, beyond, scale, low = kept
            index = unpack(packed, a_bit, ctx.shape.numel()).view(ctx.shape)
            if need_weight:
                codes = activation_codes(index, low, a_bit)
                grad_weight = _grad_weight(geometry, grad, codes, scale, weight, a_bit, g_bit)
            if grad_x is not None:
                beyond = unpack(beyond, 1, ctx.shape.numel()).view(ctx.shape)
                grad_x, grad_scale = activation_grads(grad_x, index, beyond, low, a_bit)
        return grad_x if need_x else None, grad_weight, grad_scale if need_scale else None, None, None, None, None


def _grad_input(
    geometry: ops.Convolution, grad: Tensor, weight: Tensor, shape: Sequence[int], g_bit: int | None
) -> Tensor:
    if g_bit is None:
        return geometry.grad_input(grad, _float(weight, grad.dtype), shape)
    if not isinstance(weight, PackedParameter):
        integers, scale = quantize_gradient(grad, g_bit, 0, new_seed(grad.device))
        return geometry.grad_input((integers * scale).to(weight.dtype), weight, shape)
    # The weight has one scale an output channel, and the sum runs over those: it goes into the gradient first.
    integers, scale = quantize_gradient(grad * _per_channel(weight, grad), g_bit, 0, new_seed(grad.device))
    bound = _bound(weight, g_bit, weight.numel() // shape[1])
    total = ops.multiply_exact(lambda g, w: geometry.grad_input(g, w, shape), integers, weight.unpack_codes(), bound)
    return total.to(torch.float32) * scale


def _grad_weight(
    geometry: ops.Convolution,
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    a_bit: int | None,
    g_bit: int | None,
) -> Tensor:
    """x: float values, or integer-valued codes with their scale and bits."""
    shape = weight.shape
    if g_bit is not None:
        integers, grad_scale = quantize_gradient(grad, g_bit, 1, new_seed(grad.device))
        if scale is not None and a_bit is not None and isinstance(weight, PackedParameter):
            bound = (grad.numel() // grad.shape[1]) << (a_bit + g_bit - 1)
            total = ops.multiply_exact(lambda g, a: geometry.grad_weight(g, a, shape), integers, x, bound)
            rows = weight.to_rows(total.to(torch.float32)) * (grad_scale * scale).view(-1, 1)
            return weight.from_rows(rows).to(weight.dtype)
        grad = (integers * grad_scale).to(grad.dtype)
    values = x if scale is None else x * scale
    return geometry.grad_weight(grad, values.to(grad.dtype), shape).to(weight.dtype)


def _float(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.dequantize() if isinstance(weight, PackedParameter) else weight).to(dtype)


def _per_channel(weight: PackedParameter, like: Tensor) -> Tensor:
    """The weight's scale, shaped to broadcast against an output: (1, C_out, 1, ...)."""
    return weight.channel_scale.view(1, -1, *[1] * (like.dim() - 2))


def _bound(weight: PackedParameter, other_bits: int, products: int) -> int:
    """No sum of that many products of a code of the weight and an integer of ``other_bits`` bits is larger."""
    return products << (weight.w_bit - 1 + other_bits)
