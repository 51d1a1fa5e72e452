"""Networks whose weights have 1 to 8 bits, and stay at those bits while they are trained."""

try:
    from bitorch_engine import optim
except RuntimeError as error:  # the environment asks for kernels that are not there
    from bitorch_engine.cli.errors import end_command_line

    end_command_line(error)
    raise
from bitorch_engine.checkpoint import load, load_training, save, save_training
from bitorch_engine.convert import fuse_batch_norm_, quantize_
from bitorch_engine.layers.qconv.binary import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv2dBase,
    BinaryConv3d,
    BinaryConvParameter,
)
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
from bitorch_engine.layers.qlinear.binary import BinaryLinear, BinaryLinearBase, BinaryLinearParameter
from bitorch_engine.layers.qlinear.nbit import nBitLinear, nBitLinearBase, nBitLinearParameter
from bitorch_engine.quantizers.saved_tensors import compress_saved_tensors

__version__ = "0.1.0"

__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv2dBase",
    "BinaryConv3d",
    "BinaryConvParameter",
    "BinaryLinear",
    "BinaryLinearBase",
    "BinaryLinearParameter",
    "compress_saved_tensors",
    "fuse_batch_norm_",
    "load",
    "load_training",
    "nBitConv1d",
    "nBitConv2d",
    "nBitConv2dBase",
    "nBitConv3d",
    "nBitConvParameter",
    "nBitConvTranspose1d",
    "nBitConvTranspose2d",
    "nBitConvTranspose3d",
    "nBitLinear",
    "nBitLinearBase",
    "nBitLinearParameter",
    "optim",
    "quantize_",
    "save",
    "save_training",
]
