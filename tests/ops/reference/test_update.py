"""The pieces of a step: the fixed order of summation, slices, and the mean squares of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitorch_engine.bits import pack
from bitorch_engine.ops import SLICE, direction_, new_moment, noise_key, tree_sum, update_
from bitorch_engine.ops.reference.update import mean_squares

ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "correction1": 1.0, "correction2": 1.0}


@given(st.integers(1, 40), st.integers(1, 5))
def test_a_tree_sum_of_integers_is_their_sum(length: int, rows: int) -> None:
    x = torch.randint(-1000, 1000, (rows, length))
    assert torch.equal(tree_sum(x.float()).long(), x.sum(1))


def test_a_tree_sum_rounds_in_the_stated_order() -> None:
    x = torch.randn(5, dtype=torch.float32)
    upper = (x[0] + x[4]) + x[2]  # 5 -> 4 -> 2 -> 1, the upper half added to the lower, short halves filled up with 0
    assert torch.equal(tree_sum(x), upper + (x[1] + x[3]))


@pytest.mark.parametrize("columns", [1, 7, 300, 70_000], ids=lambda columns: f"columns={columns}")
def test_mean_squares_are_those_of_the_rows_times_the_factor(columns: int) -> None:
    grad = torch.randn(5, columns) * torch.arange(1, 6)[:, None]
    true = (4 * grad.double()).square().mean(1)
    assert torch.allclose(mean_squares(grad, 4.0).double(), true, rtol=1e-6, atol=0)
    assert torch.allclose(mean_squares(grad.double(), 4.0), true, rtol=1e-14, atol=0)


def test_rows_without_elements_have_mean_square_0() -> None:
    assert mean_squares(torch.empty(3, 0), 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_direction_is_adams(dtype: torch.dtype) -> None:
    count = SLICE + 300  # more than one slice
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 0.01, "correction1": 0.5, "correction2": 0.25}
    v, m = new_moment((count,), dtype, torch.device("cpu")), new_moment((count,), dtype, torch.device("cpu"))
    v_true = m_true = torch.zeros(count, dtype=torch.float64)
    for t in range(2):
        grad = torch.randn(count, dtype=torch.float64).to(dtype)
        direction = direction_(grad, v, m, grad_factor=1.0, dtype=dtype, key=noise_key(t), **settings)
        m_true = 0.9 * m_true + 0.1 * grad.double()
        v_true = 0.99 * v_true + 0.01 * grad.double().square()
        true = (m_true / 0.5) / ((v_true / 0.25).sqrt() + 0.01)
        assert torch.allclose(direction.double(), true, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("memory", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, None], ids=str)
def test_a_weight_of_several_slices_steps_like_its_slices(memory: torch.dtype | None) -> None:
    bits, rows, columns = 3, 32, SLICE // 32
    grads = torch.randn(2 * rows, columns)
    scale = torch.rand(2 * rows) + 0.5
    levels = torch.randint(0, 256, (2 * rows * columns,), dtype=torch.uint8)

    def step(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        own = levels.view(2 * rows, columns)[part].reshape(-1)
        packed, residual = pack(own >> 5, 3), pack(own & 31, 5)
        v = m = None
        if memory is not None:
            v, m = (new_moment(grads[part].shape, memory, torch.device("cpu")) for _ in range(2))
        update_(
            packed, residual, scale[part], grads[part], v, m, bits=bits, lr=0.1, grad_factor=1.0, dtype=torch.float32,
            key=5, **ADAM,
        )  # fmt: skip
        return packed, residual

    whole, first = step(slice(0, 2 * rows)), step(slice(0, rows))
    for plane, part in zip(whole, first, strict=True):
        assert torch.equal(plane[: part.numel()], part)
