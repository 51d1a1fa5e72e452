"""The weight's gradient equals the one in float64 on every instruction set: in integers bit for bit after the scale,
and of a float gradient as near as float32 sums are."""

import random
from typing import Any

import pytest
import torch

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import grad_weight
from bitorch_engine.ops.reference import quantized_conv as reference

ISAS = pytest.mark.parametrize("isa", cpu.available_isas())


def problem(seed: int) -> tuple[Any, ...]:
    """Arguments of conv_grad_weight for a random geometry."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    rank, groups = dice.choice([0, 1, 2, 2, 2, 3]), dice.choice([1, 1, 2, 3])
    transposed = rank > 0 and dice.random() < 0.3
    narrow = seed % 4 == 3  # groups of few channels
    groups = dice.choice([5, 19, 33, 64]) if narrow else groups
    c_in, c_out = groups * dice.choice([1, 4, 5, 16, 65]), groups * dice.choice([1, 4, 17, 100])
    if narrow:
        c_in, c_out = groups * dice.choice([1, 1, 2]), groups * dice.choice([1, 1, 3])
    kernel, stride, dilation = ([dice.randint(1, 3) for _ in range(rank)] for _ in range(3))
    padding = [dice.randint(0, 2) for _ in range(rank)]
    spatial = [dice.randint(7, 9) for _ in range(rank)]
    extra = [dice.randint(0, max(s, d) - 1) if transposed else 0 for s, d in zip(stride, dilation, strict=True)]
    pad = [] if transposed or dice.random() < 0.7 else [dice.randint(0, 2) for _ in range(2 * rank)]
    groups = groups if rank else 1
    weight = (c_in, c_out // groups, *kernel) if transposed else (c_out, c_in // groups, *kernel)
    bits = dice.randint(1, 8)
    low = -1.0 if bits == 1 else dice.choice([0.0, -(2.0 ** (bits - 1))])
    shape = (dice.choice([1, 2, 70]), c_in, *spatial) if rank < 3 else (2, c_in, *spatial)
    geometry = (stride, padding, dilation, transposed, extra, groups, pad)
    x = torch.randn(shape)
    codes, _, _ = ops.quantize_activation(x, torch.tensor(0.1), torch.tensor(low), bits)
    out = ops.Convolution(*geometry).output_shape(shape, weight)
    grad = torch.randint(-127, 128, (out[0], *out[2:], out[1]), dtype=torch.int8)
    scale = torch.rand(1, out[1], *[1] * rank)
    return grad, scale, codes, torch.tensor(0.1), torch.tensor(low), bits, shape, weight, *geometry, torch.float32


@ISAS
@pytest.mark.parametrize("seed", range(40))
def test_it_equals_the_reference(isa: str, seed: int) -> None:
    arguments = problem(seed)
    with cpu.cap_isa(isa):
        found = ops.conv_grad_weight(*arguments)
    assert torch.equal(found, reference.conv_grad_weight(*arguments))


@ISAS
@pytest.mark.parametrize("size", [150, 300])
@pytest.mark.parametrize("groups", [1, 4])
def test_sums_beyond_32_bits(isa: str, size: int, groups: int) -> None:
    shape, weight = (2, 4, size, size), (4, 4 // groups, 1, 1)
    codes = ops.pack(torch.full((2 * 4 * size * size,), 255, dtype=torch.uint8), 8)
    grad = torch.full((2, size, size, 4), -127, dtype=torch.int8)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], groups, [])
    one = torch.tensor(1.0)
    with cpu.cap_isa(isa):
        arguments = (grad, torch.ones(1, 4, 1, 1), codes, one, torch.tensor(0.0), 8, shape, weight, *geometry)
        found = ops.conv_grad_weight(*arguments, torch.float32)
    assert found.tolist() == torch.full(weight, float(-127 * 255 * 2 * size * size)).tolist()


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    arguments = problem(3)
    before, wanted = torch.get_num_threads(), reference.conv_grad_weight(*arguments)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.conv_grad_weight(*arguments), wanted)
    finally:
        torch.set_num_threads(before)


def float_problem(seed: int) -> tuple[Any, ...]:
    """Arguments of conv_grad_weight_float, half of the time for one group that is not transposed."""
    _, _, *rest, dtype = problem(seed)
    bits, shape, weight, stride, padding, dilation, transposed, extra, groups, pad = rest[3:]
    if seed % 2 and stride:
        transposed, groups, extra = False, 1, [0] * len(stride)
        weight = (random.Random(seed).choice([1, 33, 50]), shape[1], *weight[2:])
    geometry = (stride, padding, dilation, transposed, extra, groups, pad)
    grad = torch.randn(ops.Convolution(*geometry).output_shape(shape, weight))
    if grad.dim() == 4 and seed % 3:
        grad = grad.contiguous(memory_format=torch.channels_last)
    return grad, *rest[:3], bits, shape, weight, *geometry, dtype, seed % 4 == 1


@ISAS
@pytest.mark.parametrize("seed", range(60))
def test_of_a_float_gradient(isa: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_weight, "_FEWEST_CHANNELS", 1)
    grad, codes, scale, low, bits, shape, weight, *geometry, dtype, channels_last = float_problem(seed)
    values = ops.activation_values(codes, scale, low, bits, shape, torch.float32, channels_last)
    with cpu.cap_isa(isa):
        found = (
            ops.conv_grad_weight_float(grad, codes, scale, low, bits, shape, weight, *geometry, dtype, channels_last),
            ops.conv_grad_weight_dense(grad, values, weight, *geometry),
        )
    convolution = ops.Convolution(*geometry)
    wanted = convolution.grad_weight(grad.double(), values.double(), weight)
    sizes = convolution.grad_weight(grad.double().abs(), values.double().abs(), weight)  # what rounding is relative to
    for gradient in found:
        assert gradient.dtype is dtype and gradient.is_contiguous() and gradient.shape == weight
        assert bool(((gradient - wanted).abs() <= 2e-6 * sizes).all())


def test_a_float_gradient_that_is_not_finite_reaches_the_weights_that_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_weight, "_FEWEST_CHANNELS", 1)
    grad = torch.zeros(1, 3, 4, 4)
    grad[0, 1, 0, 0], grad[0, 2, 3, 3] = float("nan"), float("inf")
    codes = ops.pack(torch.ones(2 * 16, dtype=torch.uint8), 8)
    one = torch.tensor(1.0)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [])
    found = ops.conv_grad_weight_float(
        grad, codes, one, torch.tensor(0.0), 8, (1, 2, 4, 4), (3, 2, 3, 3), *geometry, torch.float32, False
    )
    assert bool((found[0] == 0).all())
    assert bool(found[1, :, 1, 1].isnan().all())
    assert bool((found[2, :, 1, 1] == float("inf")).all())


def test_the_ops_pass_opcheck() -> None:
    grad, codes, *rest = float_problem(5)
    x = torch.randn(rest[3])
    for name, arguments in {
        "conv_grad_weight": problem(5),
        "conv_grad_weight_float": (grad, codes, *rest),
        "conv_grad_weight_dense": (grad, x, *rest[4:-2]),
    }.items():
        torch.library.opcheck(getattr(torch.ops.bitorch_engine, name).default, arguments)
