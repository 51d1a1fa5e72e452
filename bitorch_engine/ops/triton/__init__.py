"""Triton kernels as implementations of the ops for CUDA tensors.

A file here has the stem of the op's file in ``ops/reference/``, and each function the name of its op. It takes what the
op takes, and hands to the reference what its kernel does not do. Triton, and with it a file here, is imported by the
first call with a CUDA tensor: importing bitorch_engine loads no Triton and touches no GPU.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.ops.library import implement, reference_of, wanted_backend

__all__ = ["IMPLEMENTATIONS", "interpreted", "register", "why_not_available"]

IMPLEMENTATIONS: dict[str, str] = {
    "pack": "bits",
    "unpack": "bits",
    "dequantize": "bits",
    "quantize_activation": "activation",
    "activation_values": "activation",
    "activation_grads": "activation",
    "quantize_gradient": "gradient",
    "update_": "update",
    "add_": "update",
    "all_within": "update",
    "mean_squares": "update",
    "conv": "quantized_conv",
    "conv_codes": "quantized_conv",
    "conv_grad_input": "quantized_conv",
    "conv_grad_weight": "grad_weight",
    "conv_grad_weight_float": "grad_weight",
    "linear_weight_only": "linear",
    "linear_grad_input": "linear",
}
"""One row per op that has a kernel: the file here that holds the function of that name."""


def why_not_available() -> str:
    """Why there are no Triton kernels; empty where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'bitorch_engine[triton]'"
    return ""


def interpreted() -> bool:
    """Whether the environment asks for the kernels over CPU tensors, in Triton's interpreter: slow, and for tests."""
    return wanted_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def register() -> None:
    """Put the kernels over the reference for CUDA tensors, where another backend is not asked for."""
    wanted = wanted_backend()
    if wanted == "triton":
        if reason := why_not_available():
            raise RuntimeError(f"BITORCH_ENGINE_BACKEND=triton, but {reason}.")
        if not interpreted() and torch.cuda.device_count() == 0:
            raise RuntimeError(
                "BITORCH_ENGINE_BACKEND=triton, but torch finds no CUDA device. TRITON_INTERPRET=1 runs the kernels on "
                "the CPU, slowly, for tests."
            )
    if wanted != "reference":
        for device in ("CUDA", *(["CPU"] if interpreted() else [])):
            for name, stem in IMPLEMENTATIONS.items():
                implement(name, _on_its_device(name, stem), device)


def _on_its_device(name: str, stem: str) -> Callable[..., Any]:
    """The function of that op, which is looked up by the first call, run on the device of its first tensor."""
    function: Callable[..., Any] | None = None

    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal function
        if function is None:
            function = _function(name, stem)
        with torch.cuda.device_of(first):  # Triton launches on the current device; on a CPU tensor this does nothing
            return function(first, *args, **kwargs)

    return call


def _function(name: str, stem: str) -> Callable[..., Any]:
    if reason := why_not_available():
        _warn(reason)
        return reference_of(name)
    function: Callable[..., Any] = getattr(import_module(f"bitorch_engine.ops.triton.{stem}"), name)
    return function


_warned = False


def _warn(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"bitorch_engine runs in plain PyTorch on this GPU, slowly. {reason}.", stacklevel=4)
