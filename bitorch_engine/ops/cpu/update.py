"""The step of packed weights, and what is asked of their gradients before it."""

import ctypes
from operator import is_

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bitorch_engine.bits import bit_format, check_packed
from bitorch_engine.ops.cpu.loading import FLOAT, INT, INT64, POINTER, function, threads
from bitorch_engine.ops.library import is_plain, unobserved
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


class Update:
    """``update_`` of one weight for gradients of one kind: what does not change between steps is looked at once."""

    def __init__(
        self,
        packed: Tensor,
        residual: Tensor,
        scale: Tensor,
        grad: Tensor,
        exp_avg_s: Tensor | None,
        exp_avg_l: Tensor | None,
        bits: int,
    ) -> None:
        rows, columns = grad.shape
        per_row = reference.is_per_row(exp_avg_s, rows, grad.numel())
        if per_row and exp_avg_s is not None and exp_avg_s.dtype != torch.float32:
            raise TypeError(f"a second moment of one value a row must be float32, got {exp_avg_s.dtype}.")
        form = bit_format(bits)
        check_packed(packed, grad.numel(), bits)
        if form.hidden_bits:
            check_packed(residual, grad.numel(), form.hidden_bits)
        # A weight may drop its residual, which nobody should keep then; each one that it has is of the same size.
        self._kept = (packed, scale, exp_avg_s, exp_avg_l)
        self._places = _places(residual, *self._kept)
        self._grad_kind = (grad.dtype, grad.numel())
        written = (packed, None if per_row else exp_avg_s, exp_avg_l)
        self._written = [tensor for tensor in written if tensor is not None and not tensor.is_inference()]
        first, second = (0 if moment is None else moment.data_ptr() for moment in (exp_avg_l, exp_avg_s))
        # Zeros stand for what each step brings.
        self._step = _Step(
            bits, 0, 0, 0, 0, 0, 0,
            grad.dtype == torch.bfloat16,
            0 if exp_avg_l is None else _KINDS[exp_avg_l.dtype],
            0 if exp_avg_s is None or per_row else _KINDS[exp_avg_s.dtype],
            0, (1 << form.hidden_bits) / form.step, 0, 0,
            rows, columns,
            packed.data_ptr(), residual.data_ptr(), scale.data_ptr(), 0, first, 0 if per_row else second,
            second if per_row else 0,
        )  # fmt: skip

    def fits(
        self,
        packed: Tensor,
        residual: Tensor | None,
        scale: Tensor,
        grad: Tensor,
        exp_avg_s: Tensor | None,
        exp_avg_l: Tensor | None,
    ) -> bool:
        """Whether these are the tensors that it was made of, where they were, and a gradient such as it takes."""
        kept = (packed, scale, exp_avg_s, exp_avg_l)
        return (
            all(map(is_, kept, self._kept))
            and _places(residual, *kept) == self._places
            and (grad.dtype, grad.numel()) == self._grad_kind
            and is_plain(grad)
            and unobserved()
        )

    def __call__(
        self,
        residual: Tensor,
        grad: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        correction1: float,
        correction2: float,
        grad_factor: float,
        key: int,
    ) -> None:
        grad = grad.contiguous()
        *_, exp_avg_s, exp_avg_l = self._kept
        factor, least = reference.step_constants(exp_avg_s, lr, eps * grad_factor, correction1, correction2, exp_avg_l)
        step = self._step
        step.beta1, step.rest1, step.beta2, step.rest2 = beta1, 1 - beta1, beta2, 1 - beta2
        step.least = step.row_least = least
        step.grad_factor, step.factor = grad_factor, -factor
        step.key, step.grad = step_key(key), grad.data_ptr()
        _update(ctypes.addressof(step), threads())
        # A kernel writes behind torch's back: what was made from the packed weight, and saved by autograd, must tell.
        increment_version(self._written if residual.is_inference() else [residual, *self._written])


def _places(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def prepare(
    packed: Tensor,
    residual: Tensor,
    scale: Tensor,
    grad: Tensor,
    exp_avg_s: Tensor | None,
    exp_avg_l: Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> Update | None:
    """The update of a weight in ``dtype``; None where the kernel has none."""
    held = [tensor for tensor in (packed, residual, scale, exp_avg_s, exp_avg_l) if tensor is not None]
    if (
        dtype != torch.float32
        or grad.dtype not in (torch.float32, torch.bfloat16)
        or scale.dtype != torch.float32
        or (exp_avg_s is not None and exp_avg_s.dtype not in _KINDS)
        or (exp_avg_l is not None and exp_avg_l.dtype not in _KINDS)
        or not all(map(Tensor.is_contiguous, held))
    ):
        return None
    return Update(packed, residual, scale, grad, exp_avg_s, exp_avg_l, bits)


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
    prepared = prepare(packed, residual, scale, grad, exp_avg_s, exp_avg_l, bits, dtype)
    if prepared is None:
        reference.update_(
            packed, residual, scale, grad, exp_avg_s, exp_avg_l, bits, lr, beta1, beta2, eps, correction1, correction2,
            grad_factor, dtype, key,
        )  # fmt: skip
        return
    prepared(
        residual, grad, lr=lr, beta1=beta1, beta2=beta2, eps=eps, correction1=correction1, correction2=correction2,
        grad_factor=grad_factor, key=key,
    )  # fmt: skip


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
