"""One optimizer step: checks first, then the move. Shared by packed and by float parameters."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from bitorch_engine import ops

if TYPE_CHECKING:
    from bitorch_engine.parameters.packed import PackedParameter

_SCALE_BETAS = (0.9, 0.999)
"""Adam's betas for a learned scale: it is one number a channel, and its gradient a sum over many weights."""


_LARGEST = 1e18
"""Gradients are squared in float32, which ends at 3.4e38."""


class Projector(Protocol):
    """What ``update`` needs of a gradient projector."""

    def project(self, grad: Tensor, iter: int) -> Tensor: ...

    def project_back(self, low_rank_grad: Tensor) -> Tensor: ...


@_disable_dynamo
@torch.no_grad()
def update_(
    weight: "PackedParameter",
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    step: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
    correct_bias: bool | None,
    projector: Projector | None,
    grad: Tensor | None,
) -> None:
    """What ``PackedParameter.update`` documents: all that can be wrong is checked, then ``step_``."""
    _check_settings(lr, weight_decay, betas, eps, dtype, step, correct_bias)
    grad = _gradient(weight, grad, projector, step)
    check_moments(weight, grad, exp_avg_s, exp_avg_l, projected=projector is not None)
    if weight.learn_scale and projector is not None:
        if weight.grad is None:
            raise ValueError("a learned scale needs the full gradient besides the projected one: set qweight.grad.")
        check_finite(weight.grad)
    check_finite(grad)
    if projector is not None:
        _check_projected_back(weight, projector.project_back(grad))
    step_(
        weight,
        exp_avg_s,
        exp_avg_l,
        step,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        dtype=dtype,
        correct_bias=step is not None and correct_bias is not False,
        projector=projector,
        grad=grad,
    )


def step_(
    weight: "PackedParameter",
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    step: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
    correct_bias: bool,
    projector: Projector | None,
    grad: Tensor,
    squares: Tensor | None = None,
    prepared: ops.PreparedUpdate | None = None,
) -> None:
    """The step of ``PackedParameter.update`` whose caller has checked everything, and records no gradient.

    squares: what ``squares_of_rows`` gave for the gradient, if that was asked.
    prepared: what ``prepare_update`` gave for the weight, if it fits.
    """
    residual = weight.require_residual_()
    count = advance_(step) if step is not None else 0
    weight.noise_step += 1
    settings: dict[str, Any] = {
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "correction1": 1 - betas[0] ** count if correct_bias else 1.0,
        "correction2": 1 - betas[1] ** count if correct_bias else 1.0,
        "grad_factor": _grad_factor(weight, grad, exp_avg_s, exp_avg_l),
        "key": weight.noise_key(weight.noise_step),
    }
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = weight.channel_scale
    factor = None
    if weight.learn_scale:
        full_grad = grad if projector is None else weight.grad
        assert full_grad is not None
        factor = _scale_factor_(weight, weight.to_rows(full_grad.reshape(weight.shape)), lr, count)
    if projector is None:
        rows = weight.to_rows(grad)
        if exp_avg_s is not None and ops.is_per_row(exp_avg_s, scale.numel(), grad.numel()):
            if squares is None or settings["grad_factor"] != 1:
                squares = ops.mean_squares(rows, settings["grad_factor"])
            v = exp_avg_s.view(-1)
            torch.add(v * betas[1], squares * (1 - betas[1]), out=v)
        if prepared is not None:
            prepared(residual, rows, lr=lr, **settings)
        else:
            second, first = _in_row_order(weight, exp_avg_s), _in_row_order(weight, exp_avg_l)
            ops.update_(
                weight.packed, residual, scale, rows, second, first, bits=weight.w_bit, lr=lr, dtype=dtype, **settings
            )
            for moment, ordered in ((exp_avg_s, second), (exp_avg_l, first)):
                if moment is not None and ordered is not None and ordered is not moment:
                    moment.copy_(weight.from_rows(ordered))
    else:
        direction = projector.project_back(ops.direction_(grad, exp_avg_s, exp_avg_l, dtype=dtype, **settings))
        rows = weight.to_rows(direction) if direction.shape == weight.shape else direction.view(scale.numel(), -1)
        ops.add_(weight.packed, residual, scale, rows * -lr, bits=weight.w_bit, key=settings["key"])
    if factor is not None:
        scale.mul_(factor)
    if weight_decay:
        # The floor: where the scale is down to lr, one step already moves a whole code.
        size = scale.abs()
        scale.copy_(torch.maximum(size * (1 - lr * weight_decay), size.clamp_max(lr)).copysign(scale))
    weight.count_version_()


def step_float_(
    weight: Tensor,
    exp_avg_s: Tensor,
    exp_avg_l: Tensor | None,
    step: Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    projector: Projector | None,
    grad: Tensor,
) -> None:
    """AdamW for a parameter that is not packed (Loshchilov & Hutter 2019, arXiv:1711.05101), in place.

    As for ``step_``, the caller has checked everything, and records no gradient.
    exp_avg_s: of the gradient's shape, or with one value a row: the row's mean square.  exp_avg_l: may be None.
    """
    count = advance_(step)
    correction1, correction2 = (1 - betas[0] ** count, 1 - betas[1] ** count) if correct_bias else (1.0, 1.0)
    wide = grad.to(exp_avg_s.dtype)
    if exp_avg_s.shape == grad.shape:
        exp_avg_s.mul_(betas[1]).addcmul_(wide, wide, value=1 - betas[1])
    else:
        mean_square = wide.square().flatten(1).mean(1).view_as(exp_avg_s)
        exp_avg_s.mul_(betas[1]).add_(mean_square, alpha=1 - betas[1])
    if exp_avg_l is not None:
        wide = exp_avg_l.mul_(betas[0]).add_(wide, alpha=1 - betas[0]) / correction1
    direction = wide / ((exp_avg_s / correction2).sqrt_() + eps)
    if projector is not None:
        direction = projector.project_back(direction)
    weight.mul_(1 - lr * weight_decay).add_(direction.view_as(weight).to(weight.dtype), alpha=-lr)


def check_finite(grad: Tensor) -> None:
    """Raise ValueError where a gradient has a NaN or Inf entry, or one whose square is beyond float32."""
    if not bool(is_finite(grad)):
        raise ValueError(
            f"the gradient has NaN or Inf entries, or entries beyond {_LARGEST:.0e}; no weight and no state was "
            "changed. Lower the learning rate, or skip such steps (torch.amp.GradScaler does)."
        )


def is_finite(grad: Tensor) -> Tensor:
    """0-dim bool: whether ``check_finite`` lets a gradient pass. On a GPU nobody has waited for it yet."""
    return ops.all_within(grad, _LARGEST)


def prepare_(
    weight: "PackedParameter", grad: Tensor, exp_avg_s: Tensor | None, exp_avg_l: Tensor | None, dtype: torch.dtype
) -> ops.PreparedUpdate | None:
    """The step of a weight by unprojected gradients, prepared; None where there is none."""
    if weight.transposed_groups or dtype == torch.float64 or not ops.is_plain(grad):
        return None
    residual = weight.require_residual_()
    # What is looked at is the kind of the gradient: its own rows would be a copy, where it is channels-last.
    rows = weight.to_rows(grad.new_empty(()).expand(grad.shape))
    tensors = (weight.packed, residual, weight.channel_scale, rows, exp_avg_s, exp_avg_l)
    return ops.prepare_update(*tensors, weight.w_bit, torch.float32)


def squares_of_rows(weight: "PackedParameter", grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """(mean squares of the rows, (R,), which a step of theirs needs; 0-dim bool) from one pass over a gradient.

    The bool is ``is_finite``, but may be False where the gradient just passes. No squares of a gradient whose rows
    would first have to be copied: it is looked at as it is.
    """
    if weight.transposed_groups or not grad.is_contiguous():
        return None, is_finite(grad)
    rows = weight.to_rows(grad)
    squares = ops.mean_squares(rows, 1.0)
    # Squares that add up to less than the square of _LARGEST are below it each; the half is for what was rounded.
    return squares, ops.all_within(squares, 0.5 * _LARGEST**2 / max(1, rows.shape[1]))


def all_true(flags: Iterable[Tensor]) -> bool:
    """Whether 0-dim bool tensors are all True; a GPU is waited for once, however many there are."""
    flags = list(flags)
    waiting = [flag for flag in flags if not flag.is_cpu]
    there = all(bool(flag) for flag in flags if flag.is_cpu)
    return there and (not waiting or bool(torch.stack([flag.to(waiting[0].device) for flag in waiting]).all()))


def advance_(step: Tensor) -> int:
    """Add one to a step counter, in place, and return it."""
    count = int(step.item()) + 1
    step.fill_(count)
    return count


def _check_settings(
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
    step: Tensor | None,
    correct_bias: bool | None,
) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not (float(value) >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and at least 0, got {value}.")
    for name, value in (("beta1", betas[0]), ("beta2", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}.")
    if step is not None and (not isinstance(step, Tensor) or step.numel() != 1):
        raise TypeError("step must be a tensor with one element (it is counted up in place), or None.")
    if correct_bias and step is None:
        raise ValueError("correct_bias=True needs step, a one-element counter tensor.")


def _gradient(
    weight: "PackedParameter", grad: Tensor | None, projector: Projector | None, step: Tensor | None
) -> Tensor:
    if grad is None:
        grad = weight.grad
        if grad is None:
            raise ValueError("there is no gradient: pass grad, or call backward() first.")
        if projector is not None:
            if step is None:
                raise ValueError("a projector that projects qweight.grad needs step, which times its refreshes.")
            check_finite(grad)
            return projector.project(weight.to_rows(grad), int(step.item()))
    if not isinstance(grad, Tensor) or not grad.is_floating_point() or grad.is_sparse:
        raise TypeError(
            f"grad must be a dense floating point tensor, got {getattr(grad, 'dtype', type(grad).__name__)}."
        )
    if projector is None and grad.shape != weight.shape:
        raise ValueError(f"grad must have the weight's shape {tuple(weight.shape)}, got {tuple(grad.shape)}.")
    if grad.device != weight.device:
        raise ValueError(f"grad must be on the weight's device {weight.device}, got {grad.device}.")
    return grad


def _check_projected_back(weight: "PackedParameter", direction: Tensor) -> None:
    rows = weight.channel_scale.numel()
    if tuple(direction.shape) not in (tuple(weight.shape), (rows, weight.numel() // rows)):
        raise ValueError(
            f"the projector must give back shape {(rows, weight.numel() // rows)} or {tuple(weight.shape)}, got "
            f"{tuple(direction.shape)} from a gradient that does not belong to this weight."
        )


def check_moments(
    weight: "PackedParameter", grad: Tensor, exp_avg_s: Tensor | None, exp_avg_l: Tensor | None, *, projected: bool
) -> None:
    for name, moment in (("exp_avg_s", exp_avg_s), ("exp_avg_l", exp_avg_l)):
        if moment is None:
            continue
        if moment.dtype not in _MOMENT_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16, float16 or uint8 (8-bit blocks), got {moment.dtype}."
            )
        if moment.device != grad.device:
            raise ValueError(f"{name} must be on the gradient's device {grad.device}, got {moment.device}.")
        if not moment.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is written in place.")
        if ops.moment_fits(moment, grad.shape):
            continue
        per_channel = moment.dtype == torch.float32 and moment.numel() == weight.channel_scale.numel()
        if projected or name != "exp_avg_s" or not per_channel:
            raise ValueError(
                f"{name} must have the gradient's shape {tuple(grad.shape)} (for 8 bits: ops.new_moment), got "
                f"{tuple(moment.shape)}."
            )


_MOMENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def _grad_factor(weight: "PackedParameter", grad: Tensor, *moments: Tensor | None) -> float:
    """The power of two that brings the first gradient to a root mean square near 1, for float16 moments; 1 for others.

    float16 holds nothing below 6e-8, which is the square of a gradient of 2.4e-4, and nothing beyond 65504. Adam's
    direction does not depend on the factor as long as it stays the same (eps is multiplied too), so the parameter keeps
    its exponent. Where gradients have grown by more than 2**6 since, exponent and moments come down together.
    """
    if not any(moment is not None and moment.dtype == torch.float16 for moment in moments):
        return 1.0
    held = [moment if moment is not None and moment.dtype == torch.float16 else None for moment in moments]
    rms = float(torch.linalg.vector_norm(grad, dtype=torch.float32)) / math.sqrt(max(1, grad.numel()))
    rms = min(rms, _LARGEST)  # the sum of squares may be beyond float32
    if rms > 0:
        fitting = min(100, -round(math.log2(rms)))
        if weight.grad_exponent is None:
            weight.grad_exponent = fitting
        elif fitting < weight.grad_exponent - 6:
            for moment, power in zip(held, (2, 1), strict=True):
                if moment is not None:
                    moment.mul_(2.0 ** (power * (fitting - weight.grad_exponent)))
            weight.grad_exponent = fitting
    return 2.0 ** (weight.grad_exponent or 0)


def _in_row_order(weight: "PackedParameter", moment: Tensor | None) -> Tensor | None:
    """The moment in the order of the codes: a transposed weight's gradient has another. 8 bits follow the codes."""
    if moment is None or not weight.transposed_groups or moment.shape != weight.shape:
        return moment
    return weight.to_rows(moment).contiguous()


def _scale_factor_(weight: "PackedParameter", grad_rows: Tensor, lr: float, count: int) -> Tensor:
    """Advance the moments of a learned scale and return what to multiply it by: (R,), near 1.

    The gradient of a scale is the sum over its channel of gradient * code. The step is multiplicative, at the weights'
    rate: Adam's absolute step would be too coarse for a scale of 0.01. What moves is thus the size of the scale, whose
    gradient has the other sign where the scale is negative.
    """
    rows = weight.to_rows(weight.codes)
    grad = ops.tree_sum(grad_rows.to(torch.float32) * rows) * weight.channel_scale.sign()
    if weight.scale_moments is None:
        weight.scale_moments = torch.zeros(2, grad.numel(), dtype=torch.float32, device=grad.device)
    (m, v), (beta1, beta2) = weight.scale_moments, _SCALE_BETAS
    m.copy_(m * beta1 + grad * (1 - beta1))
    v.copy_(v * beta2 + grad * grad * (1 - beta2))
    count = max(count, 1)
    direction = (m * (1 / (1 - beta1**count))) / ((v * (1 / (1 - beta2**count))).sqrt() + 1e-12)
    return (1 - lr * direction).clamp(0.5, 2.0)
