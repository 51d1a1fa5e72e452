"""One optimizer step of packed weights."""

import ctypes

import torch
from torch import Tensor

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.cpu.loading import DTYPES, POINTER, function, threads
from bitorch_engine.ops.reference import update as reference
from bitorch_engine.ops.reference.levels import CODE_STREAM
from bitorch_engine.ops.reference.noise import noise_key
from bitorch_engine.ops.reference.update import MOMENT_STREAM

_update = function("be_update", POINTER)

# MomentKind of csrc/update/update.h
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
_CHANNEL = 5


class _Arguments(ctypes.Structure):
    """UpdateArguments of csrc/update/update.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "residual", "scale", "grad", "exp_avg_s", "exp_avg_l")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "grad_dtype", "s_kind", "l_kind", "bits", "threads")),
        ("add", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("moment_key", "code_key")),
        *((name, ctypes.c_float) for name in ("levels_per_scale", "lr", "grad_factor", "beta1", "one_minus_beta1")),
        *((name, ctypes.c_float) for name in ("beta2", "one_minus_beta2", "inverse_correction1")),
        *((name, ctypes.c_float) for name in ("inverse_correction2", "eps", "inverse_columns")),
    )


def update_(
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
    s_kind, l_kind = _kind(exp_avg_s, grad), _kind(exp_avg_l, grad)
    if dtype != torch.float32 or grad.dtype not in DTYPES or s_kind is None or l_kind is None:
        reference.update(
            packed,
            residual,
            scale,
            grad,
            exp_avg_s,
            exp_avg_l,
            bits,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            correction1=correction1,
            correction2=correction2,
            grad_factor=grad_factor,
            dtype=dtype,
            key=key,
        )
        return
    grad = grad.contiguous()
    arguments = _arguments(packed, residual, scale, grad, bits, key)
    arguments.s_kind, arguments.l_kind = s_kind, l_kind
    arguments.exp_avg_s = None if exp_avg_s is None else exp_avg_s.data_ptr()
    arguments.exp_avg_l = None if exp_avg_l is None else exp_avg_l.data_ptr()
    arguments.moment_key = noise_key(key, MOMENT_STREAM)
    arguments.lr, arguments.grad_factor = lr, grad_factor
    arguments.beta1, arguments.one_minus_beta1 = beta1, 1 - beta1
    arguments.beta2, arguments.one_minus_beta2 = beta2, 1 - beta2
    arguments.inverse_correction1, arguments.inverse_correction2 = 1 / correction1, 1 / correction2
    arguments.eps = eps * grad_factor
    arguments.inverse_columns = 1 / max(1, grad.shape[1])
    _run(arguments, packed, residual, exp_avg_s, exp_avg_l)


def add_(packed: Tensor, residual: Tensor, scale: Tensor, delta: Tensor, bits: int, key: int) -> None:
    if delta.dtype not in DTYPES:
        reference.add(packed, residual, scale, delta, bits, key)
        return
    delta = delta.contiguous()
    arguments = _arguments(packed, residual, scale, delta, bits, key)
    arguments.add = 1
    _run(arguments, packed, residual)


def _arguments(packed: Tensor, residual: Tensor, scale: Tensor, grad: Tensor, bits: int, key: int) -> _Arguments:
    form = bit_format(bits)
    return _Arguments(
        packed=packed.data_ptr(),
        residual=residual.data_ptr(),
        scale=scale.data_ptr(),
        grad=grad.data_ptr(),
        rows=grad.shape[0],
        columns=grad.shape[1],
        grad_dtype=DTYPES[grad.dtype],
        bits=bits,
        threads=threads(),
        code_key=noise_key(key, CODE_STREAM),
        levels_per_scale=(1 << form.hidden_bits) / form.step,
    )


def _run(arguments: _Arguments, *written: Tensor | None) -> None:
    if arguments.rows and arguments.columns:
        _update(ctypes.addressof(arguments))
    for tensor in written:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _kind(moment: Tensor | None, grad: Tensor) -> int | None:
    """How a moment is stored; None for what the kernel does not have."""
    if moment is None:
        return 0
    if moment.dtype != torch.uint8 and moment.numel() == grad.shape[0] != grad.numel():
        return _CHANNEL if moment.dtype == torch.float32 else None
    return _KINDS.get(moment.dtype)
