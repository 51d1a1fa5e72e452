"""Linear layers with weights of 1 to 8 bits."""

from bitorch_engine.layers.qlinear.nbit.layer import nBitLinear, nBitLinearBase, nBitLinearParameter

__all__ = ["nBitLinear", "nBitLinearBase", "nBitLinearParameter"]
