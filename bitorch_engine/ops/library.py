"""Registration with torch.library: one schema, one reference and one shape function per op; backends go over it."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAMESPACE = "bitorch_engine"

# Library.define and .impl cost 3 us a call; torch.library.custom_op, which does the same, 9.5.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


_references: dict[str, Callable[..., Any]] = {}


def defined() -> list[str]:
    """Names of all ops, in their order."""
    return list(_references)


def reference_of(name: str) -> Callable[..., Any]:
    """The plain PyTorch that defines an op."""
    return _references[name]


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Define an op and return what calls it, tensors by position.

    schema: "name(Tensor x, int bits) -> Tensor".
    reference: plain PyTorch; it is the definition, and what runs where no backend has the op.
    fake: gives outputs of the right shape, dtype and strides from inputs without data; None where nothing is returned.
    """
    name = schema.partition("(")[0]
    _references[name] = reference
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or (lambda *args, **kwargs: None), lib=_LIBRARY)
    return _caller(name, getattr(getattr(torch.ops, NAMESPACE), name).default)


Plan = Callable[[Tensor, Sequence[Tensor] | None, Tensor, Tensor, Tensor | None], Tensor | None]
"""A call that is prepared for an ``x`` of one kind: (x, sources, packed, channel_scale, bias) to the result, or None
where one of these has changed since. To be called where ``unheard()``, with an ``x`` of ``kind_of`` the first one."""


def plan(name: str, sources: Sequence[Tensor] | None, x: Tensor, *args: Any) -> Plan | None:
    """A plan for calls of an op with such an ``x`` and these arguments; None where no backend makes one.

    sources: numbers of which scale and low of the activations were made; one object, as long as these are the same
    tensors, and where they were.
    """
    if not unobserved() or _autocasts() or not is_plain(x) or name not in _planners:
        return None
    made: Plan | None = _planners[name](sources, x, *args)
    return made


class PreparedUpdate(Protocol):
    """A step that is prepared for one weight, its moments, and gradients of one kind; ``update_`` does the same."""

    def fits(self, *tensors: Tensor | None) -> bool: ...

    def __call__(self, residual: Tensor, grad: Tensor, **settings: Any) -> None: ...


def prepare_update(*args: Any) -> PreparedUpdate | None:
    """``update_`` for ever the same tensors: its arguments up to ``bits``, then ``dtype``; None where no backend
    prepares one."""
    *tensors, _, _ = args
    if "update_" not in _planners or not unobserved() or not all(t is None or is_plain(t) for t in tensors):
        return None
    prepared: PreparedUpdate | None = _planners["update_"](*args)
    return prepared


def implement_plan(name: str, planner: Callable[..., Any]) -> None:
    """Register what makes plans for an op's plain tensors on the CPU."""
    _planners[name] = planner


def implement(name: str, function: Callable[..., Any], device: str) -> None:
    """Register a backend's implementation of a defined op over the reference, for one device: "CPU" or "CUDA"."""
    _LIBRARY.impl(name, function, device)
    if device == "CPU":
        _on_cpu[name] = function


_on_cpu: dict[str, Callable[..., Any]] = {}
_planners: dict[str, Callable[..., Any]] = {}
_PLAIN = frozenset((Tensor, nn.Parameter))


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel on the CPU may read the memory of a tensor as its values."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()  # a view that stands for its negative, as the imaginary part of a conjugate
        and not tensor._is_zerotensor()  # which has no memory
    )


def _caller(name: str, op: Any) -> Callable[..., Any]:
    """A function that does what the op does. For plain tensors on the CPU, where nothing listens, it calls the
    backend's function itself: the dispatcher adds up to 20 us, more than many a kernel takes."""
    arguments = op._schema.arguments
    places = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))

    def call(*args: Any, **kwargs: Any) -> Any:
        if not unobserved():
            return op(*args, **kwargs)
        for place in places:
            tensor = args[place]
            if tensor is not None and not is_plain(tensor):
                return op(*args, **kwargs)
        return _on_cpu.get(name, op)(*args, **kwargs)

    return call


_is_compiling, _records = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiles, _traces = torch._C._autograd._profiler_enabled, torch._C._is_tracing
_transform_level = torch._C._functorch.maybe_current_level
_autocasts = torch._C._is_any_autocast_enabled
LISTENERS = (_records, _dispatch_modes, _function_modes, _profiles)
"""Tell whether something but a compiler has to hear of an op, each by a number that is not 0."""
_TensorGuards: Any = torch._C._dynamo.guards.TensorGuards


def unobserved() -> bool:
    """Whether no gradient is recorded, and no compiler, tracer, transform, mode or profiler has to hear of an op."""
    return unheard() and not _traces() and _transform_level() is None


def is_transformed() -> bool:
    """Whether this runs under a transform of torch.func."""
    return _transform_level() is not None


def unheard() -> bool:
    """The part of ``unobserved()`` that ``kind_of`` does not see."""
    return not (_is_compiling() or _records() or _dispatch_modes() or _function_modes() or _profiles())


def kind_of(x: Tensor) -> Callable[[Tensor], bool]:
    """Tells whether a tensor has type, dtype, shape and strides of ``x``, and torch's dispatcher does the same with it:
    by the tensor (device, layout, a negative view, ...) and by the thread (inference mode, autocast, tracers,
    transforms). torch.compile checks inputs so, in a fifth of the time that asking one by one takes."""
    sizes, strides = list(x.shape), list(x.stride())
    return _TensorGuards(x, dynamic_dims_sizes=[sizes], dynamic_dims_strides=[strides]).check


BACKENDS = ("reference", "cpu", "triton")


def wanted_backend() -> str | None:
    """The backend that the environment variable BITORCH_ENGINE_BACKEND asks for; None: the best for each device."""
    name = os.environ.get("BITORCH_ENGINE_BACKEND", "")
    if name and name not in BACKENDS:
        raise RuntimeError(f"BITORCH_ENGINE_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}.")
    return name or None
