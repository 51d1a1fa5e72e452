"""Registration with torch.library: one schema, one reference and one shape function per op; backends go over it."""

import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "bitorch_engine"

# Library.define and .impl cost 3 us a call; torch.library.custom_op, which does the same, 9.5.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


_defined: list[str] = []


def defined() -> list[str]:
    """Names of all ops, in their order."""
    return list(_defined)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Any:
    """Define an op and return it.

    schema: "name(Tensor x, int bits) -> Tensor".
    reference: plain PyTorch; it is the definition, and what runs where no backend has the op.
    fake: gives outputs of the right shape, dtype and strides from inputs without data; None where nothing is returned.
    """
    name = schema.partition("(")[0]
    _defined.append(name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *args, **kwargs: None), lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def implement(name: str, function: Callable[..., Any], device: str) -> None:
    """Register a backend's implementation of a defined op over the reference, for one device: "CPU" or "CUDA"."""
    _LIBRARY.impl(name, function, device)


BACKENDS = ("reference", "cpu", "triton")


def wanted_backend() -> str | None:
    """The backend that the environment variable BITORCH_ENGINE_BACKEND asks for; None: the best for each device."""
    name = os.environ.get("BITORCH_ENGINE_BACKEND", "")
    if name and name not in BACKENDS:
        raise RuntimeError(f"BITORCH_ENGINE_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}.")
    return name or None
