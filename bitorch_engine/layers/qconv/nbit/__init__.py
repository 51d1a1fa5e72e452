"""Convolutions with weights of 1 to 8 bits."""

from bitorch_engine.layers.qconv.nbit.layer import (
    nBitConv1d,
    nBitConv2d,
    nBitConv2dBase,
    nBitConv3d,
    nBitConvParameter,
    nBitConvTranspose1d,
    nBitConvTranspose2d,
    nBitConvTranspose3d,
)

__all__ = [
    "nBitConv1d",
    "nBitConv2d",
    "nBitConv2dBase",
    "nBitConv3d",
    "nBitConvParameter",
    "nBitConvTranspose1d",
    "nBitConvTranspose2d",
    "nBitConvTranspose3d",
]
