"""Converting a float model into a low-bit one, in place."""

from bitorch_engine.convert.quantize import ConversionReport, LayerReport, quantize_
from bitorch_engine.convert.swap import convert_layer_

__all__ = ["ConversionReport", "LayerReport", "convert_layer_", "quantize_"]
