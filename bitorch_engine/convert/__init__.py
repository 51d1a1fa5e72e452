"""Converting a model, in place: a float one into a low-bit one, and one that was trained into a faster one."""

from bitorch_engine.convert.fuse import FusionReport, NormReport, fuse_batch_norm_
from bitorch_engine.convert.quantize import ConversionReport, LayerReport, quantize_
from bitorch_engine.convert.swap import convert_layer_

__all__ = [
    "ConversionReport",
    "FusionReport",
    "LayerReport",
    "NormReport",
    "convert_layer_",
    "fuse_batch_norm_",
    "quantize_",
]
