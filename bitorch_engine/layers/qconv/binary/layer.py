"""Convolutions of 1-bit weights and 1-bit activations, their parameter, the original BITorch Engine's base class."""

import torch

from bitorch_engine.layers.binary import BinaryLayer
from bitorch_engine.layers.qconv.nbit.layer import nBitConv1d, nBitConv2d, nBitConv3d
from bitorch_engine.layers.weight_access import WeightAccess, require_symmetric
from bitorch_engine.parameters import PackedParameter


class BinaryConvParameter(PackedParameter):
    """A parameter for binary convolutions: the signs are the weight, and ``update`` trains them in place."""


class BinaryConv1d(BinaryLayer, nBitConv1d):
    """``torch.nn.Conv1d`` with weights and inputs of one bit; see ``BinaryConv2d``."""

    parameter_class = BinaryConvParameter


class BinaryConv2d(BinaryLayer, nBitConv2d):
    """``torch.nn.Conv2d`` with weights and inputs of one bit, each -1 or +1 times a scale; padding is zero.

    Takes torch.nn.Conv2d's arguments, then by keyword ``g_bit`` and ``learn_scale`` as ``nBitConv2d``. It computes what
    ``nBitConv2d(..., w_bit=1, a_bit=1)`` computes.
    """

    parameter_class = BinaryConvParameter


class BinaryConv3d(BinaryLayer, nBitConv3d):
    """``torch.nn.Conv3d`` with weights and inputs of one bit; see ``BinaryConv2d``."""

    parameter_class = BinaryConvParameter


class BinaryConv2dBase(WeightAccess, BinaryConv2d):
    """``BinaryConv2d`` under the name and constructor of the original BITorch Engine: no bias, no groups."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float,
        symmetric: bool = True,
    ) -> None:
        require_symmetric(symmetric)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=False,
            device=device,
            dtype=dtype,
        )
