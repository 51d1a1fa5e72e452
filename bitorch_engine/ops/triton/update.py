"""The step of packed weights in one pass, the check of their gradients: bit for bit what the reference does.

No sum is left open to contraction: every kernel here is compiled without fused multiply-adds, and division and square
root round to nearest. What changes from step to step (rate, corrections, key) is an argument that nothing is
compiled for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from bitorch_engine.bits import bit_format
from bitorch_engine.ops.reference import update as reference
from bitorch_engine.ops.reference.levels import step_key
from bitorch_engine.ops.reference.noise import as_int32
from bitorch_engine.ops.triton.bits import MOST_IN_INT32, row_of, spread
from bitorch_engine.ops.triton.floats import widened
from bitorch_engine.ops.triton.launch import blocks_of, power_of_two
from bitorch_engine.ops.triton.levels import load_levels, moved, store_levels
from bitorch_engine.ops.triton.moments import from_element, load_moment, store_moment
from bitorch_engine.ops.triton.noise import in_second_half, noise_bits

_BLOCKS = 16
"""Runs of 128 elements that one program moves."""

_BLOCK = 4096
"""Elements of one program that only looks."""

_ROW = 1 << 15
"""Elements of a row of which one program makes the mean square; the reference does longer ones."""

_TILE = 1024
"""Elements of several rows in one program."""

_MOMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_GRADS = (torch.float32, torch.bfloat16, torch.float16)


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
    if grad.numel() == 0:
        return
    rows, columns = grad.shape
    per_row = reference.is_per_row(exp_avg_s, rows, grad.numel())
    moments = [moment for moment in (exp_avg_s, exp_avg_l) if moment is not None]
    held = [packed, residual, scale, *moments]
    if (
        dtype != torch.float32
        or grad.dtype not in _GRADS
        or scale.dtype != torch.float32
        or columns > MOST_IN_INT32
        or any(moment.dtype not in _MOMENTS or moment.data_ptr() % 4 for moment in moments)
        or not all(tensor.is_contiguous() for tensor in held)
    ):
        reference.update_(
            packed, residual, scale, grad, exp_avg_s, exp_avg_l, bits, lr, beta1, beta2, eps, correction1, correction2,
            grad_factor, dtype, key,
        )  # fmt: skip
        return
    grad = grad.contiguous()
    factor, least = reference.step_constants(exp_avg_s, lr, eps * grad_factor, correction1, correction2, exp_avg_l)
    form = bit_format(bits)
    levels = (1 << form.hidden_bits) / form.step
    count = grad.numel()
    grid = (blocks_of(count, _BLOCKS * 128),)
    _update[grid](
        packed, residual, scale, exp_avg_s if per_row else None, grad, None if per_row else exp_avg_s, exp_avg_l,
        count, columns, as_int32(step_key(key)),
        beta1, 1 - beta1, beta2, 1 - beta2, least, grad_factor, -factor,
        BITS=bits, LEVELS=levels, BLOCKS=_BLOCKS,
        WORDS=count % 8 == 0 and packed.data_ptr() % 4 == 0 and residual.data_ptr() % 4 == 0,
        WHOLE_GROUPS=columns % 8 == 0, WHOLE_TILES=count % (_BLOCKS * 128) == 0,
        enable_fp_fusion=False,
    )  # fmt: skip
    # A kernel writes behind torch's back: what was made from the packed weight, and saved by autograd, must tell.
    written = (packed, residual, None if per_row else exp_avg_s, exp_avg_l)
    increment_version([tensor for tensor in written if tensor is not None and not tensor.is_inference()])


def add_(packed: Tensor, residual: Tensor, scale: Tensor, delta: Tensor, bits: int, key: int) -> None:
    update_(
        packed, residual, scale, delta if delta.dtype in _GRADS else delta.to(torch.float32), None, None,
        bits=bits, lr=-1.0, beta1=0.0, beta2=0.0, eps=0.0, correction1=1.0, correction2=1.0, grad_factor=1.0,
        dtype=torch.float32, key=key,
    )  # fmt: skip


def all_within(values: Tensor, limit: float) -> Tensor:
    dense = values.is_contiguous() or (values.dim() > 1 and values.movedim(1, -1).is_contiguous())
    if values.dtype != torch.float32 or values.numel() == 0 or not dense:
        return reference.all_within(values, limit)
    within = torch.ones((), dtype=torch.bool, device=values.device)
    grid = (blocks_of(values.numel(), _BLOCK),)
    _find_beyond[grid](values, within, values.numel(), limit, BLOCK=_BLOCK)
    return within


def mean_squares(grad: Tensor, factor: float) -> Tensor:
    rows, columns = grad.shape
    if grad.dtype not in _GRADS or grad.numel() == 0 or columns > _ROW:
        return reference.mean_squares(grad, factor)
    out = reference.mean_squares_fake(grad, factor)
    padded = power_of_two(columns)
    height = max(1, _TILE // padded)
    grid = (blocks_of(rows, height),)
    _mean_squares[grid](
        grad.contiguous(), out, rows, columns, 1 / columns, factor,
        HEIGHT=height, PADDED=padded, LOG=padded.bit_length() - 1,
        num_warps=min(16, max(4, padded // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["columns", "key"])
def _update(
    packed, residual, scale, row_second, grad, exp_avg_s, exp_avg_l, count, columns, key,
    beta1, rest1, beta2, rest2, least, grad_factor, factor,
    BITS: tl.constexpr, LEVELS: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, WHOLE_GROUPS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """Runs of 128 elements, each in two halves, since halves share noise.

    row_second: a second moment of one value a row, or None.  WHOLE_GROUPS: eight elements side by side are of one
    row.  WHOLE_TILES: every program has all its elements, so that masks are constant, and the compiler drops them.
    """
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 128)
    left = BLOCKS * 128 if WHOLE_TILES else tl.minimum(count - start, BLOCKS * 128).to(tl.int32)
    run = tl.arange(0, BLOCKS)[:, None] * 128
    place = tl.arange(0, 64)[None, :]
    noise = noise_bits(start, run + place, key)
    noise2 = in_second_half(noise)

    m = _gradient(grad + start, run + place, left, grad_factor)
    m2 = _gradient(grad + start, run + place + 64, left, grad_factor)
    v, v2 = m, m2
    if exp_avg_s is not None:
        second = from_element(exp_avg_s, start)
        v = load_moment(second, run, place, left, False) * beta2 + m * m * rest2
        v2 = load_moment(second, run, place + 64, left, False) * beta2 + m2 * m2 * rest2
        store_moment(second, run, place, left, v, noise, v2, noise2, False)
    if exp_avg_l is not None:
        first = from_element(exp_avg_l, start)
        m = load_moment(first, run, place, left, True) * beta1 + m * rest1
        m2 = load_moment(first, run, place + 64, left, True) * beta1 + m2 * rest1
        store_moment(first, run, place, left, m, noise, m2, noise2, True)

    group = run // 8 + tl.arange(0, 8)[None, :]
    move = m * _rate(scale, row_second, start, group, left, columns, factor, least, LEVELS, WHOLE_GROUPS)
    move2 = m2 * _rate(scale, row_second, start, group + 8, left, columns, factor, least, LEVELS, WHOLE_GROUPS)
    if exp_avg_s is not None:
        move = tl.div_rn(move, tl.sqrt_rn(v) + least)
        move2 = tl.div_rn(move2, tl.sqrt_rn(v2) + least)
    packed += start // 8 * BITS
    residual += start // 8 * (8 - BITS)
    level = load_levels(packed, residual, group, left, BITS, WORDS)
    level2 = load_levels(packed, residual, group + 8, left, BITS, WORDS)
    store_levels(packed, residual, group, left, moved(level, move, noise), BITS, WORDS)
    store_levels(packed, residual, group + 8, left, moved(level2, move2, noise2), BITS, WORDS)


@triton.jit
def _gradient(grad, at, left, grad_factor):
    return widened(tl.load(grad + at, mask=at < left, other=0.0)) * grad_factor


@triton.jit
def _rate(
    scale, row_second, start, group, left, columns, factor, least, LEVELS: tl.constexpr, WHOLE_GROUPS: tl.constexpr
):  # fmt: skip
    """Levels by which a moment of 1 moves the elements of a tile, with the sign of the step."""
    inside = group * 8
    if not WHOLE_GROUPS:
        inside = spread(inside) + tl.arange(0, 64)[None, :] % 8
    row = row_of(start, inside, columns)
    mask = inside < left
    value = tl.div_rn(1.0, tl.load(scale + row, mask=mask, other=1.0)) * LEVELS * factor
    if row_second is not None:
        value = tl.div_rn(value, tl.sqrt_rn(tl.load(row_second + row, mask=mask, other=1.0)) + least)
    value = tl.minimum(tl.maximum(value, -1e30), 1e30)
    return spread(value) if WHOLE_GROUPS else value


@triton.jit(do_not_specialize=["rows", "columns"])
def _mean_squares(
    grad, out, rows, columns, part, factor, HEIGHT: tl.constexpr, PADDED: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """Mean square of each row of ``grad * factor``. part: 1 / columns, rounded.

    HEIGHT rows a program, filled up to PADDED columns, a power of two. Squares are added as ``tree_sum`` does: the
    upper half to the lower half, a sum of two each time.
    """
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    g = widened(tl.load(grad + row[:, None] * columns + column[None, :], mask=mask, other=0.0)) * factor
    squares = g * g
    for halving in tl.static_range(LOG):
        squares = tl.sum(tl.reshape(squares, (HEIGHT, 2, PADDED >> (halving + 1))), axis=1)
    tl.store(out + row, tl.reshape(squares, (HEIGHT,)) * part, mask=row < rows)


@triton.jit
def _find_beyond(values, within, count, limit, BLOCK: tl.constexpr):
    """Write 0 into ``within`` where a value is not between -limit and limit; whoever finds one writes the same."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < count, other=0.0)
    beyond = tl.max((~(tl.abs(value) < limit)).to(tl.int32), axis=0)
    tl.store(within, 0, mask=beyond > 0)
