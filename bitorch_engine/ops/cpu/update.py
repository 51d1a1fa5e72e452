"""The step of packed weights, and what is asked of their gradients before it."""

import ctypes

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bitorch_engine.bits import bit_format, check_packed
from bitorch_engine.ops.cpu.loading import FLOAT, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.reference import update as reference
from bitorch_engine.ops.reference.levels import step_key

_update = function("be_update", POINTER, INT)
_within = function("be_within", POINTER, INT64, FLOAT, INT, result=INT)
_mean_squares = function("be_mean_squares", POINTER, INT, FLOAT, INT64, INT64, POINTER, INT)

_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
"""csrc/update/update.h's numbers of the ways to store a moment; 0 is none."""


class _Step(ctypes.Structure):
    """csrc/update/update.cpp: Step, and in front of it StepRule."""

    _fields_ = (
        ("bits", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "least", "grad_factor")),
        *((name, ctypes.c_int) for name in ("grad_bf16", "first_kind", "second_kind")),
        ("key", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in ("levels", "factor", "row_least")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("packed", "residual", "scale", "grad", "first", "second", "row_second")),
    )


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
    held = [tensor for tensor in (packed, residual, scale, exp_avg_s, exp_avg_l) if tensor is not None]
    if (
        dtype != torch.float32
        or grad.dtype not in (torch.float32, torch.bfloat16)
        or scale.dtype != torch.float32
        or (exp_avg_s is not None and exp_avg_s.dtype not in _KINDS)
        or (exp_avg_l is not None and exp_avg_l.dtype not in _KINDS)
        or not all(map(Tensor.is_contiguous, held))
    ):
        reference.update_(
            packed, residual, scale, grad, exp_avg_s, exp_avg_l, bits, lr, beta1, beta2, eps, correction1, correction2,
            grad_factor, dtype, key,
        )  # fmt: skip
        return
    grad = grad.contiguous()
    rows, columns = grad.shape
    factor, least = reference.step_constants(exp_avg_s, lr, eps * grad_factor, correction1, correction2, exp_avg_l)
    per_row = reference.is_per_row(exp_avg_s, rows, grad.numel())
    if per_row and exp_avg_s is not None and exp_avg_s.dtype != torch.float32:
        raise TypeError(f"a second moment of one value a row must be float32, got {exp_avg_s.dtype}.")
    form = bit_format(bits)
    check_packed(packed, grad.numel(), bits)
    if form.hidden_bits:
        check_packed(residual, grad.numel(), form.hidden_bits)
    moment = 0 if exp_avg_s is None else exp_avg_s.data_ptr()
    step = _Step(
        bits, beta1, 1 - beta1, beta2, 1 - beta2, least, grad_factor,
        grad.dtype == torch.bfloat16,
        0 if exp_avg_l is None else _KINDS[exp_avg_l.dtype],
        0 if exp_avg_s is None or per_row else _KINDS[exp_avg_s.dtype],
        step_key(key),
        (1 << form.hidden_bits) / form.step, -factor, least,
        rows, columns,
        packed.data_ptr(), residual.data_ptr(), scale.data_ptr(), grad.data_ptr(),
        0 if exp_avg_l is None else exp_avg_l.data_ptr(),
        0 if per_row else moment,
        moment if per_row else 0,
    )  # fmt: skip
    _update(ctypes.addressof(step), threads())
    # A kernel writes behind torch's back: what was made from the packed weight, and saved by autograd, must tell.
    written = (packed, residual, None if per_row else exp_avg_s, exp_avg_l)
    increment_version([tensor for tensor in written if tensor is not None and not tensor.is_inference()])


def add_(packed: Tensor, residual: Tensor, scale: Tensor, delta: Tensor, bits: int, key: int) -> None:
    update_(
        packed, residual, scale, delta if delta.dtype == torch.bfloat16 else delta.to(torch.float32), None, None,
        bits=bits, lr=-1.0, beta1=0.0, beta2=0.0, eps=0.0, correction1=1.0, correction2=1.0, grad_factor=1.0,
        dtype=torch.float32, key=key,
    )  # fmt: skip


def all_within(values: Tensor, limit: float) -> Tensor:
    if values.dtype != torch.float32 or not (
        values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    ):
        return reference.all_within(values, limit)
    return torch.scalar_tensor(_within(values.data_ptr(), values.numel(), limit, threads()) != 0, dtype=torch.bool)


def mean_squares(grad: Tensor, factor: float) -> Tensor:
    if grad.dtype not in (torch.float32, torch.bfloat16) or grad.numel() == 0:
        return reference.mean_squares(grad, factor)
    grad = grad.contiguous()
    out = reference.mean_squares_fake(grad, factor)
    bf16 = grad.dtype == torch.bfloat16
    _mean_squares(grad.data_ptr(), bf16, factor, *grad.shape, out.data_ptr(), threads())
    return out
