"""What torch's operators do when a packed parameter is among their arguments.

A handful have a handler in the table below. In-place operators (those of every optimizer) read the weight with its
residual, compute in float and write the difference back. All others see the dequantized tensor: correct first.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from bitorch_engine import ops
from bitorch_engine.parameters.float_view import FloatView, is_written

if TYPE_CHECKING:
    from bitorch_engine.parameters.packed import PackedParameter

aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {}


def dispatch(packed_type: type["PackedParameter"], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator of which at least one argument is a ``packed_type``."""
    handler = _HANDLERS.get(func)
    if handler is not None and isinstance(args[0], packed_type):
        return handler(func, *args, **kwargs)
    if func.namespace == "c10d":
        return _communicate(packed_type, func, args, kwargs)
    if _is_mutable(func):
        return _mutate(packed_type, func, args, kwargs)
    if func is aten.convolution_backward.default and isinstance(args[2], packed_type) and args[0].is_cpu:
        return _convolution_backward(func, *args)
    if func is aten.convolution.default and _is_of_few(packed_type, *args):
        x, weight, bias, *geometry = args
        head = (x, weight.packed, weight.channel_scale, weight.w_bit, bias, weight.shape)
        return ops.conv_weight_only(*head, *_in_each_dimension(weight.dim() - 2, *geometry), ())
    recorded = torch.is_grad_enabled() and any(isinstance(a, packed_type) and a.requires_grad for a in args)
    channels_last = func in _CONVOLUTIONS and ops.is_channels_last(args[0])
    args, kwargs = _dequantize((args, kwargs), packed_type, channels_last)
    result = func(*args, **kwargs)
    if recorded or not any(returned.alias_info for returned in func._schema.returns):
        return result  # autograd itself refuses to write through a view of a leaf that requires grad
    return tree_map(lambda out: FloatView(out) if type(out) is Tensor else out, result)


def _is_mutable(func: Any) -> bool:
    """Whether an operator writes to an argument. torch.compile cannot look into schemas, from torch 2.14 on."""
    return bool(func._schema.is_mutable)


# What torch.compiler.assume_constant_result does, but that loads all of the compiler, and Triton.
_is_mutable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _handles(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


@_handles(aten.detach.default, aten.alias.default)
def _share(func: Any, x: "PackedParameter") -> Any:
    return return_and_correct_aliasing(func, (x,), {}, x._with(x._inner()))


@_handles(aten.clone.default)
def _clone(func: Any, x: "PackedParameter", *, memory_format: Any = None) -> Any:
    return x._with({name: None if t is None else t.clone() for name, t in x._inner().items()})


@_handles(aten._to_copy.default)
def _to_copy(
    func: Any,
    x: "PackedParameter",
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    layout: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Any:
    """Moves the inner tensors; a new dtype is how the weight looks from now on, its codes and scale stay."""
    if dtype is not None and not dtype.is_floating_point:
        return x.dequantize().to(dtype=dtype, device=device)
    inner = {
        name: None if t is None else t.to(device=device, non_blocking=non_blocking, copy=True)
        for name, t in x._inner().items()
    }
    return x._with(inner, dtype)


@_handles(aten.empty_like.default)
def _empty_like(
    func: Any, x: "PackedParameter", *, dtype: torch.dtype | None = None, device: Any = None, **ignored: Any
) -> Any:
    return x._with({n: None if t is None else torch.empty_like(t, device=device) for n, t in x._inner().items()}, dtype)


@_handles(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)
def _float_like(func: Any, x: "PackedParameter", *args: Any, **kwargs: Any) -> Tensor:
    """Plain float tensors, for optimizer state, made without dequantizing."""
    return func(torch.empty(x.shape, dtype=x.dtype, device=x.device), *args, **kwargs)


@_handles(aten.copy_.default)
def _copy_(func: Any, x: "PackedParameter", source: Tensor, non_blocking: bool = False) -> "PackedParameter":
    if not hasattr(source, "channel_scale"):
        x.take_(source.expand(x.shape))
    elif source is not x:
        x._adopt_(source)  # type: ignore[arg-type]
    return x


@_handles(
    aten.normal_.default,
    aten.uniform_.default,
    aten.log_normal_.default,
    aten.exponential_.default,
    aten.cauchy_.default,
)
def _randomize_(func: Any, x: "PackedParameter", *args: Any, **kwargs: Any) -> "PackedParameter":
    """New values, so a new scale too: what torch.nn.init does to a weight."""
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return x.quantize_(func(values, *args, **kwargs))


@_handles(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill_(func: Any, x: "PackedParameter", value: Any = 0) -> "PackedParameter":
    """What the grid of codes has, as zero from 2 bits on, is written with the scale there is; another constant brings
    its own."""
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device).fill_(value)
    if x.on_grid(x.to_rows(values)) is not None:
        x.write_(values)
    else:
        x.quantize_(values)
    return x


@_handles(aten.resize_.default, aten.resize_as_.default)
def _resize_(func: Any, x: "PackedParameter", size: Any, *, memory_format: Any = None) -> "PackedParameter":
    """Its own size changes nothing: codes have one order in memory, whatever the order asked for."""
    size = tuple(size.shape if isinstance(size, Tensor) else size)
    if size != tuple(x.shape):
        raise NotImplementedError(_SHAPE_STAYS.format(func, type(x).__name__))
    return x


_SHAPE_STAYS = (
    "{} is not supported for packed weights, whose shape and memory cannot be changed in place: change "
    "weight.dequantize(), and make a new {} of it."
)


@_handles(aten.erfinv_.default)
def _erfinv_(func: Any, x: "PackedParameter") -> "PackedParameter":
    raise NotImplementedError(
        "erfinv_ on a packed weight is not supported. torch.nn.init.trunc_normal_ of torch 2.11 calls it; draw into a "
        "float tensor: weight.quantize_(torch.nn.init.trunc_normal_(torch.empty(weight.shape)))."
    )


@_disable_dynamo
def _mutate(packed_type: type["PackedParameter"], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that writes. Only the first argument may be packed and written; it is then updated in place."""
    schema = func._schema
    written = [i for i, argument in enumerate(schema.arguments) if is_written(argument)]
    in_lists = any(
        isinstance(args[i], (list, tuple)) and any(isinstance(t, packed_type) for t in args[i])
        for i in written
        if i < len(args)
    )
    if in_lists and "lerp" in func.__name__:
        raise NotImplementedError(
            f"{func} writes lists of tensors, which packed weights do not take. Averages of weights (multi_avg_fn in "
            "torch.optim.swa_utils) belong in floats: average weight.dequantize(), and put it back with quantize_."
        )
    if in_lists:
        raise NotImplementedError(
            f"{func} writes lists of tensors and is not supported for packed weights; for an optimizer, pass "
            "foreach=False and fused=False, or use bitorch_engine.optim.DiodeMix."
        )
    if not any(isinstance(args[i], packed_type) for i in written if i < len(args)):
        if isinstance(kwargs.get("out"), packed_type):
            raise NotImplementedError(f"out= cannot be a packed weight (in {func}); use its copy_ instead.")
        args, kwargs = _dequantize((args, kwargs), packed_type)
        return func(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(_SHAPE_STAYS.format(func, type(args[0]).__name__))
    if written != [0]:
        raise NotImplementedError(f"{func} is not supported for packed weights; work on weight.dequantize().")
    x = args[0]
    values = x.from_rows(x.level_values())
    rest, kwargs = _dequantize((args[1:], kwargs), packed_type)
    x.write_(func(values, *rest, **kwargs))
    return x


def _communicate(packed_type: type["PackedParameter"], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.distributed.broadcast of a packed weight sends what it stores, so that all ranks hold the same bits.

    Other collectives would write to a copy; their schemas do not say that they write.
    """
    if func._schema.name != "c10d::broadcast_":
        raise NotImplementedError(
            f"{func} is not supported for packed weights: reduce their gradients, or broadcast them."
        )
    (tensor,) = args[0]
    tensor.require_residual_()
    tensor.noise_seed = None
    result = None
    for inner in tensor._inner().values():
        if inner is not None and inner.numel():
            _, result = func([inner], *args[1:], **kwargs)
            result.wait()
    return [tensor], result


def _convolution_backward(
    func: Any, grad: Tensor, x: Tensor, weight: "PackedParameter", bias_sizes: Any, *rest: Any
) -> tuple[Tensor | None, ...]:
    """The weight's gradient does not depend on the weight, and there may be a faster way to it than torch's."""
    *geometry, (need_x, need_weight, need_bias) = rest
    grad_x = grad_weight = grad_bias = None
    if need_weight:
        each = _in_each_dimension(weight.dim() - 2, *geometry)
        grad_weight = ops.conv_grad_weight_dense(grad, x, weight.shape, *each, ())
    if need_bias:  # with which torch would make the weight's gradient too
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    if need_x:
        dense = weight.dequantize(channels_last=ops.is_channels_last(grad))
        grad_x, _, _ = func(grad, x, dense, bias_sizes, *geometry, [True, False, False])
    return grad_x, grad_weight, grad_bias


def _in_each_dimension(rank: int, *geometry: Any) -> tuple[Any, ...]:
    """The geometry of torch's operator, which takes one number for all dimensions too, as of padding="valid"."""
    return tuple(list(g) * rank if isinstance(g, (list, tuple)) and len(g) == 1 else g for g in geometry)


def _is_of_few(packed_type: type["PackedParameter"], x: Any, weight: Any, bias: Any, *geometry: Any) -> bool:
    """Whether a kernel may convolve these, whose pixels have few channels. What a compiler traces stays torch's
    convolution, into which it can look."""
    *_, transposed, _, groups = geometry
    return (
        isinstance(weight, packed_type)
        and not transposed
        and groups == 1
        and weight.shape[1] <= ops.FEW_CHANNELS
        and x.dtype is weight.dtype
        and all(ops.is_plain(t) and t.dtype is x.dtype for t in (x, bias) if t is not None)
    )


_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
"""Operators whose weight should be in the order of the tensor that they take first: else they copy it."""


def _dequantize(tree: Any, packed_type: type["PackedParameter"], channels_last: bool = False) -> Any:
    def dense(leaf: Any) -> Any:
        return leaf.dequantize(channels_last=channels_last) if isinstance(leaf, packed_type) else leaf

    return tree_map(dense, tree)
