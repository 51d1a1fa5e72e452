"""What layers whose weight is 1 to 8 bits have in common, whatever they compute: torch.nn's layers become them."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from bitorch_engine import ops
from bitorch_engine.bits import bit_format
from bitorch_engine.layers.qconv.function import QuantizedConvolution
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.quantizers.activation import ActivationQuantizer
from bitorch_engine.quantizers.weight import normal_scale


class LowBitLayer(nn.Module):
    """Stands before a torch.nn class, whose arguments, geometry and checks it keeps; ``weight`` becomes packed.

    w_bit: bits of the weight, 1 to 8.
    a_bit: bits of the input, quantized with a learned scale; None: float. Codes have no NaN: one NaN or Inf in the
        input makes all results of the batch NaN, where torch.nn keeps it to its sample.
    g_bit: bits of the gradient on its way into the two backward products, 2 to 8; None: float.
    learn_scale: the weight's scale is trained too. Worth it where no normalization layer follows.
    """

    parameter_class: ClassVar[type[PackedParameter]] = PackedParameter
    weight: Tensor
    activation: ActivationQuantizer | None
    a_bit: int | None
    g_bit: int | None
    _plans: tuple[tuple[Callable[[Tensor], bool], tuple[int, ...], ops.Plan], ...] = ()  # the last one made is first
    _planned_weight: tuple[Tensor, int] | None = None
    _last_w_bit: int

    def __init__(
        self,
        *args: Any,
        w_bit: int = 4,
        a_bit: int | None = None,
        g_bit: int | None = None,
        learn_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        check_bits(w_bit, a_bit, g_bit)
        super().__init__(*args, **kwargs)
        self.quantize_(w_bit, a_bit, g_bit, scale=_initial_scale(self.weight, w_bit), learn_scale=learn_scale)

    def __init_subclass__(cls) -> None:
        """Show torch.nn's arguments and ours in help() and in editors."""
        defining = next(base for base in cls.__mro__ if "__init__" in base.__dict__)
        keywords: dict[str, inspect.Parameter] = {}
        if issubclass(defining, LowBitLayer):
            own = list(inspect.signature(defining.__init__).parameters.values())[1:]
            if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in own):
                cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
                return
            keywords = {p.name: p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY}
        for base in cls.__mro__:
            if "__init__" in base.__dict__ and not issubclass(base, LowBitLayer):
                theirs = [p for p in inspect.signature(base).parameters.values() if p.name not in keywords]
                if base is not nn.Module:
                    cls.__signature__ = inspect.Signature([*theirs, *keywords.values()])  # type: ignore[attr-defined]
                return

    @property
    def w_bit(self) -> int:
        """Bits of the weight that is there now; for a float one that has taken its place, those of the one before."""
        weight = self._parameters.get("weight")
        return weight.w_bit if isinstance(weight, PackedParameter) else self._last_w_bit

    @property
    def is_packed(self) -> bool:
        """Whether the weight is codes; a float one may have taken its place, a part of it for one."""
        return isinstance(self._parameters.get("weight"), PackedParameter)

    @property
    def transposed_groups(self) -> int:
        """The groups of a transposed layer, whose weight is (in, out / groups, ...); 0 for all others."""
        return transposed_groups(self)

    def quantize_(
        self,
        w_bit: int,
        a_bit: int | None = None,
        g_bit: int | None = None,
        *,
        scale: Tensor | float | None = None,
        learn_scale: bool = False,
    ) -> None:
        """Turn the float weight into codes of ``w_bit`` bits, and set up activation and gradient quantization."""
        check_bits(w_bit, a_bit, g_bit)
        self.quantize_weight_(w_bit, scale=scale, learn_scale=learn_scale)
        self.g_bit = g_bit
        weight = self.weight
        self.activation = None
        if a_bit is not None:
            self.activation = ActivationQuantizer(a_bit, weight.device, weight.dtype).train(self.training)

    def quantize_weight_(self, w_bit: int, *, scale: Tensor | float | None = None, learn_scale: bool = False) -> None:
        """Turn a float weight into codes of ``w_bit`` bits, and leave all else as it is."""
        weight = self.weight
        groups = self.transposed_groups
        packed = self.parameter_class(
            weight,
            weight.requires_grad,
            w_bit=w_bit,
            scale=scale,
            transposed=groups > 0,
            groups=max(1, groups),
            learn_scale=learn_scale,
        )
        if not isinstance(weight, self.parameter_class):  # else these are the codes that it has
            self.weight = packed

    def reset_parameters(self) -> None:
        """torch.nn's initialization; a packed weight gets a new scale with it."""
        if not isinstance(self.weight, PackedParameter):
            super().reset_parameters()  # type: ignore[misc]
            return
        weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.weight.quantize_(weight, _initial_scale(weight, self.w_bit))
        if self.activation is not None:
            self.activation.reset_parameters()
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if bias is not None:
            bound = 1 / math.sqrt(max(1, _fan_in(weight)))
            nn.init.uniform_(bias, -bound, bound)

    def planned(self, x: Tensor, output_padding: tuple[int, ...] = ()) -> Tensor | None:
        """The result where no gradient is recorded and the layer was called before with such an ``x``; else None. At
        small sizes looking things up takes longer than the kernel."""
        if _is_compiling():
            return None
        if ops.calls.CALLS is not None:
            return ops.calls.CALLS.planned(self.__dict__, x, output_padding)
        if not ops.unheard():
            return None
        state = self.__dict__  # an attribute of a module takes three times as long, one that is missing a microsecond
        for is_such, padding, plan in state.get("_plans", ()):
            if not is_such(x) or padding != output_padding:
                continue
            parameters, activation = state["_parameters"], state["_modules"].get("activation")
            weight = parameters.get("weight")
            packed = getattr(weight, "packed", None)
            y = None
            if packed is not None:
                sources = None if activation is None else activation.sources()
                y = plan(x, sources, packed, weight.channel_scale, parameters.get("bias"))
            if y is None:  # something was written or replaced
                _forget_plans(self)
            return y
        return None

    def _remember(self, plan: ops.Plan | None, x: Tensor, packed: Tensor, output_padding: Sequence[int] = ()) -> None:
        """Keep a plan, and those that were made of the same weight: they hold it in a kernel's order."""
        if plan is not None:
            made_of = self._planned_weight
            same = made_of is not None and made_of[0] is packed and made_of[1] == packed._version
            kept = self._plans[: _MOST_PLANS - 1] if same else ()
            self.__dict__["_plans"] = ((ops.kind_of(x), tuple(output_padding), plan), *kept)
            self.__dict__["_planned_weight"] = (packed, packed._version)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BELONGS_TO:
            if value != (current := getattr(self, name, value)):
                raise AttributeError(f"{name} of this layer is {current} and cannot be set: {_BELONGS_TO[name]}.")
            return
        if name == "activation" and not isinstance(value, ActivationQuantizer | None):
            raise TypeError(f"activation must be an ActivationQuantizer or None, got {type(value).__name__}.")
        super().__setattr__(name, value)
        if name == "activation":  # a_bit is read before every call, and a property takes longer
            self.__dict__["a_bit"] = None if value is None else value.bits
        _forget_plans(self)  # they know the attributes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What every assignment of a parameter ends in: the bits of a packed weight are known after it is gone."""
        if name == "weight":
            for weight in (self._parameters.get("weight"), param):
                if isinstance(weight, PackedParameter):
                    self.__dict__["_last_w_bit"] = weight.w_bit
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name == "activation":
            self.activation = None
        else:
            super().__delattr__(name)
            _forget_plans(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plans", "_planned_weight")}

    def multiply(self, x: Tensor, geometry: ops.Convolution) -> Tensor:
        """Quantize the input, (N, C, *spatial), convolve it with the weight, and add the bias."""
        check_floats(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and ops.is_transformed():
            raise NotImplementedError(
                f"{type(self).__name__} with a_bit or g_bit is not supported in torch.func's transforms (grad, vmap, "
                "...), as its quantizers are autograd functions of their own; use backward() or torch.autograd.grad."
            )
        # Module.__getattr__ takes as long as a small kernel.
        activation: Any = self._modules.get("activation")
        packed = self._parameters.get("weight")
        x = in_autocast_dtype(x)
        if activation is not None:
            activation.prepare_(x)
            if isinstance(packed, PackedParameter) and not torch.is_grad_enabled():
                return self._infer(x, packed, activation, geometry)
            scale, low = activation.scale, activation.low.to(torch.float32)  # a cast layer casts its buffers
        else:
            scale = low = None
        weight = self.weight
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        y = QuantizedConvolution.apply(x, weight, scale, low, geometry, self.a_bit, self.g_bit)
        if bias is not None:
            y = y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
        return y

    def _infer(
        self, x: Tensor, weight: PackedParameter, activation: ActivationQuantizer, geometry: ops.Convolution
    ) -> Tensor:
        """``multiply`` where no gradient is recorded."""
        sources = None
        if x.is_cpu and ops.unobserved():
            (scale, low), sources = activation.constants(), activation.sources()
        else:
            scale, low = activation.scale, activation.low.to(torch.float32)
        # Module.__getattr__ takes a microsecond for what is None.
        bias: Any = self._parameters["bias"] if self._has_plain_bias() else self.bias
        arguments = (
            x,
            scale,
            low,
            self.a_bit,
            weight.packed,
            weight.channel_scale,
            weight.w_bit,
            bias,
            weight.shape,
            *geometry,
        )
        if sources is not None and self._has_plain_bias():
            plan = ops.plan("conv", sources, *arguments)
            if activation.constants()[0] is scale:  # else another thread wrote them, and the plan would not notice
                self._remember(plan, x, weight.packed, geometry.output_padding)
        return ops.conv(*arguments)

    def _has_plain_bias(self) -> bool:
        """Whether the bias is a parameter, or None: a parametrization or pruning makes it anew for every call, which no
        plan would notice."""
        return "bias" in self._parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What moves and casts modules. torch swaps a tensor subclass for another one, which loses hooks and attributes
        and fails while a graph or a weak reference holds it; a packed parameter stays the same here, as others do."""
        parameters = self._parameters
        moved = {
            name: parameter
            for name, parameter in parameters.items()
            if isinstance(parameter, PackedParameter) and parameter.convert_(fn)
        }
        parameters.update(dict.fromkeys(moved))  # torch passes over what is None
        try:
            return super()._apply(fn, recurse)
        finally:
            parameters.update(moved)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What torch.nn.Module calls instead of forward while torch.jit traces; which then fails with an assertion."""
        raise NotImplementedError(
            f"torch.jit.trace cannot trace {type(self).__name__}; use torch.export.export or torch.compile instead."
        )

    def extra_repr(self) -> str:
        bits = f", w_bit={self.w_bit}" if self.is_packed else ", float weight"
        bits += f", a_bit={self.a_bit}" if self.a_bit is not None else ""
        bits += f", g_bit={self.g_bit}" if self.g_bit is not None else ""
        return super().extra_repr() + bits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint is quantized on the way in; it has nothing to say about the activation's scale."""
        key = prefix + "weight"
        value: Tensor | None = state_dict.get(key)
        weight = self.weight
        if (
            isinstance(weight, PackedParameter)
            and value is not None
            and not isinstance(value, PackedParameter)
            and value.is_floating_point()
            and value.shape == weight.shape
        ):
            groups = self.transposed_groups
            state_dict[key] = self.parameter_class(
                value.to(weight.dtype),
                w_bit=self.w_bit,
                transposed=groups > 0,
                groups=max(1, groups),
                learn_scale=weight.learn_scale,
            )
            if self.activation is not None:
                for name, current in self.activation.state_dict(prefix=prefix + "activation.").items():
                    state_dict.setdefault(name, current)
        super()._load_from_state_dict(state_dict, prefix, *args)


_is_compiling = torch.compiler.is_dynamo_compiling


def _forget_plans(layer: nn.Module) -> None:
    """No method: who sets ``__class__`` back to torch.nn's has none of ours after that."""
    layer.__dict__.pop("_plans", None)
    layer.__dict__.pop("_planned_weight", None)


_BELONGS_TO = {
    "w_bit": "the weight has these bits; assign another weight",
    "a_bit": "what quantizes the input has these bits; layer.quantize_(layer.w_bit, a_bit, layer.g_bit) makes another",
}
"""Why attributes that follow others cannot be set."""


_MOST_PLANS = 64
"""Kinds of input that a layer has plans for, those that came last."""


def transposed_groups(layer: nn.Module) -> int:
    """The groups of a transposed convolution, float or low-bit; 0 for every other layer."""
    return int(layer.groups) if getattr(layer, "transposed", False) else 0  # type: ignore[arg-type]


def check_floats(x: Tensor) -> None:
    """Raise TypeError for an input of integers, whose dtype the result would have, and for a symbol of torch.fx."""
    if isinstance(x, fx.Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace cannot look into low-bit layers. Trace the float model and call quantize_ on the "
            "graph module, or trace with a torch.fx.Tracer whose is_leaf_module is True for LowBitLayer."
        )
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating point, got {x.dtype}; convert it: x.to(torch.float32).")


def in_autocast_dtype(x: Tensor) -> Tensor:
    """The input in the dtype that torch.autocast asks for, where it is on."""
    device = "cpu" if x.is_cpu else x.device.type
    # torch 2.11 cannot compile the question that other devices are asked.
    if (x.is_cpu or x.is_cuda or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def check_bits(w_bit: int, a_bit: int | None, g_bit: int | None) -> None:
    """Raise ValueError or TypeError for a width that the layers do not have."""
    bit_format(w_bit)
    if a_bit is not None:
        bit_format(a_bit)
    if g_bit is not None and bit_format(g_bit).bits == 1:
        raise ValueError("g_bit must be 2 to 8, or None for float gradients, got 1: a gradient needs a zero.")


def _fan_in(weight: Tensor) -> int:
    return math.prod(weight.shape[1:])  # as torch.nn.init counts it


def _initial_scale(weight: Tensor, w_bit: int) -> float:
    """The scale of a new layer, from the initialization's known spread, uniform in +- 1 / sqrt(fan_in).

    It does not depend on the drawn values: ranks of a distributed run that drew different ones still share one grid,
    so that DistributedDataParallel's first broadcast is exact. At 1 bit it is the standard deviation itself, with which
    the codes have the variance of the float weights.
    """
    deviation = (3 * max(1, _fan_in(weight))) ** -0.5
    return deviation if w_bit == 1 else deviation * normal_scale(bit_format(w_bit))
