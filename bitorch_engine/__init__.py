"""Networks whose weights have 1 to 8 bits, and stay at those bits while they are trained."""

from bitorch_engine import optim
from bitorch_engine.checkpoint import load, save
from bitorch_engine.convert import quantize_
from bitorch_engine.layers.qconv.nbit import (
    nBitConv1d,
    nBitConv2d,
    nBitConv2dBase,
    nBitConv3d,
    nBitConvParameter,
    nBitConvTranspose1d,
    nBitConvTranspose2d,
    nBitConvTranspose3d,
)
from bitorch_engine.quantizers.saved_tensors import compress_saved_tensors

__version__ = "0.1.0"

__all__ = [
    "compress_saved_tensors",
    "load",
    "nBitConv1d",
    "nBitConv2d",
    "nBitConv2dBase",
    "nBitConv3d",
    "nBitConvParameter",
    "nBitConvTranspose1d",
    "nBitConvTranspose2d",
    "nBitConvTranspose3d",
    "optim",
    "quantize_",
    "save",
]
