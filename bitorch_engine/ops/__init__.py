"""What can be computed on codes. Every op is defined by its plain-PyTorch reference; faster backends go over it."""

from bitorch_engine.ops import calls, cpu, triton
from bitorch_engine.ops.library import (
    Plan,
    PreparedUpdate,
    is_plain,
    is_transformed,
    kind_of,
    plan,
    prepare_update,
    unheard,
    unobserved,
)
from bitorch_engine.ops.reference.conv import Convolution, multiply_exact
from bitorch_engine.ops.reference.float_conv import FEW_CHANNELS
from bitorch_engine.ops.reference.layout import in_memory_format, is_channels_last
from bitorch_engine.ops.reference.levels import dither_levels, load_levels, store_levels_
from bitorch_engine.ops.reference.moments import moment_fits, new_moment
from bitorch_engine.ops.reference.noise import noise_bits, noise_key, uniform24
from bitorch_engine.ops.reference.update import SLICE, direction_, is_per_row, level_rate, tree_sum
from bitorch_engine.ops.schemas import (
    activation_grads,
    activation_values,
    add_,
    all_within,
    conv,
    conv_codes,
    conv_grad_input,
    conv_grad_weight,
    conv_grad_weight_dense,
    conv_grad_weight_float,
    conv_weight_only,
    dequantize,
    linear_grad_input,
    linear_weight_only,
    mean_squares,
    pack,
    quantize_activation,
    quantize_gradient,
    unpack,
    update_,
)

__all__ = [
    "calls",
    "is_channels_last",
    "quantize_gradient",
    "quantize_activation",
    "conv_grad_weight",
    "conv_grad_weight_float",
    "conv_weight_only",
    "dequantize",
    "conv_grad_input",
    "conv_codes",
    "conv",
    "activation_values",
    "activation_grads",
    "FEW_CHANNELS",
    "SLICE",
    "Convolution",
    "Plan",
    "PreparedUpdate",
    "add_",
    "all_within",
    "direction_",
    "conv_grad_weight_dense",
    "in_memory_format",
    "dither_levels",
    "is_per_row",
    "is_plain",
    "is_transformed",
    "kind_of",
    "level_rate",
    "linear_grad_input",
    "linear_weight_only",
    "load_levels",
    "mean_squares",
    "moment_fits",
    "multiply_exact",
    "new_moment",
    "noise_bits",
    "noise_key",
    "pack",
    "plan",
    "prepare_update",
    "store_levels_",
    "tree_sum",
    "uniform24",
    "unheard",
    "unobserved",
    "unpack",
    "update_",
]

cpu.register()
triton.register()
