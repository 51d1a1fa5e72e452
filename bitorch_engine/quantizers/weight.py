"""How a float weight becomes codes: the scale of each output channel, and rounding to levels."""

import torch
from torch import Tensor

from bitorch_engine.bits import BitFormat

_ROUNDS = 8
"""Least-squares rounds: the squared error falls in every one, and hardly after the eighth."""

# Step of the uniform quantizer of least squared error on a normal distribution, in standard deviations (Max 1960).
_NORMAL_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308}


def normal_scale(form: BitFormat) -> float:
    """The best scale for normally distributed weights, in units of their standard deviation."""
    return _NORMAL_STEP[form.bits] / form.step


def fit_scale(rows: Tensor, form: BitFormat) -> Tensor:
    """The scale of each row that gives a small squared error: (R,) float32, positive.

    rows: (R, K) finite float. Rounding and the least-squares scale of the rounded codes take turns (Lloyd's iteration),
    from the scale for a normal distribution and from the one that reaches the largest weight; each row keeps the better
    end. A row of zeros takes the mean scale of the other rows; where all are zero, the scale of a new layer of that
    fan-in: a scale near zero would freeze the row for good. At 1 bit, which has no zero, it takes 1/64 of that: nearly
    nothing beside the other rows, and what a BatchNorm behind it, with its eps of 1e-5, still trains as any other.
    """
    rows = rows.to(torch.float32)
    spread = rows.square().mean(1).sqrt()
    alive = spread * normal_scale(form) > 1e-12
    scale = torch.where(alive, spread * normal_scale(form), 1.0)
    error = torch.full_like(scale, torch.inf)
    largest = rows.abs().amax(1) if rows.shape[1] else spread
    for start in (scale, torch.where(alive, largest / max(1, form.high), 1.0)):
        end = _iterate(rows, start, form)
        end_error = _squared_error(rows, end, form)
        scale, error = torch.where(end_error < error, end, scale), torch.minimum(end_error, error)
    fallback = (3 * max(1, rows.shape[1])) ** -0.5 * normal_scale(form)
    typical = torch.where(alive, scale, 0.0).sum() / alive.sum()
    share = 1 / 64 if form.bits == 1 else 1.0
    return torch.where(alive, scale, torch.where(alive.any(), typical, fallback) * share)


def _iterate(rows: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    for _ in range(_ROUNDS):
        codes = form.codes(to_levels(rows, scale, form) >> form.hidden_bits).to(torch.float32)
        better = (rows * codes).sum(1) / (codes * codes).sum(1)
        scale = torch.where(torch.isfinite(better) & (better > 0), better, scale)
    return scale


def from_codes(rows: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    """The values of the codes that are nearest to floats: (R, K) float32."""
    return form.codes(to_levels(rows, scale, form) >> form.hidden_bits) * scale[:, None]


def kept_scale(rows: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    """``scale`` itself, (R,), where it holds floats, (R, K); else a copy with ``fit_scale``'s for the rows it does not.

    It holds a row of which the nearest codes keep half of the bits at least: they leave 2**-bits of its sum of squares
    or less. With the scale that suits them, normally distributed weights leave 0.36 at 1 bit, then 0.12, 0.037, 0.012,
    ... 0.00009 at 8 bits. Where ``fit_scale``'s leaves more than four fifths of what it does, it stays too: few large
    weights among zeros are a row that no scale of 1 bit suits. So it does for floats that are not finite.
    """
    rows = rows.to(torch.float32)
    lost = _squared_error(rows, scale, form)
    doubtful = lost > rows.square().sum(1) * 2.0**-form.bits
    if not bool(doubtful.any()):
        return scale
    fitting = fit_scale(rows, form)
    outgrown = doubtful & (_squared_error(rows, fitting, form) < 0.8 * lost)
    return torch.where(outgrown, fitting, scale) if bool(outgrown.any()) else scale


def _squared_error(rows: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    """What the nearest codes leave of each row: (R,) float32."""
    return (from_codes(rows, scale, form) - rows).square().sum(1)


def to_levels(rows: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    """The level, 0 .. 255, nearest below each weight: uint8, (R, K). Its top bits are the nearest code.

    rows: (R, K) float.  scale: (R,), of any sign.  Values beyond the outermost codes are clamped.
    """
    index = (rows.to(torch.float32) / scale[:, None] - form.low) / form.step
    return ((index + 0.5) * (1 << form.hidden_bits)).floor().clamp(0, 255).to(torch.uint8)


def from_levels(levels: Tensor, scale: Tensor, form: BitFormat) -> Tensor:
    """The weight at the centre of each level, code and residual together: (R, K) float32.

    It is what an optimizer sees and moves; forward sees the code alone.
    """
    index = (levels.to(torch.float32) + 0.5) * (1 / (1 << form.hidden_bits)) - 0.5
    return (index * form.step + form.low) * scale[:, None]
