"""Weights in the order in which a kernel reads them, made once and kept while the packed weight does not change."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_kept: Any = WeakIdKeyDictionary()


def arranged(packed: Tensor, key: Hashable, make: Callable[[], Any], *, keep: bool) -> Any:
    """``make()``, which depends on the content of ``packed`` and on ``key`` alone.

    keep: remember it until ``packed`` is written to (its version counter tells) or freed; not while training, where
    every step writes. Tensors made under ``torch.inference_mode`` count no versions, and those that other processes
    share are written unseen: for them nothing is kept.
    """
    if not keep or packed.is_inference() or packed.is_shared():
        return make()
    version, entries = _kept.get(packed, (None, None))
    if version != packed._version:
        version, entries = packed._version, {}
        _kept[packed] = (version, entries)
    if key not in entries:
        entries[key] = make()
    return entries[key]


def arranged_bytes(packed: Tensor) -> int:
    """Bytes of tensors that are kept for a packed weight now."""
    _, entries = _kept.get(packed, (None, {}))
    return sum(t.nbytes for t in entries.values() if isinstance(t, torch.Tensor))
