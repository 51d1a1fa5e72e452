"""Integer convolutions against torch's int64 convolution, and their gradients against sums written out in int64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine.ops import Convolution, multiply_exact


def brute_force(x: Tensor, grad: Tensor, weight: Tensor, c: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and both gradients of a 2-d convolution, tap by tap, in int64.

    A transposed convolution is the gradient of a plain one, with input and output exchanged.
    """
    if c.transposed:
        forward, _ = _gradients(grad, x, weight, c)
        return forward, _forward(grad, x.shape, weight, c), _gradients(grad, x, weight, c)[1]
    return _forward(x, grad.shape, weight, c), *_gradients(x, grad, weight, c)


def _forward(x: Tensor, shape: torch.Size, weight: Tensor, c: Convolution) -> Tensor:
    y = torch.zeros(shape, dtype=torch.int64)
    for _, taps, (i, j), rows, columns in _products(_padded(x, c), weight.shape, shape, c):
        y[:, rows] += torch.einsum("nchw,oc->nohw", taps[:, columns], weight[rows, :, i, j])
    return y


def _gradients(x: Tensor, grad: Tensor, weight: Tensor, c: Convolution) -> tuple[Tensor, Tensor]:
    """Of input and weight of a plain convolution."""
    padded, grad_padded, grad_weight = _padded(x, c), _padded(torch.zeros_like(x), c), torch.zeros_like(weight)
    for window, taps, (i, j), rows, columns in _products(padded, weight.shape, grad.shape, c):
        grad_padded[(slice(None), columns, *window)] += torch.einsum(
            "nohw,oc->nchw", grad[:, rows], weight[rows, :, i, j]
        )
        grad_weight[rows, :, i, j] += torch.einsum("nohw,nchw->oc", grad[:, rows], taps[:, columns])
    (top, left), (height, width) = c.padding, x.shape[2:]
    return grad_padded[:, :, top : top + height, left : left + width], grad_weight


def _padded(x: Tensor, c: Convolution) -> Tensor:
    beyond = 20  # more than any window reaches
    return F.pad(x, (c.padding[1], beyond, c.padding[0], beyond))


def _products(
    padded: Tensor, kernel: torch.Size, out: torch.Size, c: Convolution
) -> Iterator[tuple[tuple[slice, slice], Tensor, tuple[int, int], slice, slice]]:
    """(window, input in that window, tap, output channels, input channels) of every tap and group."""
    rows, columns = kernel[0] // c.groups, kernel[1]
    for i, j, g in itertools.product(range(kernel[2]), range(kernel[3]), range(c.groups)):
        window = tuple(
            slice(tap * c.dilation[d], tap * c.dilation[d] + c.stride[d] * (out[2 + d] - 1) + 1, c.stride[d])
            for d, tap in enumerate((i, j))
        )
        group = slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns)
        yield window, padded[(slice(None), slice(None), *window)], (i, j), *group


@given(
    st.booleans(),
    st.integers(1, 3),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(5, 7), st.integers(5, 8)),
)
def test_forward_and_both_gradients_are_the_integer_sums(
    transposed: bool,
    groups: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    kernel: tuple[int, int],
    image: tuple[int, int],
) -> None:
    extra = tuple(min(1, max(s, d) - 1) if transposed else 0 for s, d in zip(stride, dilation, strict=True))
    c = Convolution(stride, padding, dilation, transposed, extra, groups)
    channels_in, channels_out = 2 * groups, 3 * groups
    shape = (channels_in, 3, *kernel) if transposed else (channels_out, 2, *kernel)
    x = torch.randint(-128, 128, (2, channels_in, *image))
    weight = torch.randint(-128, 128, shape)
    y = multiply_exact(c.forward, x, weight, 2**22)
    grad = torch.randint(-127, 128, tuple(y.shape))
    forward, grad_input, grad_weight = brute_force(x, grad, weight, c)
    assert torch.equal(y.long(), forward)
    assert torch.equal(multiply_exact(lambda a, b: c.grad_input(a, b, x.shape), grad, weight, 2**22).long(), grad_input)
    assert torch.equal(multiply_exact(lambda a, b: c.grad_weight(a, b, shape), grad, x, 2**24).long(), grad_weight)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_every_rank_agrees_with_the_functional_form(rank: int, transposed: bool) -> None:
    ones = (1,) * rank
    c = Convolution((2,) * rank, ones, ones, transposed, (0,) * rank, 2)
    x = torch.randint(-8, 8, (2, 4, *range(5, 5 + rank))).float()
    weight = torch.randint(-8, 8, (4, 2, *(3,) * rank)).float()
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{rank}d")
    expected = function(x, weight, stride=2, padding=1, groups=2)
    assert torch.equal(c.forward(x, weight), expected)


def test_sums_that_float32_would_round_are_exact() -> None:
    # 255 * 127 * 1152 exceeds 2**24, the last integer below which float32 holds all
    x, weight = torch.full((1, 128, 3, 3), 255), torch.full((1, 128, 3, 3), 127)
    x[0, 0, 0, 0], weight[0, 0, 0, 0] = 1, 1
    c = Convolution((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    exact = 255 * 127 * 1151 + 1
    assert exact > 2**24 and exact % 2 == 0
    assert int(multiply_exact(c.forward, x, weight, 255 * 127 * 1152).item()) == exact
    assert multiply_exact(c.forward, x, weight, 2**24).dtype == torch.float32
    assert multiply_exact(c.forward, x, weight, 2**24 + 1).dtype == torch.float64


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_large_3x3_convolutions_are_exact_up_to_the_bound(channels: int) -> None:
    # where a library would choose a Winograd or FFT algorithm, whose intermediate results are no integers
    x = torch.randint(-15, 16, (2, channels, 16, 16))
    weight = torch.randint(-8, 8, (channels, channels, 3, 3))
    c = Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    y = multiply_exact(c.forward, x, weight, channels * 9 * 15 * 8)
    assert y.dtype == torch.float32
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert torch.equal(y.double(), exact)
