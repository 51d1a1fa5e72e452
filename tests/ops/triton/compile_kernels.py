"""Compile every kernel for a GPU on a computer that has none: what would be launched is compiled, and does not run.

It finds what the interpreter lets pass: code that only Python can run, tiles that no layout fits, arguments that a
kernel is compiled anew for. A program of its own, since Triton decides when it is loaded whether it interprets. Prints
one line of JSON: for each launch, "part" (what was called), "kernel", "number" (the same where nothing was compiled
anew), and facts of the machine code.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bitorch_engine import ops
from bitorch_engine.ops.triton import activation, bits, grad_weight, gradient, linear, quantized_conv, update


class _Hopper:
    """As much of a GPU as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


launches: list[tuple[str, str, Any]] = []
_part = ""
_run = JITFunction.run


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    launches.append((_part, self.__name__.lstrip("_"), kernel))
    return kernel


def main() -> None:
    global _part
    triton.runtime.driver.set_active(_Hopper())
    JITFunction.run = _compile_only
    launch_all()
    for _part, call in products():
        call()
    numbers = {id(kernel): number for number, (_, _, kernel) in enumerate(launches)}
    facts = [
        {"part": part, "kernel": name, "number": numbers[id(kernel)], **facts_of(kernel)}
        for part, name, kernel in launches
    ]
    sys.stdout.write(json.dumps(facts))


def facts_of(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    return {
        "fused": ".f32" in ptx and "fma.rn.f32" in ptx,
        "flushes": ".ftz" in ptx,
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*\.(\w+\.\w+\.\w+)\s", ptx))),
        "fetches asynchronously": "cp.async.c" in ptx,
        "loads single bytes": bool(re.search(r"ld\.global\S*\.[bsu]8", ptx)),
        "stack": stack_of(kernel),
    }


def stack_of(kernel: Any) -> int:
    """Bytes of local memory of a thread, where spilled registers go."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


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
    update.mean_squares(x.float().flatten(1), 1.0)
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


def products() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(part, call) for each way through the convolutions and linear layers, at sizes that take whole tiles."""
    one, zero, low = torch.ones(()), torch.zeros(()), torch.tensor(-128.0)

    def square(stride: int = 1, groups: int = 1) -> tuple[Any, ...]:
        return ([stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [])

    def packed(*shape: int, width: int = 4) -> torch.Tensor:
        return torch.zeros(torch.Size(shape).numel() * width // 8, dtype=torch.uint8)

    def conv(channels: int, w: list[int], groups: int = 1) -> None:
        x = torch.zeros(8, channels, 24, 24, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        head = (x, one, low, 8, packed(*w), torch.ones(w[0]), 4, torch.zeros(w[0]))
        quantized_conv.conv(*head, w, *square(2 if channels == 3 else 1, groups))

    def pointwise() -> None:
        x = torch.zeros(8, 128, 24, 24, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        head = (x, one, low, 8, packed(128, 128), torch.ones(128), 4, torch.zeros(128))
        quantized_conv.conv(*head, [128, 128, 1, 1], [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [])

    def conv_codes() -> None:
        shape, w = [8, 64, 24, 24], [64, 64, 3, 3]
        head = (packed(*shape, width=8), shape, one, low, zero, 8, packed(*w), torch.ones(64), 4)
        quantized_conv.conv_codes(*head, w, *square(), torch.bfloat16, True)

    def grad_input() -> None:
        head = (torch.zeros(8, 12, 12, 64, dtype=torch.int8), torch.ones(8, 1, 1, 1), packed(64, 64, 3, 3), 4)
        quantized_conv.conv_grad_input(*head, [8, 64, 23, 23], [64, 64, 3, 3], *square(2), torch.bfloat16, True)

    def of_weight(channels: int, groups: int = 1) -> None:
        shape = [8, channels, 23, 23]
        head = (torch.zeros(8, 12, 12, 64, dtype=torch.int8), torch.ones(1, 64, 1, 1), packed(*shape, width=8))
        rest = ([64, channels // groups, 3, 3], *square(2, groups), torch.float32)
        grad_weight.conv_grad_weight(*head, one, low, 8, shape, *rest)

    def weight_only(count: int, width: int = 4, group: int = 0) -> None:
        x, scale = torch.zeros(count, 256, dtype=torch.bfloat16), torch.ones(256, 256 // group if group else 1)
        scale = scale if group else scale.view(-1)
        linear.linear_weight_only(x, packed(256, 256, width=width), scale, width, None, 256, group)

    yield "conv", lambda: conv(64, [64, 64, 3, 3])
    yield "conv of few channels", lambda: conv(3, [64, 3, 7, 7])
    yield "conv of odd channels", lambda: conv(42, [64, 42, 3, 3])
    yield "conv of one tap", pointwise
    yield "conv of codes", conv_codes
    yield "depthwise", lambda: conv(64, [64, 1, 3, 3], 64)
    yield "grad input", grad_input
    yield "grad weight", lambda: of_weight(64)
    yield "grad weight of few channels", lambda: of_weight(3)
    yield "grad weight, depthwise", lambda: of_weight(64, 64)
    yield "row", lambda: weight_only(1)
    yield "row of 3 bits", lambda: weight_only(1, 3)
    yield "linear", lambda: weight_only(512)
    yield "linear in groups", lambda: weight_only(512, group=128)


if __name__ == "__main__":
    main()
