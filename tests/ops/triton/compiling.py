"""Compile for a GPU on a computer that has none: what would be launched is compiled, and does not run.

It finds what the interpreter lets pass: code that only Python can run, tiles that no layout fits, what a kernel is
compiled anew for. Triton decides when it loads whether it interprets, so this is for a process of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Driver:
    """As much of a GPU as compiling needs: a Hopper."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled() -> Iterator[list[tuple[str, Any]]]:
    """Within this every launch, with CPU tensors, adds (name of the kernel, what it is compiled to) to the list.

    What has been compiled before is the same object.
    """
    found: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
