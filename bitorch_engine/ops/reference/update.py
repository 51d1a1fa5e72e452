"""One optimizer step of packed weights: Adam's moments, and the move of code and residual. All in place.

Code index (n bits) and residual (8-n bits) together are one byte a weight, the level ``index << (8-n) | residual``,
0 .. 255. A step moves the level by ``direction * lr / lsb`` with ``lsb = scale * format.step / 2**(8-n)``, rounded
stochastically to an integer, so nothing that is smaller than a level is lost on average. Forward sees the index alone.

Work goes through in slices, so that float temporaries stay small however large the weight is. Every operation is
written out so that it rounds once (no fused multiply-add, no order of summation left open): another backend that does
the same float32 operations in the same order gets the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.reference.levels import move_levels_
from bitorch_engine.ops.reference.moments import load_moment, needs_noise, store_moment_
from bitorch_engine.ops.reference.noise import noise_bits, noise_key

SLICE = 1 << 16
"""Elements handled at a time: a multiple of the 8-bit moments' block and of the eight values that fill whole bytes."""

MOMENT_STREAM = 2  # of noise


def update(
    packed: Tensor,
    residual: Tensor,
    scale: Tensor,
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    bits: int,
    *,
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
    exp_avg_s, exp_avg_l: stored moments; exp_avg_s may be float32 with R elements: one second moment a row.
    grad_factor: a power of two that the gradient is multiplied by before it enters the moments (eps likewise).
    dtype: float32 or float64, what is computed in.
    """
    rows, columns = grad.shape
    levels_per_unit = level_rate(scale, bits) * lr
    per_row = False
    if exp_avg_s is not None and exp_avg_s.dtype != torch.uint8 and exp_avg_s.numel() == rows != grad.numel():
        channel_second_moment_(exp_avg_s, grad, beta2=beta2, grad_factor=grad_factor)
        per_row = True
        levels_per_unit = levels_per_unit / (
            (exp_avg_s.view(-1).to(dtype) * (1 / correction2)).sqrt() + eps * grad_factor
        )
    flat = grad.reshape(-1)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(dtype) * grad_factor
        row = torch.arange(start, start + part.numel(), device=part.device) // columns
        direction = adam_direction_(
            part,
            None if per_row else exp_avg_s,
            exp_avg_l,
            start=start,
            beta1=beta1,
            beta2=beta2,
            eps=eps * grad_factor,
            correction1=correction1,
            correction2=correction2,
            key=key,
        )
        move_levels_(packed, residual, bits, start=start, move=-(direction * levels_per_unit[row]), key=key)


def direction_(
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    *,
    grad_factor: float,
    eps: float,
    dtype: torch.dtype,
    **settings: Any,
) -> Tensor:
    """Advance the moments with a whole gradient and return Adam's direction, the shape of ``grad``, without a step.

    For gradients that are projected, or of parameters that are not packed. Arguments as in ``update``.
    """
    flat = grad.reshape(-1)
    out = torch.empty(flat.numel(), dtype=dtype, device=grad.device)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(dtype) * grad_factor
        out[start : start + SLICE] = adam_direction_(
            part, exp_avg_s, exp_avg_l, start=start, eps=eps * grad_factor, **settings
        )
    return out.view(grad.shape)


def add(packed: Tensor, residual: Tensor, scale: Tensor, delta: Tensor, bits: int, key: int) -> None:
    """Add ``delta`` (R, K), in units of the weight, to the levels of a weight, rounded stochastically."""
    rate = level_rate(scale, bits)
    flat = delta.reshape(-1)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE].to(torch.float32)
        row = torch.arange(start, start + part.numel(), device=part.device) // delta.shape[1]
        move_levels_(packed, residual, bits, start=start, move=part * rate[row], key=key)


def level_rate(scale: Tensor, bits: int) -> Tensor:
    """Levels per unit of weight, one value a row: (R,) float32."""
    form = bit_format(bits)
    return ((1 << form.hidden_bits) / form.step) / scale


def adam_direction_(
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    *,
    start: int,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    key: int,
) -> Tensor:
    """Advance both moments of a slice and return Adam's direction (float, the shape of ``grad``).

    grad: (count,) float32 or float64, elements start .. start + count - 1 of the gradient.
    exp_avg_s: stored second moment (see ``moments``), or float (count,) already advanced, one value an element.
    exp_avg_l: stored first moment, or None for none.  correction1, correction2: 1 - beta**t, or 1.

        m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g*g      direction = (m / c1) / (sqrt(v / c2) + eps)

    Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1.
    """
    stop = start + grad.numel()
    noise = None
    if needs_noise(exp_avg_s) or needs_noise(exp_avg_l):
        noise = noise_bits(noise_key(key, MOMENT_STREAM), start, grad.numel(), grad.device)
    numerator = grad
    if exp_avg_l is not None:
        m = load_moment(exp_avg_l, start, stop, grad.dtype, signed=True) * beta1 + grad * (1 - beta1)
        store_moment_(exp_avg_l, start, m, noise, signed=True)
        numerator = m * (1 / correction1)
    if exp_avg_s is None:
        return numerator
    v = load_moment(exp_avg_s, start, stop, grad.dtype, signed=False) * beta2 + grad * grad * (1 - beta2)
    store_moment_(exp_avg_s, start, v, noise, signed=False)
    return numerator / ((v * (1 / correction2)).sqrt() + eps)


def channel_second_moment_(exp_avg_s: Tensor, grad_rows: Tensor, *, beta2: float, grad_factor: float) -> None:
    """Advance a second moment that has one value an output channel by the mean square of that channel's gradient.

    exp_avg_s: float32, R elements.  grad_rows: (R, K) float; it is read in slices of rows.
    """
    moment = exp_avg_s.view(-1)
    for first, rows in _row_slices(grad_rows):
        rows = rows * grad_factor
        squares = tree_sum(rows * rows) * (1 / rows.shape[1])
        part = moment[first : first + rows.shape[0]]
        part.copy_(part * beta2 + squares * (1 - beta2))


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
