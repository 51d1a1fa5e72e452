"""A step by the GPU's kernel gives the bits of the reference on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops.reference import update as reference
from bitorch_engine.ops.triton import update as kernels

CPU = torch.device("cpu")
STORED = {
    "none": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "8bit": torch.uint8,
}
PAIRS = [
    ("8bit", "8bit"),
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("fp32", "fp32"),
    ("none", "none"),
    ("8bit", "channel"),
    ("none", "8bit"),
    ("fp32", "none"),
    ("none", "channel"),
    ("bf16", "8bit"),
]
"""First and second moment."""
SHAPES = [(1, 1), (3, 5), (4, 128), (7, 147), (40, 27), (300, 1), (16, 128)]
"""Rows and columns: no multiples of 8 or 128, several rows in a block, several blocks in a row, all of a program."""


class State:
    """A weight of random levels, and its moments."""

    def __init__(self, bits: int, shape: tuple[int, int], first: str, second: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(bits + 10 * shape[0] + 10_000 * shape[1])
        hidden, count = 8 - bits, shape[0] * shape[1]
        self.bits = bits
        levels = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        self.packed = ops.pack(levels >> hidden, bits).to(device)
        low = levels & ((1 << hidden) - 1)
        self.residual = (ops.pack(low, hidden) if hidden else low.new_empty(0)).to(device)
        self.scale = (torch.rand(shape[0], generator=generator) + 0.05).to(device)
        self.m = None if STORED[first] is None else ops.new_moment(shape, STORED[first], device)
        if second == "channel":
            self.v: Tensor | None = (torch.rand(shape[0], generator=generator) ** 8).to(device)
        else:
            self.v = None if STORED[second] is None else ops.new_moment(shape, STORED[second], device)

    def step(self, function: Any, grad: Tensor, t: int, **changed: Any) -> None:
        settings = {
            "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "correction1": 1 - 0.9**t,
            "correction2": 1 - 0.99**t, "grad_factor": 1.0, "dtype": torch.float32, "key": 77 + t,
        }  # fmt: skip
        settings |= changed
        grad = grad.to(self.packed.device)
        function(self.packed, self.residual, self.scale, grad, self.v, self.m, bits=self.bits, **settings)

    def held(self) -> list[Tensor]:
        kept = (self.packed, self.residual, self.scale, self.v, self.m)
        return [t.detach().cpu().contiguous().view(torch.uint8) for t in kept if t is not None]


def agree(
    device: torch.device,
    bits: int,
    shape: tuple[int, int],
    first: str,
    second: str,
    grads: list[Tensor],
    **changed: Any,
) -> None:
    ours, theirs = State(bits, shape, first, second, device), State(bits, shape, first, second, CPU)
    for t, grad in enumerate(grads, 1):
        ours.step(kernels.update_, grad, t, **changed)
        theirs.step(reference.update_, grad, t, **changed)
    assert all(torch.equal(a, b) for a, b in zip(ours.held(), theirs.held(), strict=True))


def gradients(shape: tuple[int, int], steps: int = 2) -> list[Tensor]:
    """Of many sizes, with zeros among them."""
    grads = [torch.randn(shape) * torch.logspace(-6, 1, shape[1]) * 10.0**t for t in range(steps)]
    for grad in grads:
        grad.view(-1)[::7] = 0
    return grads


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_step_gives_the_bits_of_the_reference(first: str, second: str, device: torch.device) -> None:
    bits = 1 + PAIRS.index((first, second)) % 8
    for shape in ((3, 5), (7, 147)):
        agree(device, bits, shape, first, second, gradients(shape))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_gives_the_bits_of_the_reference(bits: int, device: torch.device) -> None:
    for shape in ((5, 13), (3, 120)):
        agree(device, bits, shape, "8bit", "8bit", gradients(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_gives_the_bits_of_the_reference(shape: tuple[int, int], device: torch.device) -> None:
    agree(device, 4, shape, "8bit", "channel", gradients(shape))


@pytest.mark.parametrize(
    "changed",
    [
        {"grad_factor": 2.0**20},
        {"eps": 0.0},
        {"eps": 1.0},
        {"lr": 0.0},
        {"lr": 1e9},
        {"lr": -1e9},
        {"correction1": 1.0, "correction2": 1.0},
        {"beta1": 0.0, "beta2": 0.0},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_any_settings_give_the_bits_of_the_reference(changed: dict[str, Any], device: torch.device) -> None:
    for first, second in (("8bit", "8bit"), ("fp32", "channel")):
        agree(device, 4, (7, 32), first, second, gradients((7, 32)), **changed)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-22, 9e17])
def test_gradients_of_any_size_give_the_bits_of_the_reference(size: float, device: torch.device) -> None:
    grads = [torch.randn(3, 100).clamp(-1, 1) * size for _ in range(2)]
    for moment in ("8bit", "bf16", "fp16"):
        agree(device, 3, (3, 100), moment, moment, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_and_gaps_give_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.randn(9, 40).to(dtype)
    agree(device, 5, (40, 9), "8bit", "8bit", [grad.T])
    agree(device, 5, (9, 20), "8bit", "channel", [grad[:, ::2]])


@pytest.mark.parametrize("memory", [("8bit", "8bit")], ids=str)
def test_fifty_steps_end_at_the_codes_of_the_cpu(memory: tuple[str, str], device: torch.device) -> None:
    grads = [torch.randn(6, 40) * 0.01 + 0.003 for _ in range(50)]
    agree(device, 4, (6, 40), *memory, grads)


def test_nothing_to_move_is_no_step(device: torch.device) -> None:
    state = State(4, (0, 5), "8bit", "8bit", device)
    state.step(kernels.update_, torch.zeros(0, 5), 1)


@pytest.mark.parametrize("size", [1e-3, -0.4])
def test_what_is_added_moves_levels_by_that_much_on_average(size: float, device: torch.device) -> None:
    rows, columns, steps = 4, 1000, 3
    scale = torch.ones(rows, device=device)
    packed, residual = (torch.full((rows * columns // 2,), value, dtype=torch.uint8).to(device) for value in (0x88, 0))
    for key in range(steps):  # a level is 1/16 of a code
        kernels.add_(packed, residual, scale, torch.full((rows, columns), size / 16, device=device), 4, key=key)
    high, low = (ops.unpack(plane.cpu(), 4, rows * columns).int() for plane in (packed, residual))
    moved = (high << 4 | low) - 128
    expected = rows * columns * steps * size
    assert abs(float(moved.sum()) - expected) < 4.5 * abs(expected) ** 0.5
    assert bool((moved.sign() * (1 if size > 0 else -1) >= 0).all())


def test_what_is_written_counts_a_version(device: torch.device) -> None:
    state = State(4, (3, 50), "8bit", "fp32", device)
    held = [t for t in (state.packed, state.residual, state.m, state.v) if t is not None]
    before = [t._version for t in held]
    state.step(kernels.update_, torch.randn(3, 50), 1)
    assert all(t._version > version for t, version in zip(held, before, strict=True))
    with torch.inference_mode():
        State(4, (3, 50), "8bit", "8bit", device).step(kernels.update_, torch.randn(3, 50), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mean_squares_have_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for shape in [*SHAPES, (0, 5), (3, 0), (1, 40_001)]:
        grad = gradients(shape, steps=1)[0].to(dtype)
        for same in (grad, grad.t().contiguous().t()):
            squares = kernels.mean_squares(same.to(device), 4.0).cpu()
            assert squares.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert torch.equal(squares, reference.mean_squares(grad, 4.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_value_without_a_square_shows_in_the_mean_of_its_row_alone(bad: float, device: torch.device) -> None:
    for columns in (1, 7, 300):
        for place in (0, columns - 1):
            grad = torch.randn(3, columns)
            grad[1, place] = bad
            assert kernels.mean_squares(grad.to(device), 1.0).isfinite().tolist() == [True, False, True]


def test_a_second_moment_of_one_value_a_row_is_only_read(device: torch.device) -> None:
    state = State(4, (3, 50), "none", "channel", device)
    assert state.v is not None
    before, version = state.v.clone(), state.v._version
    state.step(kernels.update_, torch.randn(3, 50), 1)
    assert torch.equal(state.v, before) and state.v._version == version


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.1e18, -1e19])
def test_a_value_out_of_bounds_is_found_anywhere(bad: float, device: torch.device) -> None:
    for shape in ((1,), (2, 3, 5, 7), (5000,)):
        values = torch.randn(shape).to(device)
        assert kernels.all_within(values, 1e18)
        for place in (0, values.numel() - 1):
            wrong = values.clone()
            wrong.view(-1)[place] = bad
            assert not kernels.all_within(wrong, 1e18)
    values = torch.full((2, 8, 4, 4), bad, device=device)
    assert not kernels.all_within(values.contiguous(memory_format=torch.channels_last), 1e18)
    assert not kernels.all_within(values[:, ::2], 1e18)
    assert not kernels.all_within(values.to(torch.float64), 1e18)
    assert kernels.all_within(values[:0], 1e18)
