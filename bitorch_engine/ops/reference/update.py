"""One optimizer step of packed weights: Adam's moments, and the move of code and residual. All in place.

Code index (n bits) and residual (8-n bits) together are one byte a weight, the level ``index << (8-n) | residual``,
0 .. 255. A step moves the level by ``direction * lr / lsb`` with ``lsb = scale * format.step / 2**(8-n)``, rounded
stochastically to an integer, so nothing that is smaller than a level is lost on average. Forward sees the index alone.

Work goes through in slices, so that float temporaries stay small however large the weight is. Every operation is
written out so that it rounds once (no fused multiply-add, no order of summation left open): another backend that does
the same float32 operations in the same order gets the same bits.
"""

import math

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.reference.levels import move_levels_, step_noise
from bitorch_engine.ops.reference.moments import load_moment, store_moment_

SLICE = 1 << 16
"""Elements handled at a time: a multiple of the 8-bit moments' block and of the eight values that fill whole bytes."""

_LEAST_DENOMINATOR = 1e-30  # so that 0 / 0 is no step
_LARGEST_RATE = 1e30  # so that 0 times the rate is 0


def update_(
    packed: Tensor,
    residual: Tensor,
    scale: Tensor,
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    bits: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    grad_factor: float,
    dtype: torch.dtype,
    key: int,
) -> None:
    """One Adam step of the whole weight.

    packed, residual: its two planes, R * K elements.  scale: (R,) float32.  grad: (R, K) float.
    exp_avg_s, exp_avg_l: stored moments; exp_avg_s may be float32 with R elements, one second moment a row. That one is
    only read: the caller has advanced it by ``mean_squares``.
    correction1, correction2: 1 - beta**t, or 1.
    grad_factor: a power of two that the gradient is multiplied by before it enters the moments (eps likewise).
    dtype: float32 or float64, what is computed in.

        m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g*g      move = -lr (m / c1) / (sqrt(v / c2) + eps)

    Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1; the corrections enter as one factor of the rate and of eps.
    """
    if grad.numel() == 0:
        return
    rows, columns = grad.shape
    factor, least = step_constants(exp_avg_s, lr, eps * grad_factor, correction1, correction2, exp_avg_l)
    rate = level_rate(scale, bits).to(dtype) * -factor
    per_row = is_per_row(exp_avg_s, rows, grad.numel())
    if exp_avg_s is not None and per_row:
        rate = rate / (exp_avg_s.view(-1).to(dtype).sqrt() + least)
        exp_avg_s = None
    rate = rate.clamp(-_LARGEST_RATE, _LARGEST_RATE)
    flat = grad.reshape(-1)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(dtype) * grad_factor
        row = torch.arange(start, start + part.numel(), device=part.device) // columns
        noise = step_noise(key, start, part.numel(), part.device)
        move = _move_(part, exp_avg_s, exp_avg_l, start, beta1, beta2, rate[row], least, noise)
        move_levels_(packed, residual, bits, start=start, move=move, noise=noise)


def direction_(
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    grad_factor: float,
    dtype: torch.dtype,
    key: int,
) -> Tensor:
    """Advance the moments with a whole gradient and return Adam's direction, the shape of ``grad``, without a step.

    For gradients that are projected, or of parameters that are not packed. Arguments as in ``update_``.
    """
    factor, least = step_constants(exp_avg_s, 1.0, eps * grad_factor, correction1, correction2, exp_avg_l)
    rate = torch.tensor(factor, dtype=dtype, device=grad.device)
    flat = grad.reshape(-1)
    out = torch.empty(flat.numel(), dtype=dtype, device=grad.device)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(dtype) * grad_factor
        noise = step_noise(key, start, part.numel(), part.device)
        out[start : start + SLICE] = _move_(part, exp_avg_s, exp_avg_l, start, beta1, beta2, rate, least, noise)
    return out.view(grad.shape)


def add_(packed: Tensor, residual: Tensor, scale: Tensor, delta: Tensor, bits: int, key: int) -> None:
    """Add ``delta`` (R, K), in units of the weight, to the levels of a weight, rounded stochastically."""
    rate = level_rate(scale, bits).clamp(-_LARGEST_RATE, _LARGEST_RATE)
    flat = delta.reshape(-1)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(torch.float32)
        row = torch.arange(start, start + part.numel(), device=part.device) // delta.shape[1]
        noise = step_noise(key, start, part.numel(), part.device)
        move_levels_(packed, residual, bits, start=start, move=part * rate[row], noise=noise)


def level_rate(scale: Tensor, bits: int) -> Tensor:
    """Levels per unit of weight, one value a row: (R,) float32."""
    form = bit_format(bits)
    return ((1 << form.hidden_bits) / form.step) / scale


def is_per_row(exp_avg_s: Tensor | None, rows: int, count: int) -> bool:
    """Whether a second moment has one value a row of a gradient of ``count`` elements."""
    return exp_avg_s is not None and exp_avg_s.dtype != torch.uint8 and exp_avg_s.numel() == rows != count


def step_constants(
    exp_avg_s: Tensor | None,
    lr: float,
    eps: float,
    correction1: float,
    correction2: float,
    exp_avg_l: Tensor | None,
) -> tuple[float, float]:
    """(factor, least): a step is ``factor * m / (sqrt(v) + least)``, or ``factor * m`` without a second moment."""
    factor = lr if exp_avg_l is None else lr / correction1
    if exp_avg_s is None:
        return factor, 0.0
    root = math.sqrt(correction2)
    return factor * root, max(eps * root, _LEAST_DENOMINATOR)


def _move_(
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    start: int,
    beta1: float,
    beta2: float,
    rate: Tensor,
    least: float,
    noise: Tensor,
) -> Tensor:
    """Advance the moments of a slice with its gradient, (count,), and return ``rate * m / (sqrt(v) + least)``."""
    stop = start + grad.numel()
    m = grad
    if exp_avg_l is not None:
        m = load_moment(exp_avg_l, start, stop, grad.dtype, signed=True) * beta1 + grad * (1 - beta1)
        store_moment_(exp_avg_l, start, m, noise, signed=True)
    if exp_avg_s is None:
        return m * rate
    v = load_moment(exp_avg_s, start, stop, grad.dtype, signed=False) * beta2 + grad * grad * (1 - beta2)
    store_moment_(exp_avg_s, start, v, noise, signed=False)
    return m * rate / (v.sqrt() + least)


def all_within(values: Tensor, limit: float) -> Tensor:
    """Whether all values lie between -limit and limit, exclusive; NaN does not. 0-dim bool.

    No temporary of their size is made.
    """
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values)
    return (high < limit) & (low > -limit)


def all_within_fake(values: Tensor, limit: float) -> Tensor:
    return values.new_empty((), dtype=torch.bool)


def mean_squares(grad: Tensor, factor: float) -> Tensor:
    """Mean square of every row of ``grad * factor``: (R,), float32 or wider, 0 for rows without elements.

    grad: (R, K) float; it is read in slices of rows.
    """
    out = mean_squares_fake(grad, factor).zero_()
    if grad.numel() > 0:
        for first, rows in _row_slices(grad):
            rows = rows * factor
            out[first : first + rows.shape[0]] = tree_sum(rows * rows) * (1 / rows.shape[1])
    return out


def mean_squares_fake(grad: Tensor, factor: float) -> Tensor:
    return grad.new_empty(grad.shape[0], dtype=torch.promote_types(grad.dtype, torch.float32))


def tree_sum(rows: Tensor) -> Tensor:
    """Sum over the last dimension by adding the upper half to the lower half until one is left; zeros fill it up.

    The order of the additions is part of the definition, so that every backend rounds alike.
    """
    while (length := rows.shape[-1]) > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        upper = torch.nn.functional.pad(rows[..., half:], (0, 2 * half - length))
        rows = rows[..., :half] + upper
    return rows.squeeze(-1)


def _row_slices(rows: Tensor) -> list[tuple[int, Tensor]]:
    """(first row, rows in float32 or wider) for blocks of about SLICE elements."""
    height = max(1, SLICE // max(1, rows.shape[1]))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return [(first, rows[first : first + height].to(wide)) for first in range(0, rows.shape[0], height)]
