"""Convolution of integers, exact: forward and both gradients, for every geometry that torch.nn's layers have."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Convolution(NamedTuple):
    """The geometry of a convolution of any rank, transposed or not, and its three products.

    Without spatial dimensions it is a linear layer: inputs (M, K), weights (N, K), one group.
    Inputs are batched, (N, C, *spatial). stride, padding, dilation, output_padding: one int a spatial dimension.
    pad: zeros added to x before that, two numbers a dimension, last dimension first, as in torch.nn.functional.pad;
    for padding that differs between the sides. Empty for none.
    The products are bilinear: what type the operands have, integer values or real ones, is the caller's choice.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int
    pad: Sequence[int] = ()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, C_out, *out)"""
        if not self.stride:
            return x @ weight.T
        x = F.pad(x, self.pad) if self.pad else x
        return torch.ops.aten.convolution.default(x, weight, None, *self._arguments())

    def grad_input(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of an input of that shape. grad: (N, C_out, *out)."""
        if not self.stride:
            return grad @ weight
        padded = list(shape)
        for i in range(len(self.pad) // 2):
            padded[-1 - i] += self.pad[2 * i] + self.pad[2 * i + 1]
        x = grad.new_empty(1).expand(padded)  # only its shape is used
        grad_x = self._backward(grad, x, weight, [True, False, False])[0]
        return F.pad(grad_x, [-n for n in self.pad]) if self.pad else grad_x

    def grad_weight(self, grad: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of a weight of that shape."""
        if not self.stride:
            return grad.T @ x
        x = F.pad(x, self.pad) if self.pad else x
        weight = grad.new_empty(1).expand(shape)  # only its shape is used
        return self._backward(grad, x, weight, [False, True, False])[1]

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward.default(grad, x, weight, None, *self._arguments(), mask)

    def _arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )


def multiply_exact(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, bound: int) -> Tensor:
    """``product(a, b)`` of integer-valued operands, exact, as float32 or float64.

    bound: no sum of products exceeds it. Float32 holds every integer up to 2**24, and float64 up to 2**53, so that
    with the right one of them no addition rounds, in whatever order it is done.
    """
    dtype = torch.float32 if bound <= 1 << 24 else torch.float64
    if not torch.amp.is_autocast_available(a.device.type):
        return product(a.to(dtype), b.to(dtype))
    with torch.autocast(a.device.type, enabled=False):  # it would round the operands to 8 or 11 bits
        return product(a.to(dtype), b.to(dtype))
