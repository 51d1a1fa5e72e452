"""What Triton's interpreter, which runs the kernels on CPU tensors, needs to be right."""

from typing import Any

import torch
import triton
from triton.runtime import interpreter


def repair() -> None:
    """Let a loop of a kernel run to a bound that is not constant, with NumPy 2.4 and later.

    Triton 3.6 makes an int of the bound, an array of one element, and NumPy no longer does that. Without
    TRITON_INTERPRET=1 this does nothing.
    """
    original = interpreter._patch_lang_tensor
    if triton.knobs.runtime.interpret and original.__name__ != "_patched":

        def _patched(tensor: Any, scope: Any) -> None:
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = _patched


def widens(dtype: torch.dtype) -> bool:
    """Whether operands of a matrix product are to be made float32: Triton 3.6 interprets bfloat16 as integers there."""
    return dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
