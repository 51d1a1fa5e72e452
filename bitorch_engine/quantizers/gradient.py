"""What the rounding noise of quantized gradients depends on."""

import torch
from torch import Tensor


def new_seed(device: torch.device) -> Tensor:
    """A seed for ``quantize_gradient`` from torch's generator: 0-dim int32."""
    return torch.randint(-(1 << 31), 1 << 31, (), dtype=torch.int32, device=device)
