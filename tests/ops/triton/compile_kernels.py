"""Compile every kernel for a GPU on a computer that has none: what would be launched is compiled, and does not run.

It finds what the interpreter lets pass: code that only Python can run, tiles that no layout fits, arguments that a
kernel is compiled anew for. A program of its own, since Triton decides when it is loaded whether it interprets. Prints
one line of JSON: for each launch, "kernel", "number" (the same where nothing was compiled anew), "ptx" facts.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bitorch_engine import ops
from bitorch_engine.ops.triton import activation, bits, gradient, update


class _Hopper:
    """As much of a GPU as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


launches: list[tuple[str, Any]] = []
_run = JITFunction.run


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    launches.append((self.__name__.lstrip("_"), kernel))
    return kernel


def main() -> None:
    triton.runtime.driver.set_active(_Hopper())
    JITFunction.run = _compile_only
    launch_all()
    numbers = {id(kernel): number for number, (_, kernel) in enumerate(launches)}
    facts = [
        {
            "kernel": name,
            "number": numbers[id(kernel)],
            "fused": ".f32" in kernel.asm["ptx"] and "fma.rn.f32" in kernel.asm["ptx"],
            "flushes": ".ftz" in kernel.asm["ptx"],
        }
        for name, kernel in launches
    ]
    sys.stdout.write(json.dumps(facts))


def launch_all() -> None:
    """A call of every function, at the least size that takes each path."""
    values = torch.zeros(4096, dtype=torch.uint8)
    packed = bits.pack(values, 3)
    bits.unpack(packed, 3, 4096)
    bits.dequantize(packed, torch.rand(4), 3, 1024, torch.bfloat16)

    scale, low, seed = torch.tensor(0.1), torch.tensor(0.0), torch.tensor(1, dtype=torch.int32)
    x = torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)
    codes, beyond, _ = activation.quantize_activation(x, scale, low, 4)
    activation.activation_values(codes, scale, low, 4, x.shape, torch.bfloat16, True)
    activation.activation_grads(x, codes, beyond, low, 4)
    for keep in (0, 1):
        gradient.quantize_gradient(x, torch.rand(16), 8, keep, seed)

    update.all_within(x.float(), 1e18)
    for width, shape, first, second in (
        (4, (16, 1024), torch.uint8, torch.uint8),
        (3, (9, 147), torch.bfloat16, torch.float16),
        (1, (8, 64), None, torch.float32),
    ):
        weight = [torch.zeros(shape[0] * shape[1] * size // 8 + 1, dtype=torch.uint8) for size in (width, 8 - width)]
        m, v = (dtype and ops.new_moment(shape, dtype, x.device) for dtype in (first, second))
        v = torch.zeros(shape[0]) if first is None else v  # one second moment a row
        for step in (1, 2):
            update.update_(
                *weight, torch.rand(shape[0]), torch.randn(shape), v, m, bits=width, lr=0.1 / step, beta1=0.9,
                beta2=0.99, eps=1e-8, correction1=0.1 * step, correction2=0.01 * step, grad_factor=1.0,
                dtype=torch.float32, key=16 * step,
            )  # fmt: skip


if __name__ == "__main__":
    main()
