"""Gradients as integers of 2 to 8 bits, on their way into the backward products."""

import torch
from torch import Tensor

from bitorch_engine.ops.reference.noise import noise_bits, uniform24


def quantize_gradient(grad: Tensor, bits: int, keep: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) with codes * scale equal to ``grad`` on average.

    grad: (N, C, ...) float.  keep: the dimension, 0 or 1, that has a scale for each of its entries.
    seed: 0-dim int32, what the rounding noise depends on.
    codes: integer-valued float32, at most 2**(bits-1) - 1 in size, rounded stochastically; zero stays zero.
    scale: float32, broadcastable. NaN and Inf come back through the scale, so that they are not lost.
    """
    limit = (1 << (bits - 1)) - 1
    wide = grad.to(torch.float32)
    if wide.numel() == 0:
        return wide, wide.new_zeros([1] * grad.dim())
    others = [d for d in range(grad.dim()) if d != keep]
    scale = wide.abs().amax(others, keepdim=True) * (1 / limit)
    size = torch.where(scale > 0, wide.abs() / scale, 0.0)
    noise = uniform24(noise_bits(seed, 0, grad.numel(), grad.device)).view(grad.shape)
    whole = size.floor()
    codes = (whole + (noise < size - whole)).clamp(max=limit)
    return torch.where(wide < 0, -codes, codes), scale
