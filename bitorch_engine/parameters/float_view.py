"""What a view of a packed weight gives: its float values, read-only."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class FloatView(Tensor):
    """What a view of a packed weight gives where no gradient is recorded: its float values, which cannot be written to.

    A write would be lost, since the values are a copy; so it raises. Collectives may write (DistributedDataParallel
    sends such copies around, and writes back what it received).
    """

    dense: Tensor

    def __new__(cls, values: Tensor) -> "FloatView":
        self: FloatView = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=values.device
        )
        self.dense = values
        return self

    def __init__(self, values: Tensor) -> None:
        """All is done in ``__new__``."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense)

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense.numpy(force=force)

    def tolist(self) -> Any:
        return self.dense.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = [a for a, spec in zip(args, func._schema.arguments, strict=False) if is_written(spec)]
        written.append((kwargs or {}).get("out"))
        if func.namespace != "c10d" and any(isinstance(a, cls) for a in written):
            raise NotImplementedError(
                "a view of a packed weight cannot be written to: write the whole weight (copy_, or quantize_ for a new "
                "scale), or initialize a float tensor and pass it to quantize_."
            )
        args, kwargs = tree_map(lambda leaf: leaf.dense if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        result = func(*args, **kwargs)
        is_view = not func._schema.is_mutable and any(returned.alias_info for returned in func._schema.returns)
        return tree_map(lambda out: cls(out) if type(out) is Tensor else out, result) if is_view else result


def is_written(argument: Any) -> bool:
    """Whether an operator writes to this argument, by its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write
