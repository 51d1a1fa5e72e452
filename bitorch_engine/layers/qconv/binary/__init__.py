"""Convolutions with weights and activations of one bit."""

from bitorch_engine.layers.qconv.binary.layer import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv2dBase,
    BinaryConv3d,
    BinaryConvParameter,
)

__all__ = ["BinaryConv1d", "BinaryConv2d", "BinaryConv2dBase", "BinaryConv3d", "BinaryConvParameter"]
