"""The compiled kernels of csrc/ as implementations of the ops for CPU tensors.

A file here has the stem of the op's file in ``ops/reference/``. Each function takes what the op takes, and hands to the
reference what its kernel does not do.
"""

from collections.abc import Callable
from typing import Any

from bitorch_engine.ops import triton
from bitorch_engine.ops.cpu import bits, conv, float_conv, grad_weight, linear, quantize, update
from bitorch_engine.ops.cpu.loading import LIBRARY, available_isas, cap_isa, current_isa, kernels, why_not_loaded
from bitorch_engine.ops.library import implement, implement_plan, wanted_backend

__all__ = ["IMPLEMENTATIONS", "available_isas", "cap_isa", "current_isa", "kernels", "register", "why_not_loaded"]

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pack": bits.pack,
    "unpack": bits.unpack,
    "update_": update.update_,
    "add_": update.add_,
    "all_within": update.all_within,
    "mean_squares": update.mean_squares,
    "dequantize": quantize.dequantize,
    "quantize_activation": quantize.quantize_activation,
    "activation_values": quantize.activation_values,
    "activation_grads": quantize.activation_grads,
    "quantize_gradient": quantize.quantize_gradient,
    "conv_grad_weight": grad_weight.conv_grad_weight,
    "conv_grad_weight_float": grad_weight.conv_grad_weight_float,
    "conv_grad_weight_dense": grad_weight.conv_grad_weight_dense,
    "conv": conv.conv,
    "conv_codes": conv.conv_codes,
    "conv_grad_input": conv.conv_grad_input,
    "conv_weight_only": float_conv.conv_weight_only,
    "linear_weight_only": linear.linear_weight_only,
    "linear_grad_input": linear.linear_grad_input,
}
"""One row per op that has kernels; feeds registration and the agreement tests."""

PLANNERS: dict[str, Callable[..., Any]] = {
    "conv": conv.plan,
    "conv_weight_only": float_conv.plan,
    "linear_weight_only": linear.plan,
    "update_": update.prepare,
}
"""What makes plans of the ops that layers call in inference, and that optimizers call."""


def register() -> None:
    """Put the kernels over the reference, where the library is there and another backend is not asked for."""
    wanted = wanted_backend()
    if LIBRARY is None and wanted == "cpu":
        raise RuntimeError(f"BITORCH_ENGINE_BACKEND=cpu, but the CPU kernels are not there: {why_not_loaded()}")
    if LIBRARY is not None and wanted != "reference" and not triton.interpreted():
        for name, function in IMPLEMENTATIONS.items():
            implement(name, function, "CPU")
        for name, planner in PLANNERS.items():
            implement_plan(name, planner)
