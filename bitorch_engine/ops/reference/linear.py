"""Linear layers with packed weights and float activations."""

import torch.nn.functional as F
from torch import Tensor

from bitorch_engine.bits import bit_format, unpack


def linear_weight_only(
    x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group_size: int = 0
) -> Tensor:
    """``x @ (codes * scale)^T + bias`` in x's dtype; the weights are rounded to it.

    x: (..., columns) float.  packed: rows of output channels.
    channel_scale: one entry a row, or with a group_size (rows, columns / group_size).
    """
    check_groups(channel_scale, columns, group_size)
    rows = channel_scale.shape[0] if group_size else channel_scale.numel()
    codes = bit_format(bits).codes(unpack(packed, bits, rows * columns)).view(rows, columns)
    weight = scaled(codes, channel_scale, group_size).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_weight_only_fake(
    x: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, bias: Tensor | None, columns: int, group_size: int = 0
) -> Tensor:
    rows = channel_scale.shape[0] if group_size else channel_scale.numel()
    return x.new_empty([*x.shape[:-1], rows])


def linear_grad_input(grad: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, columns: int) -> Tensor:
    """``grad @ (codes * scale)``, the gradient of a linear layer's input, in grad's dtype; weights are rounded to it.

    grad: (M, rows) float.  packed, channel_scale: rows of output channels, ``columns`` codes and one scale each.
    """
    rows = channel_scale.numel()
    codes = bit_format(bits).codes(unpack(packed, bits, rows * columns)).view(rows, columns)
    return grad @ (codes.float() * channel_scale.float().view(rows, 1)).to(grad.dtype)


def linear_grad_input_fake(grad: Tensor, packed: Tensor, channel_scale: Tensor, bits: int, columns: int) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def scaled(codes: Tensor, channel_scale: Tensor, group_size: int) -> Tensor:
    """(rows, columns) codes times the scale of their row or group: float32."""
    rows, columns = codes.shape
    size = group_size or columns
    scale = channel_scale.float().reshape(rows, columns // group_size if group_size else 1, 1)
    return (codes.float().view(rows, scale.shape[1], size) * scale).view(rows, columns)


def check_groups(channel_scale: Tensor, columns: int, group_size: int) -> None:
    if group_size < 0 or (group_size and (columns % group_size or channel_scale.shape[1:] != (columns // group_size,))):
        raise ValueError(
            f"with group_size {group_size}, channel_scale must be (rows, {columns} / {group_size}), "
            f"got {tuple(channel_scale.shape)}."
        )
