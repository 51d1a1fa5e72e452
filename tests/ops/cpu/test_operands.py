"""What ops on the CPU do with operands that no layer has: kernels read memory as it is, and would read beyond it."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitorch_engine import ops

GEOMETRY = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1, ())
SHAPE, WEIGHT = (2, 8, 5, 5), (16, 8, 3, 3)
AS_FLOATS = (torch.float32, False)
ONE, LOW = torch.tensor(0.1), torch.tensor(-8.0)


def short(count: int, bits: int) -> Tensor:
    return torch.zeros((count * bits + 7) // 8 - 1, dtype=torch.uint8)


def whole(count: int, bits: int) -> Tensor:
    return torch.zeros((count * bits + 7) // 8, dtype=torch.uint8)


CALLS: dict[str, Callable[[], object]] = {
    "unpack": lambda: ops.unpack(short(40, 3), 3, 40),
    "dequantize": lambda: ops.dequantize(short(40, 3), torch.ones(4), 3, 10, torch.float32),
    "linear_weight_only": lambda: ops.linear_weight_only(
        torch.randn(1, 128), short(1024, 4), torch.ones(8), 4, None, 128
    ),
    "linear_weight_only of many rows": lambda: ops.linear_weight_only(
        torch.randn(99, 128), short(1024, 4), torch.ones(8), 4, None, 128
    ),
    "linear_grad_input": lambda: ops.linear_grad_input(torch.randn(2, 8), short(1024, 4), torch.ones(8), 4, 128),
    "activation_values": lambda: ops.activation_values(short(400, 4), ONE, LOW, 4, SHAPE, torch.float32, False),
    "activation_grads": lambda: ops.activation_grads(torch.randn(SHAPE), short(400, 4), whole(400, 1), LOW, 4),
    "activation_grads of the bits beyond": lambda: ops.activation_grads(
        torch.randn(SHAPE), whole(400, 4), short(400, 1), LOW, 4
    ),
    "conv of one row": lambda: ops.conv(
        torch.randn(1, 128), ONE, LOW, 4, short(1024, 4), torch.ones(8), 4, None, (8, 128), (), (), (), False, (), 1, ()
    ),
    **{
        f"conv of {bits} bits": lambda bits=bits: ops.conv(  # type: ignore[misc]
            torch.randn(SHAPE), ONE, LOW, bits, short(1152, bits), torch.ones(16), bits, None, WEIGHT, *GEOMETRY
        )
        for bits in (1, 2, 4)
    },
    **{
        f"conv_codes of {name}": lambda codes=codes, packed=packed: ops.conv_codes(  # type: ignore[misc]
            codes(400, 4),
            SHAPE,
            ONE,
            LOW,
            ONE,
            4,
            packed(1152, 4),
            torch.ones(16),
            4,
            WEIGHT,
            *GEOMETRY,
            torch.float32,
            False,
        )
        for name, codes, packed in (("the weight", whole, short), ("the activation", short, whole))
    },
    "conv_codes of signs": lambda: ops.conv_codes(
        short(400, 1), SHAPE, ONE, LOW, ONE, 1, whole(1152, 1), torch.ones(16), 1, WEIGHT, *GEOMETRY, *AS_FLOATS
    ),
    "depthwise conv": lambda: ops.conv(
        torch.randn(SHAPE), ONE, LOW, 4, short(72, 4), torch.ones(8), 4, None, (8, 1, 3, 3), *GEOMETRY[:5], 8, ()
    ),
    "dequantize to channels last": lambda: ops.dequantize(short(72, 4), torch.ones(8), 4, 9, torch.float32, 9),
    "conv_weight_only": lambda: ops.conv_weight_only(
        torch.randn(SHAPE), short(1152, 4), torch.ones(16), 4, None, WEIGHT, *GEOMETRY
    ),
    "conv_grad_input": lambda: ops.conv_grad_input(
        torch.zeros(2, 5, 5, 16, dtype=torch.int8),
        torch.ones(2, 1, 1, 1),
        short(1152, 4),
        4,
        SHAPE,
        WEIGHT,
        *GEOMETRY,
        torch.float32,
        False,
    ),
    "conv_grad_weight": lambda: ops.conv_grad_weight(
        torch.zeros(2, 5, 5, 16, dtype=torch.int8),
        torch.ones(1, 16, 1, 1),
        short(400, 4),
        ONE,
        LOW,
        4,
        SHAPE,
        WEIGHT,
        *GEOMETRY,
        torch.float32,
    ),
    "conv_grad_weight_float": lambda: ops.conv_grad_weight_float(
        torch.zeros(2, 16, 5, 5), short(400, 4), ONE, LOW, 4, SHAPE, WEIGHT, *GEOMETRY, torch.float32, False
    ),
    "add_": lambda: ops.add_(short(40, 3), whole(40, 5), torch.ones(4), torch.zeros(4, 10), bits=3, key=1),
    "add_ of the residual": lambda: ops.add_(
        whole(40, 3), short(40, 5), torch.ones(4), torch.zeros(4, 10), bits=3, key=1
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_short_one_is_refused(call: Callable[[], object]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"values of \d bits are packed in \d+ bytes, got \d+ bytes"):
        call()


def test_a_step_that_is_refused_changes_nothing() -> None:
    packed = torch.randint(0, 256, (15,), dtype=torch.uint8)
    before = packed.clone()
    with pytest.raises(ValueError, match="packed in"):
        ops.add_(packed, short(40, 5), torch.ones(4), torch.ones(4, 10), bits=3, key=1)
    assert torch.equal(packed, before)


def test_packed_operands_may_have_gaps() -> None:
    packed = torch.randint(0, 256, (1152,), dtype=torch.uint8)
    spread = torch.stack([packed, packed + 1], 1)[:, 0]
    x, row, scale = torch.randn(SHAPE), torch.randn(1, 128), torch.rand(16)
    for bits in (1, 2, 8):
        count = 1152 * bits // 8
        arguments = (scale, bits, None, WEIGHT, *GEOMETRY)
        results = [ops.conv(x, ONE, LOW, bits, p[:count], *arguments) for p in (packed, spread)]
        assert torch.equal(*results)
    assert torch.equal(*(ops.linear_weight_only(row, p[:1024], scale, 4, None, 128) for p in (packed, spread)))
    assert torch.equal(*(ops.dequantize(p, scale, 8, 72, torch.float32) for p in (packed, spread)))
    assert torch.equal(*(ops.dequantize(p, scale, 8, 72, torch.float32, 9) for p in (packed, spread)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scales_of_another_dtype_are_read_as_such(dtype: torch.dtype) -> None:
    codes, scale, one = torch.randint(0, 256, (400,), dtype=torch.uint8), torch.rand(16).to(dtype), ONE.to(dtype)
    wide = scale.float()
    found = ops.dequantize(codes[:160], scale, 8, 10, torch.float32)
    torch.testing.assert_close(found, ops.dequantize(codes[:160], wide, 8, 10, torch.float32), rtol=0.01, atol=0)
    found = ops.activation_values(codes, one, LOW, 8, SHAPE, torch.float32, False)
    torch.testing.assert_close(
        found, ops.activation_values(codes, one.float(), LOW, 8, SHAPE, torch.float32, False), rtol=0.01, atol=0
    )
    x = torch.randn(SHAPE)
    for bits in (1, 2, 8):
        packed = torch.randint(0, 256, (1152 * bits // 8,), dtype=torch.uint8)
        low = torch.tensor(float(-(1 << bits - 1)))
        arguments = (bits, None, WEIGHT, *GEOMETRY)
        found = ops.conv(x, ONE, low, bits, packed, scale, *arguments)
        wanted = ops.conv(x, ONE, low, bits, packed, wide, *arguments)
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    x, grad = torch.randn(2, 40, 6, 6), torch.randn(2, 40, 6, 6)
    wanted = ops.conv_grad_weight_dense(grad, x, (40, 40, 3, 3), *GEOMETRY)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(ops.conv_grad_weight_dense(grad, x, (40, 40, 3, 3), *GEOMETRY), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(2, 64, 7, 7), (64, 64, 3, 3)
    for grad, image in ((torch.randn(2, 64, 9, 9), x), (torch.randn(2, 64, 7, 7), torch.randn(2, 80, 7, 7))):
        with pytest.raises(RuntimeError):
            ops.conv_grad_weight_dense(grad, image, weight, *GEOMETRY)
    with pytest.raises(RuntimeError):
        ops.linear_weight_only(torch.randn(2, 128), whole(16 * 256, 4), torch.ones(16), 4, None, 256)
    with pytest.raises(RuntimeError):
        ops.dequantize(whole(16 * 256, 4), torch.ones(16), 4, 256, torch.float32, 3)
    with pytest.raises(ValueError, match="channel_scale must be"):
        ops.linear_weight_only(torch.randn(2, 128), whole(16 * 128, 4), torch.ones(16), 4, None, 128, 32)


def test_torch_s_newer_way_to_set_the_precision_is_understood() -> None:
    code = """
import torch
from bitorch_engine import nBitLinear
layer, x = nBitLinear(256, 16, w_bit=4), torch.randn(1, 256)
with torch.no_grad():
    wanted = layer(x)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    found = layer(x)
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
