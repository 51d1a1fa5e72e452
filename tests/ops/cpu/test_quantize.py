"""Quantized activations and gradients: every instruction set gives what the reference gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.reference import activation, gradient
from bitorch_engine.ops.reference import bits as reference_bits

ISAS = pytest.mark.parametrize("isa", cpu.available_isas())
SHAPES = [(1, 1), (5, 37), (3, 64, 1), (2, 3, 7, 5), (1, 16, 4, 4), (2, 17, 9, 9), (1, 64, 300), (2, 33, 3, 4, 5)]
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 1e38, -1e38]


def values(shape: tuple[int, ...], dtype: torch.dtype, last: bool, odd: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if odd:
        flat = x.view(-1)
        flat[: len(ODD)] = torch.tensor(ODD)[: flat.numel()]
    x = x.to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def same(found: Any, wanted: Any) -> bool:
    return torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)) and found.dtype == wanted.dtype


@ISAS
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("odd", [False, True], ids=["finite", "odd"])
def test_quantize_activation(isa: str, bits: int, odd: bool) -> None:
    lows = [-1.0] if bits == 1 else [0.0, -(2.0 ** (bits - 1))]
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for last in (False, True):
                x, low, scale = values(shape, dtype, last, odd), torch.tensor(lows[-1]), torch.tensor(0.13)
                with cpu.cap_isa(isa):
                    found = ops.quantize_activation(x, scale, low, bits)
                wanted = activation.quantize_activation(x, scale, low, bits)
                assert all(same(a, b) for a, b in zip(found, wanted, strict=True)), (shape, dtype, last)


@ISAS
@pytest.mark.parametrize("bits", range(1, 9))
def test_values_and_grads_of_activations(isa: str, bits: int) -> None:
    for shape in SHAPES:
        for last in (False, True):
            x, low, scale = values(shape, torch.float32, last), torch.tensor(-1.0), torch.tensor(0.13)
            codes, beyond, _ = activation.quantize_activation(x, scale, low, bits)
            grad = values(shape, torch.float32, last).flip(0) if not last else x.clone()
            with cpu.cap_isa(isa):
                found = ops.activation_values(codes, scale, low, bits, shape, torch.float32, last)
                grad_x, grad_scale = ops.activation_grads(grad, codes, beyond, low, bits)
            assert torch.equal(found, activation.activation_values(codes, scale, low, bits, shape, torch.float32, last))
            wanted_x, _ = activation.activation_grads(grad, codes, beyond, low, bits)
            _, exact = activation.activation_grads(grad.double(), codes, beyond, low, bits)
            assert torch.equal(grad_x, wanted_x) and grad_x.stride() == wanted_x.stride()
            terms = float(grad.double().abs().sum()) * 2**bits
            assert abs(float(grad_scale) - float(exact)) <= 1e-6 * terms


@ISAS
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("keep", [0, 1], ids=["a scale a sample", "a scale a channel"])
def test_quantize_gradient(isa: str, bits: int, keep: int) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for last in (False, True):
                grad, seed = values(shape, dtype, last), torch.tensor(-77, dtype=torch.int32)
                for factor in (None, torch.rand(shape[1]) + 0.1):
                    with cpu.cap_isa(isa):
                        codes, scale = ops.quantize_gradient(grad, factor, bits, keep, seed)
                    wanted_codes, wanted_scale = gradient.quantize_gradient(grad, factor, bits, keep, seed)
                    assert torch.equal(codes, wanted_codes) and torch.equal(scale, wanted_scale), (shape, last)


@ISAS
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize(isa: str, bits: int) -> None:
    for rows, columns, taps in [(1, 1, 1), (3, 7, 7), (5, 64, 1), (2, 5000, 1), (3, 324, 9), (2, 450, 25), (4, 51, 3)]:
        index = torch.randint(0, 1 << bits, (rows * columns,), dtype=torch.uint8)
        packed, scale = ops.pack(index, bits), torch.rand(rows)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with cpu.cap_isa(isa):
                found = ops.dequantize(packed, scale, bits, columns, dtype, taps)
            wanted = reference_bits.dequantize(packed, scale, bits, columns, dtype)
            assert torch.equal(found, wanted.view(rows, -1, taps).movedim(1, 2).flatten(1))


def test_the_ops_pass_opcheck() -> None:
    x, scale, low = torch.randn(2, 3, 4, 4), torch.tensor(0.1), torch.tensor(-8.0)
    codes, beyond, _ = ops.quantize_activation(x, scale, low, 4)
    seed = torch.tensor(1, dtype=torch.int32)
    packed = ops.pack(torch.zeros(12, dtype=torch.uint8), 4)
    for name, arguments in {
        "quantize_activation": (x, scale, low, 4),
        "activation_values": (codes, scale, low, 4, [2, 3, 4, 4], torch.float32, False),
        "activation_grads": (x, codes, beyond, low, 4),
        "quantize_gradient": (x, None, 8, 0, seed),
        "dequantize": (packed, torch.rand(3), 4, 4, torch.float32),
        "pack": (torch.zeros(9, dtype=torch.uint8), 3),
    }.items():
        torch.library.opcheck(getattr(torch.ops.bitorch_engine, name).default, arguments)


@pytest.mark.parametrize("last", [False, True])
def test_parts_of_a_larger_tensor(last: bool) -> None:
    x, scale, low = values((4, 40, 5, 7), torch.float32, last)[::2, 3:36, 1:], torch.tensor(0.1), torch.tensor(-8.0)
    seed = torch.tensor(3, dtype=torch.int32)
    codes, beyond, _ = ops.quantize_activation(x, scale, low, 4)
    wanted = activation.quantize_activation(x, scale, low, 4)
    assert torch.equal(codes, wanted[0]) and torch.equal(beyond, wanted[1])
    rounded, wanted_rounded = (o.quantize_gradient(x, None, 8, 1, seed)[0] for o in (ops, gradient))
    assert torch.equal(rounded, wanted_rounded)
    grad, wanted_grad = (o.activation_grads(x, codes, beyond, low, 4)[0] for o in (ops, activation))
    assert torch.equal(grad, wanted_grad) and grad.stride() == wanted_grad.stride()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    x, seed = torch.randn(4, 32, 40, 40), torch.tensor(5, dtype=torch.int32)
    scale, low, before = torch.tensor(0.05), torch.tensor(-8.0), torch.get_num_threads()
    wanted = activation.quantize_activation(x, scale, low, 4)
    torch.set_num_threads(threads)
    try:
        found = ops.quantize_activation(x, scale, low, 4)
        codes, _ = ops.quantize_gradient(x, None, 8, 1, seed)
        _, scale_grad = ops.activation_grads(x, *found[:2], low, 4)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(codes, gradient.quantize_gradient(x, None, 8, 1, seed)[0])
    torch.set_num_threads(1)
    try:
        assert torch.equal(scale_grad, ops.activation_grads(x, *found[:2], low, 4)[1])
    finally:
        torch.set_num_threads(before)
