"""The kernels compile for an H100, also where no GPU is: to the instructions they are meant for, without spills.

Run as a program, without the interpreter, this file calls the ops on CPU tensors, and compiles each kernel that they
launch with the arguments that it would have had.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
INT8 = r"wgmma\.mma_async\S*\.s32\.s8\.s8"

# What runs, and the instruction that the kernel named must have.
LAUNCHES = {
    "conv": ("_convolve", INT8),
    "conv-of-few-channels": ("_convolve", INT8),
    "conv-of-odd-channels": ("_convolve", INT8),
    "conv-from-codes": ("_convolve", INT8),
    "conv-from-floats": ("_quantize", "cvt"),
    "grad-input": ("_convolve", INT8),
    "grad-weight": ("_sum_products", INT8),
    "grad-weight-of-few-channels": ("_sum_products", INT8),
    "grad-weight-depthwise": ("_sum_directly", r"atom|red"),
    "linear-of-one-row": ("_multiply_row", r"fma\.rn"),
    "linear-of-one-row-3-bits": ("_multiply_row", r"fma\.rn"),
    "linear": ("_multiply", r"wgmma\.mma_async\S*\.f32\.bf16\.bf16"),
    "linear-in-groups": ("_multiply", r"wgmma\.mma_async\S*\.f32\.bf16\.bf16"),
    "depthwise": ("_convolve_directly", r"mad\.lo"),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """By name of the launch: the kernels, each with its instructions, and the bytes of its stack."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", LAUNCHES)
def test_it_compiles_to_its_instruction_and_does_not_spill(name: str, compiled: dict[str, Any]) -> None:
    kernel, instruction = LAUNCHES[name]
    assert [found["kernel"] for found in compiled[name] if found["stack"]] == []
    assert any(re.search(instruction, found["ptx"]) for found in compiled[name] if found["kernel"] == kernel)


@pytest.mark.parametrize("name", ["conv", "conv-of-few-channels", "conv-from-codes", "grad-input"])
def test_tiles_are_fetched_in_words_and_asynchronously(name: str, compiled: dict[str, Any]) -> None:
    kernels = [found["ptx"] for found in compiled[name] if found["kernel"] == "_convolve"]
    assert kernels
    assert all("cp.async" in ptx and "ld.global.b8" not in ptx for ptx in kernels)


def launches() -> Iterator[tuple[str, Any]]:
    """(name, what to call) for each of LAUNCHES."""
    from bitorch_engine.ops.triton import grad_weight as weight
    from bitorch_engine.ops.triton import linear as products
    from bitorch_engine.ops.triton import quantized_conv as kernels

    def square(stride: int = 1, groups: int = 1) -> tuple[Any, ...]:
        return ([stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [])

    def packed(*shape: int) -> torch.Tensor:
        return torch.zeros(torch.Size(shape).numel() // 2, dtype=torch.uint8)

    def conv(channels: int, w: list[int], groups: int = 1, **more: Any) -> None:
        x = torch.zeros(8, channels, 24, 24, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        head = (x, one, low, 8, packed(*w), torch.ones(w[0]), 4, torch.zeros(w[0]))
        kernels.conv(*head, w, *square(2 if channels == 3 else 1, groups))

    def from_codes() -> None:
        shape, w = [8, 64, 24, 24], [64, 64, 3, 3]
        codes = torch.zeros(torch.Size(shape).numel(), dtype=torch.uint8)
        head = (codes, shape, one, low, zero, 8, packed(*w), torch.ones(64), 4)
        kernels.conv_codes(*head, w, *square(), torch.bfloat16, True)

    def grad_input() -> None:
        codes = torch.zeros(8, 12, 12, 64, dtype=torch.int8)
        head = (codes, torch.ones(8, 1, 1, 1), packed(64, 64, 3, 3), 4, [8, 64, 23, 23])
        kernels.conv_grad_input(*head, [64, 64, 3, 3], *square(2), torch.bfloat16, True)

    def grad_weight(channels: int, groups: int = 1) -> None:
        codes = torch.zeros(8 * channels * 23 * 23, dtype=torch.uint8)
        gradients = torch.zeros(8, 12, 12, 64, dtype=torch.int8)
        head = (gradients, torch.ones(1, 64, 1, 1), codes, one, low, 8, [8, channels, 23, 23])
        weight.conv_grad_weight(*head, [64, channels // groups, 3, 3], *square(2, groups), torch.float32)

    def linear(count: int, bits: int = 4, group: int = 0) -> None:
        x, scale = torch.zeros(count, 256, dtype=torch.bfloat16), torch.ones(256, 256 // group if group else 1)
        codes = torch.zeros(256 * 256 * bits // 8, dtype=torch.uint8)
        products.linear_weight_only(x, codes, scale if group else scale.view(-1), bits, None, 256, group)

    one, zero, low = torch.ones(()), torch.zeros(()), torch.tensor(-128.0)
    yield "conv", lambda: conv(64, [64, 64, 3, 3])
    yield "conv-of-few-channels", lambda: conv(3, [64, 3, 7, 7])
    yield "conv-of-odd-channels", lambda: conv(42, [64, 42, 3, 3])
    yield "conv-from-codes", from_codes
    yield "conv-from-floats", lambda: conv(64, [64, 64, 3, 3])
    yield "grad-input", grad_input
    yield "grad-weight", lambda: grad_weight(64)
    yield "grad-weight-of-few-channels", lambda: grad_weight(3)
    yield "grad-weight-depthwise", lambda: grad_weight(64, 64)
    yield "linear-of-one-row", lambda: linear(1)
    yield "linear-of-one-row-3-bits", lambda: linear(1, 3)
    yield "linear", lambda: linear(512)
    yield "linear-in-groups", lambda: linear(512, group=128)
    yield "depthwise", lambda: conv(64, [64, 1, 3, 3], 64)


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Compile what a launch with these arguments would run, specialized to them as Triton does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for at, p in enumerate(kernel.params):
        value = values.get(p.name, p.default)
        specialized = isinstance(value, int) and not p.do_not_specialize
        if p.is_constexpr or value is None or (specialized and value == 1):
            signature[p.name], constants[(at,)] = "constexpr", value
            continue
        signature[p.name] = type_of(value)
        if isinstance(value, torch.Tensor) or (specialized and value % 16 == 0):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"kernel": kernel.__name__, "ptx": done.asm["ptx"], "stack": stack(done)}


def type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(type_of(part) for part in value)
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return "*" + name.replace("uint", "u").replace("bfloat", "bf").replace("float", "fp").replace("int", "i")
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 1 << 31 else "i32"


def stack(compiled: Any) -> int:
    """Bytes of local memory a thread."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def main() -> None:
    from triton.runtime import JITFunction

    found: dict[str, list[dict[str, Any]]] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[name].append(compile_launch(self, args, kwargs))

    JITFunction.run = run
    for name, call in launches():
        found[name] = []
        call()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
