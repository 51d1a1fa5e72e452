"""Nested Python values as JSON and tensors, so that a state_dict comes back exactly as it was, without pickle.

None, bool, int, str, finite floats and lists are JSON's own. Everything else is an object with one key, its type:

    {"float": "inf"}    {"tuple": [...]}    {"dict": [[key, value], ...]}    {"dtype": "float32"}
    {"tensor": [name in the file]}    {"tensor": [name in the file, strides]}, where its memory is in another order
"""

import math
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

from bitorch_engine.checkpoint.format import dtype_name, dtype_named

_SEQUENCES: dict[str, type] = {"tuple": tuple, "Size": torch.Size}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON-able form of ``value``; its tensors go into ``tensors``, under names that begin with ``name``.

    Raises TypeError, with the place in ``value``, for what has no form here: functions, modules, tensor subclasses.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if kind is Tensor:
        tensors[key := _unused(name, tensors)] = value
        # A matrix product depends, in its last bit, on the order in which its factors lie in memory.
        strides = torch.empty_like(value, device="meta").stride()
        return {"tensor": [key] if value.is_contiguous() else [key, list(strides)]}
    if kind is torch.dtype:
        return {"dtype": dtype_name(value)}
    if kind is list or kind in _SEQUENCES.values():
        items = [encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return items if kind is list else {kind.__name__: items}
    if kind in _MAPPINGS.values():
        pairs = [[_encode_key(key, name), encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {kind.__name__: pairs}
    raise TypeError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: it holds tensors, "
        "numbers, strings, bool, None, torch.dtype, and lists, tuples and dicts of them."
    )


def decode(form: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``encode`` was given. Raises LookupError, TypeError or ValueError for what it did not make."""
    if isinstance(form, list):
        return [decode(item, tensors) for item in form]
    if not isinstance(form, dict):
        return form
    ((kind, inner),) = form.items()
    if kind == "float":
        return float(inner)
    if kind == "tensor":
        tensor = tensors[inner[0]]
        if len(inner) > 1:
            tensor = torch.empty_strided(tensor.shape, inner[1], dtype=tensor.dtype).copy_(tensor)
        return tensor
    if kind == "dtype":
        return dtype_named(inner)
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(inner, tensors))
    return _MAPPINGS[kind]({decode(key, tensors): decode(item, tensors) for key, item in inner})


def _encode_key(key: Any, name: str) -> Any:
    if key is not None and type(key) not in (bool, int, str, float):
        raise TypeError(
            f"{name} has a key of type {type(key).__qualname__}; a checkpoint holds str, int, bool and float."
        )
    return encode(key, name, {})


def _unused(name: str, tensors: dict[str, Tensor]) -> str:
    """The name, with a count where it is taken: {"a.b": x} and {"a": {"b": x}} have the same one."""
    count, unused = 1, name
    while unused in tensors:
        count += 1
        unused = f"{name}~{count}"
    return unused
