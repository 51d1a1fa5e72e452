"""Weights in the order in which a kernel reads them, made once and kept while the packed weight does not change."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor


class _Kept(NamedTuple):
    packed: "ReferenceType[Tensor]"
    version: int
    address: int  # another one, where share_memory_ has moved the weight since
    entries: dict[Hashable, Any]


# By the id of the packed weight. torch's WeakIdKeyDictionary takes 2 us a look-up, this 0.4.
_kept: dict[int, _Kept] = {}


def arranged(packed: Tensor, key: Hashable, make: Callable[[], Any], *, keep: bool) -> Any:
    """``make()``, which depends on the content of ``packed`` and on ``key`` alone.

    keep: remember it until ``packed`` is written to (its version counter tells) or freed; not while training, where
    every step writes. Tensors made under ``torch.inference_mode`` count no versions, and those that other processes
    share are written unseen: for them nothing is kept.
    """
    if not keep or packed.is_inference():
        return make()
    identity = id(packed)
    found = _kept.get(identity)
    if (
        found is None
        or found.packed() is not packed
        or found.version != packed._version
        or found.address != packed.data_ptr()
    ):
        if packed.is_shared():
            return make()
        found = _Kept(ref(packed, lambda _: _kept.pop(identity, None)), packed._version, packed.data_ptr(), {})
        _kept[identity] = found
    if key not in found.entries:
        found.entries[key] = make()
    return found.entries[key]


def arranged_bytes(packed: Tensor) -> int:
    """Bytes of tensors that are kept for a packed weight now."""
    found = _kept.get(id(packed))
    entries = found.entries.values() if found is not None and found.packed() is packed else ()
    tensors = (t for entry in entries for t in (entry if isinstance(entry, tuple) else (entry,)))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))
