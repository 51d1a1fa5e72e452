"""Gradients as integers of 2 to 8 bits, on their way into the backward products."""

import torch
from torch import Tensor

from bitorch_engine.ops.reference.layout import channels_last_shape
from bitorch_engine.ops.reference.noise import noise_bits, uniform24

_LARGEST = 3e38
"""An inverse scale beyond it would be infinite, and infinity times zero is not zero."""


def quantize_gradient(
    grad: Tensor, channel_factor: Tensor | None, bits: int, keep: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, scale) with codes * scale equal to ``grad`` on average, or to ``grad * channel_factor``.

    grad: (N, C, *spatial) float.  channel_factor: (C,) float32.
    keep: the dimension, 0 or 1, that has a scale for each of its entries.
    seed: 0-dim int32, what the rounding noise depends on; noise of a value is that of its index in (N, C, *spatial).
    codes: int8, (N, *spatial, C), at most 2**(bits-1) - 1 in size, rounded stochastically; zero stays zero.
    scale: float32, broadcastable to grad. NaN and Inf come back through the scale, so that they are not lost.
    """
    limit = (1 << (bits - 1)) - 1
    wide = grad.to(torch.float32)
    if channel_factor is not None:
        wide = wide * channel_factor.view(1, -1, *[1] * (grad.dim() - 2))
    others = [d for d in range(grad.dim()) if d != keep]
    if wide.numel() == 0:
        codes = torch.zeros_like(wide, dtype=torch.int8).movedim(1, -1).contiguous()
        return codes, wide.new_zeros([length if d == keep else 1 for d, length in enumerate(grad.shape)])
    scale, inverse = scale_and_inverse(wide.abs().amax(others, keepdim=True), bits)
    size = torch.nan_to_num(wide.abs() * inverse, nan=0.0)
    noise = uniform24(noise_bits(seed, 0, grad.numel(), grad.device)).view(grad.shape)
    whole = size.floor()
    codes = (whole + (noise < size - whole)).clamp(max=limit)
    codes = torch.where(wide < 0, -codes, codes).to(torch.int8)
    return codes.movedim(1, -1).contiguous(), scale


def scale_and_inverse(largest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What a code is worth, and by what values are multiplied, where ``largest`` is the largest magnitude."""
    scale = largest * (1 / ((1 << (bits - 1)) - 1))
    return scale, torch.where(scale > 0, (1 / scale).clamp(max=_LARGEST), 0.0)


def quantize_gradient_fake(
    grad: Tensor, channel_factor: Tensor | None, bits: int, keep: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    codes = grad.new_empty(channels_last_shape(grad.shape), dtype=torch.int8)
    scale = [length if d == keep else 1 for d, length in enumerate(grad.shape)]
    return codes, grad.new_empty(scale, dtype=torch.float32)
