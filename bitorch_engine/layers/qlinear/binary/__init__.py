"""Linear layers with weights and activations of one bit."""

from bitorch_engine.layers.qlinear.binary.layer import BinaryLinear, BinaryLinearBase, BinaryLinearParameter

__all__ = ["BinaryLinear", "BinaryLinearBase", "BinaryLinearParameter"]
