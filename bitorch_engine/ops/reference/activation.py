"""Activations as codes of 1 to 8 bits, and the gradients of that; ``quantizers.activation`` sets their scales."""

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format


def quantize_activation(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(index, beyond) of activations, both uint8 of the shape of ``x``.

    beyond: 1 where x / scale is above its code, for the lowest code where it is below (at 1 bit: farther out). With the
    index it tells exactly which elements were clipped, and for the others which way they were rounded.
    NaN becomes the code 0 (at 1 bit, +1). x / scale is taken as x times the float32 nearest to 1 / scale: on every
    processor a multiplication is many times as fast as a division.
    """
    form = bit_format(bits)
    ratio = torch.nan_to_num(x.to(torch.float32) * (1 / scale), nan=0.0)
    if bits == 1:
        return (ratio >= 0).to(torch.uint8), (ratio.abs() > 1).to(torch.uint8)
    index = (ratio.round() - low).clamp(0, form.levels - 1)
    beyond = torch.where(index == 0, ratio < low, ratio > index + low)
    return index.to(torch.uint8), beyond.to(torch.uint8)


def activation_codes(index: Tensor, low: Tensor, bits: int) -> Tensor:
    """The codes, integer-valued float32, of an index: multiply by the scale to get the values."""
    return index.to(torch.float32) * bit_format(bits).step + low


def activation_grads(grad: Tensor, index: Tensor, beyond: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Gradients of the float activation and of the scale, from the gradient of the quantized activation.

    grad: as x, float.  index, beyond: from ``quantize_activation``.
    Straight through inside the range, zero where x was clipped (at 1 bit: |x| > scale).
    The scale's gradient is the code where x was clipped, and round(x/s) - x/s elsewhere (Esser et al., equation 3), of
    which what is kept tells the sign: it enters with its mean size, 1/4, and with 0 in the lowest code, where a ReLU
    puts its exact zeros. At 1 bit it is the code, as the scale is the size of every element. The sum is scaled by
    1 / sqrt(features * high), section 2.2.
    """
    form = bit_format(bits)
    codes = activation_codes(index, low, bits)
    high = low + (form.levels - 1) * form.step
    clipped = (beyond != 0) & ((index == 0) | (index == form.levels - 1))
    error = torch.where(index == 0, 0.0, 0.25 - 0.5 * beyond)
    slope = codes if bits == 1 else torch.where(clipped, codes, error)
    features = max(1, grad[:1].numel())
    scale_grad = (grad.to(torch.float32) * slope).sum() / (features * high).sqrt()
    return torch.where(clipped, 0.0, grad).to(grad.dtype), scale_grad
