"""The differentiable linear map with a packed weight and a float input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.parameters import PackedParameter


class WeightOnlyLinear(torch.autograd.Function):
    """``torch.nn.functional.linear`` with a packed weight. Backward keeps the input and the packed weight.

    x: (..., K).  weight: (N, K), packed, or float (as functional_call may pass).  bias: (N,) or None.
    torch's own operator would keep the transposed float weight for backward.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if not isinstance(weight, PackedParameter):
            return F.linear(x, weight.to(x.dtype), bias)
        return ops.linear_weight_only(x, weight.packed, weight.channel_scale, weight.w_bit, bias, weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
        grad_x = grad_weight = grad_bias = None
        if need_x and isinstance(weight, PackedParameter) and not torch.is_grad_enabled():
            fields = (weight.packed, weight.channel_scale, weight.w_bit, weight.shape[1])
            grad_x = ops.linear_grad_input(rows, *fields).view(x.shape)
        elif need_x:
            # The packed weight itself is the operand, so that gradients of gradients reach it.
            grad_x = (rows @ weight.to(grad.dtype)).view(x.shape)
        if need_weight:
            x_rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
            grad_weight = (rows.T @ x_rows).to(weight.dtype)
        if need_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias
