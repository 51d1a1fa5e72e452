"""A step by every kernel that this processor can run gives the bits of the reference, and the mean that was asked."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.reference import update as reference

ISAS = [isa for isa in cpu.available_isas() if isa != "amx"]
CPU = torch.device("cpu")
STORED = {
    "none": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "8bit": torch.uint8,
}
SHAPES = [(1, 1), (3, 5), (4, 128), (7, 147), (2, 1000), (40, 27), (300, 1), (5, 513), (130, 65)]
"""Rows and columns: no multiples of 8 or 128, several rows in a block, several blocks in a row."""


class State:
    """A weight of random levels, and its moments."""

    def __init__(self, bits: int, shape: tuple[int, int], first: str, second: str) -> None:
        generator = torch.Generator().manual_seed(bits + 10 * shape[0] + 10_000 * shape[1])
        hidden, count = 8 - bits, shape[0] * shape[1]
        self.bits = bits
        self.levels = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        self.packed = ops.pack(self.levels >> hidden, bits)
        low = self.levels & ((1 << hidden) - 1)
        self.residual = ops.pack(low, hidden) if hidden else low.new_empty(0)
        self.scale = torch.rand(shape[0], generator=generator) + 0.05
        self.m = None if STORED[first] is None else ops.new_moment(shape, STORED[first], CPU)
        if second == "channel":
            self.v: Tensor | None = torch.rand(shape[0], generator=generator) ** 8
        else:
            self.v = None if STORED[second] is None else ops.new_moment(shape, STORED[second], CPU)

    def step(self, function: Any, grad: Tensor, t: int, **changed: Any) -> None:
        settings = {
            "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "correction1": 1 - 0.9**t,
            "correction2": 1 - 0.99**t, "grad_factor": 1.0, "dtype": torch.float32, "key": 77 + t,
        }  # fmt: skip
        settings |= changed
        function(self.packed, self.residual, self.scale, grad, self.v, self.m, bits=self.bits, **settings)

    def bytes(self) -> list[bytes]:
        held = (self.packed, self.residual, self.scale, self.v, self.m)
        return [b"" if t is None else t.view(torch.uint8).numpy().tobytes() for t in held]


def agree(bits: int, shape: tuple[int, int], first: str, second: str, grads: list[Tensor], **changed: Any) -> None:
    ours, theirs = (State(bits, shape, first, second) for _ in range(2))
    for t, grad in enumerate(grads, 1):
        ours.step(ops.update_, grad, t, **changed)
        theirs.step(reference.update_, grad, t, **changed)
    assert ours.bytes() == theirs.bytes()


def gradients(shape: tuple[int, int], steps: int = 2) -> list[Tensor]:
    """Of many sizes, with zeros among them."""
    grads = [torch.randn(shape) * torch.logspace(-6, 1, shape[1]) * 10.0**t for t in range(steps)]
    for grad in grads:
        grad.view(-1)[::7] = 0
    return grads


@pytest.mark.parametrize("second", [*STORED, "channel"])
@pytest.mark.parametrize("first", STORED)
@pytest.mark.parametrize("isa", ISAS)
def test_a_step_gives_the_bits_of_the_reference(isa: str, first: str, second: str) -> None:
    with cpu.cap_isa(isa):
        for i, shape in enumerate(SHAPES):
            agree(1 + i % 8, shape, first, second, gradients(shape))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("isa", ISAS)
def test_every_width_gives_the_bits_of_the_reference(isa: str, bits: int) -> None:
    with cpu.cap_isa(isa):
        for shape in SHAPES:
            for moment in ("8bit", "bf16"):
                agree(bits, shape, moment, moment, gradients(shape))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("moment", ["none", "bf16"])
def test_rows_beyond_65536_elements_give_the_bits_of_the_reference(isa: str, moment: str) -> None:
    with cpu.cap_isa(isa):
        agree(4, (2, 70_000), moment, moment, gradients((2, 70_000)))


@pytest.mark.parametrize("isa", ISAS)
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
def test_any_settings_give_the_bits_of_the_reference(isa: str, changed: dict[str, Any]) -> None:
    with cpu.cap_isa(isa):
        for first, second in (("8bit", "8bit"), ("fp16", "fp16"), ("fp32", "channel"), ("none", "none")):
            agree(4, (7, 147), first, second, gradients((7, 147)), **changed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e-22, 1e-15, 9e17])
def test_gradients_of_any_size_give_the_bits_of_the_reference(isa: str, size: float) -> None:
    grads = [torch.randn(3, 100).clamp(-1, 1) * size for _ in range(3)]
    with cpu.cap_isa(isa):
        for moment in STORED:
            agree(3, (3, 100), moment, moment, grads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_other_types_give_the_bits_of_the_reference(isa: str, dtype: torch.dtype) -> None:
    with cpu.cap_isa(isa):
        for shape in SHAPES:
            grads = [grad.clamp(-100, 100).to(dtype) for grad in gradients(shape)]
            agree(5, shape, "8bit", "8bit", grads)
            agree(5, shape, "none", "channel", grads)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 40),
    columns=st.integers(0, 400),
    first=st.sampled_from(list(STORED)),
    second=st.sampled_from([*STORED, "channel"]),
    transposed=st.booleans(),
)
def test_any_shape_gives_the_bits_of_the_reference(
    bits: int, rows: int, columns: int, first: str, second: str, transposed: bool
) -> None:
    grad = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    agree(bits, (rows, columns), first, second, [grad])


@pytest.mark.parametrize("shape", [(64, 4608), (1000, 513), (1, 100_003), (100_003, 1)], ids=str)
@pytest.mark.parametrize(("first", "second"), [("8bit", "8bit"), ("none", "channel"), ("bf16", "fp32")])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int], first: str, second: str) -> None:
    grads, results = gradients(shape), []
    for threads in (1, 2, 3):
        state = State(3, shape, first, second)
        torch.set_num_threads(threads)
        try:
            for t, grad in enumerate(grads, 1):
                state.step(ops.update_, grad, t)
        finally:
            torch.set_num_threads(1)
        results.append(state.bytes())
    assert results[0] == results[1] == results[2]
    other = State(3, shape, first, second)
    for t, grad in enumerate(grads, 1):
        other.step(reference.update_, grad, t)
    assert results[0] == other.bytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_adding_gives_the_bits_of_the_reference(isa: str, bits: int) -> None:
    with cpu.cap_isa(isa):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                delta = (torch.randn(shape) * 0.1).to(dtype)
                ours, theirs = (State(bits, shape, "none", "none") for _ in range(2))
                ops.add_(ours.packed, ours.residual, ours.scale, delta, bits=bits, key=5)
                reference.add_(theirs.packed, theirs.residual, theirs.scale, delta, bits=bits, key=5)
                assert ours.bytes() == theirs.bytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [2e-4, -2e-4, 3e-6], ids=lambda size: f"levels={size:g}")
def test_tiny_steps_move_by_what_was_asked_on_average(isa: str, size: float) -> None:
    rows, columns, steps = 512, 1000, 8
    levels = torch.full((rows * columns,), 128, dtype=torch.uint8)
    packed, residual = ops.pack(levels >> 4, 4), ops.pack(levels & 15, 4)
    delta = torch.full((rows, columns), size / 16)  # 16 levels a code, and a scale of 1
    with cpu.cap_isa(isa):
        for key in range(steps):
            ops.add_(packed, residual, torch.ones(rows), delta, bits=4, key=key)
    moved = ((ops.unpack(packed, 4, rows * columns).int() << 4) | ops.unpack(residual, 4, rows * columns)) - 128
    expected = rows * columns * steps * size
    assert abs(float(moved.sum()) - expected) < 4.5 * abs(expected) ** 0.5
    assert bool((moved.sign() * (1 if size > 0 else -1) >= 0).all())


def test_what_is_written_counts_a_version() -> None:
    state = State(4, (3, 50), "8bit", "fp32")
    held = [state.packed, state.residual, state.m, state.v]
    before = [t._version for t in held if t is not None]
    state.step(ops.update_, torch.randn(3, 50), 1)
    assert all(t._version > version for t, version in zip([t for t in held if t is not None], before, strict=True))
    with torch.inference_mode():
        inside = State(4, (3, 50), "8bit", "8bit")
        inside.step(ops.update_, torch.randn(3, 50), 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.1e18, -1e19])
def test_a_value_out_of_bounds_is_found_anywhere(isa: str, bad: float) -> None:
    with cpu.cap_isa(isa):
        for shape in ((1,), (7, 9), (2, 3, 5, 7), (70_001,)):
            values = torch.randn(shape)
            assert ops.all_within(values, 1e18)
            for place in (0, values.numel() // 2, values.numel() - 1):
                wrong = values.clone()
                wrong.view(-1)[place] = bad
                assert not ops.all_within(wrong, 1e18)
    values = torch.full((2, 8, 4, 4), bad)
    assert not ops.all_within(values.contiguous(memory_format=torch.channels_last), 1e18)
    assert not ops.all_within(values[:, ::2], 1e18)
    assert not ops.all_within(values.to(torch.float64), 1e18)
    assert ops.all_within(values[:0], 1e18)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mean_squares_have_the_bits_of_the_reference(isa: str, dtype: torch.dtype) -> None:
    with cpu.cap_isa(isa):
        for shape in [*SHAPES, (0, 5), (3, 0), (2, 40_001), (9, 1024), (6, 576)]:
            grad = gradients(shape, steps=1)[0].to(dtype)
            for factor in (1.0, 2.0**20):
                true = reference.mean_squares(grad, factor)
                for same in (grad, grad.t().contiguous().t()):
                    squares = ops.mean_squares(same, factor)
                    assert squares.dtype == true.dtype and torch.equal(squares, true)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_value_without_a_square_shows_in_the_mean_of_its_row_alone(isa: str, bad: float) -> None:
    with cpu.cap_isa(isa):
        for columns in (1, 7, 128, 513):
            for place in {0, columns // 2, columns - 1}:
                grad = torch.randn(3, columns)
                grad[1, place] = bad
                assert ops.mean_squares(grad, 1.0).isfinite().tolist() == [True, False, True]


def test_any_number_of_threads_gives_the_same_mean_squares() -> None:
    grad, results = torch.randn(1000, 513), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(ops.mean_squares(grad, 1.0))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_second_moment_of_one_value_a_row_is_only_read() -> None:
    state = State(4, (3, 50), "none", "channel")
    assert state.v is not None
    before, version = state.v.clone(), state.v._version
    state.step(ops.update_, torch.randn(3, 50), 1)
    assert torch.equal(state.v, before) and state.v._version == version


def test_the_ops_are_registered_as_torch_wants() -> None:
    state, grad = State(4, (3, 50), "8bit", "8bit"), torch.randn(3, 50)
    settings = (4, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.01, 1.0, torch.float32, 5)
    args = (state.packed, state.residual, state.scale, grad, state.v, state.m, *settings)
    torch.library.opcheck(torch.ops.bitorch_engine.update_.default, args)
    torch.library.opcheck(
        torch.ops.bitorch_engine.add_.default, (state.packed, state.residual, state.scale, grad, 4, 5)
    )
    torch.library.opcheck(torch.ops.bitorch_engine.all_within.default, (grad, 1.0))
    torch.library.opcheck(torch.ops.bitorch_engine.mean_squares.default, (grad, 1.0))
