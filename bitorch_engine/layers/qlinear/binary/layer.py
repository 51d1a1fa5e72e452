"""The linear layer of 1-bit weights and 1-bit activations, its parameter, the original BITorch Engine's base class."""

import torch

from bitorch_engine.layers.binary import BinaryLayer
from bitorch_engine.layers.qlinear.nbit.layer import nBitLinear
from bitorch_engine.layers.weight_access import WeightAccess, require_symmetric
from bitorch_engine.parameters import PackedParameter


class BinaryLinearParameter(PackedParameter):
    """A parameter for binary linear layers: the signs are the weight, and ``update`` trains them in place."""


class BinaryLinear(BinaryLayer, nBitLinear):
    """``torch.nn.Linear`` with weights and inputs of one bit, each -1 or +1 times a scale.

    Takes torch.nn.Linear's arguments, then by keyword ``g_bit`` and ``learn_scale`` as ``nBitLinear``. It computes what
    ``nBitLinear(..., w_bit=1, a_bit=1)`` computes.
    """

    parameter_class = BinaryLinearParameter


class BinaryLinearBase(WeightAccess, BinaryLinear):
    """``BinaryLinear`` under the name and constructor of the original BITorch Engine: no bias."""

    def __init__(
        self,
        input_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float,
        symmetric: bool = True,
    ) -> None:
        require_symmetric(symmetric)
        super().__init__(input_features, out_features, bias=False, device=device, dtype=dtype)
