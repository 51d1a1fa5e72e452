"""What the checkpoint tests share: a small network with every kind of layer, and how to see that nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitorch_engine import quantize_
from bitorch_engine.parameters import PackedParameter


def make_network(seed: int = 0, *, quantized: bool = True, **settings: Any) -> nn.Sequential:
    """Convolutions, a transposed one with groups, BatchNorm's buffers, dropout, a linear layer; for (N, 3, 8, 8)."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, 12, 3, groups=2, bias=False),
        nn.ConvTranspose2d(12, 6, 3, groups=3),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 5),
    )
    if quantized:
        quantize_(network, **{"w_bit": 4, "a_bit": 8, "g_bit": 8, "skip": "7"} | settings)
        network(torch.randn(4, 3, 8, 8))  # sets the scales of activations
    return network


def bits_of(value: Any) -> Any:
    """All that ``value`` holds, in a form in which == compares every bit and every type."""
    if isinstance(value, PackedParameter):
        inner = bits_of([value.packed, value.channel_scale, value.training_state(), value.learn_scale])
        return type(value).__name__, value.dtype, value.w_bit, value.transposed_groups, inner
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, nn.Module):
        modules = [(name, type(module), module.training) for name, module in value.named_modules()]
        return modules, bits_of(dict(value.state_dict(keep_vars=True)))
    if hasattr(value, "state_dict"):
        return bits_of(value.state_dict())
    if isinstance(value, dict):
        return type(value), [(key, bits_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [bits_of(item) for item in value]
    return type(value), repr(value)


@pytest.fixture(name="network")
def _network() -> Callable[..., nn.Sequential]:
    return make_network


@pytest.fixture(name="bits_of")
def _bits_of() -> Callable[[Any], Any]:
    return bits_of
