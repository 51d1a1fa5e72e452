"""Which modules can be converted, and how one of them is: in place, by giving the object its low-bit class."""

from torch import nn

from bitorch_engine.convert.replaced import replace_
from bitorch_engine.layers.low_bit import LowBitLayer
from bitorch_engine.layers.qconv.nbit import (
    nBitConv1d,
    nBitConv2d,
    nBitConv3d,
    nBitConvTranspose1d,
    nBitConvTranspose2d,
    nBitConvTranspose3d,
)
from bitorch_engine.layers.qlinear.nbit import nBitLinear
from bitorch_engine.parameters import PackedParameter

LOW_BIT: dict[type[nn.Module], type[LowBitLayer]] = {
    nn.Conv1d: nBitConv1d,
    nn.Conv2d: nBitConv2d,
    nn.Conv3d: nBitConv3d,
    nn.ConvTranspose1d: nBitConvTranspose1d,
    nn.ConvTranspose2d: nBitConvTranspose2d,
    nn.ConvTranspose3d: nBitConvTranspose3d,
    nn.Linear: nBitLinear,
}
"""The low-bit class of every module type that has one."""


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot be converted, or None where it can."""
    if isinstance(module, LowBitLayer) and module.is_packed:
        return f"is low-bit already, and keeps its {module.w_bit} bits"
    if "forward" in vars(module):  # it calls torch.nn's, which does not quantize the input
        return "has a forward of its own, assigned to it (convert first, and assign it afterwards)"
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized (torch.nn.utils.parametrize.remove_parametrizations undoes that)"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has no weight yet (run one batch first)"
    if isinstance(module, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return "is used by torch's attention code, which reads weights without calling their layers"
    if not isinstance(module, LowBitLayer) and type(module) not in LOW_BIT:
        family = next((base.__name__ for base in LOW_BIT if isinstance(module, base)), None)
        return (
            f"is a subclass of {family} with its own code" if family else "is neither a convolution nor a linear layer"
        )
    weight = module.weight
    if isinstance(weight, PackedParameter):
        return "holds a packed weight already"
    if "weight" not in module._parameters:
        return "has a weight that is computed, not a parameter (weight_norm or spectral_norm)"
    if not weight.is_floating_point():  # type: ignore[operator]
        return f"has a weight of {weight.dtype}"
    return None


def convert_layer_(
    module: nn.Module, w_bit: int = 4, a_bit: int | None = None, g_bit: int | None = None, *, learn_scale: bool = False
) -> None:
    """Turn one torch.nn convolution or linear layer into its low-bit layer, in place: it stays the same object. A
    low-bit layer whose weight was replaced by a float one gets codes of its own bits again.

    Weights are quantized; bias, hooks, training mode and whoever refers to the module are as before. Make optimizers
    afterwards: the weight is a new parameter, and the old one raises where its gradient is asked for. Raises TypeError
    for a module that has no low-bit layer.
    """
    reason = why_not(module)
    if reason is not None:
        raise TypeError(f"{type(module).__name__} cannot be converted: it {reason}.")
    float_class, weight = type(module), module.weight
    if isinstance(module, LowBitLayer):
        module.quantize_weight_(module.w_bit, learn_scale=learn_scale)
    else:
        module.__class__ = LOW_BIT[float_class]
        try:
            module.quantize_(w_bit, a_bit, g_bit, learn_scale=learn_scale)  # type: ignore[operator]
        except Exception:
            module.__class__ = float_class
            raise
    replace_(weight)  # type: ignore[arg-type]


def use_layers_(model: nn.Module) -> None:
    """Make torch's transformer encoders call their linear layers where those quantize their input.

    In evaluation, ``nn.TransformerEncoderLayer`` has a fast path that reads the weights of its layers without calling
    them: the input would stay float, unlike in training. It is switched off where that would happen, and so are the
    nested tensors of ``nn.TransformerEncoder``, which need it.
    """
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    changed = [encoder for encoder in encoders if any(_quantizes_input(part) for part in encoder.children())]
    for encoder in changed:
        encoder.activation_relu_or_gelu = 0
    for stack in model.modules():
        if isinstance(stack, nn.TransformerEncoder) and any(layer in changed for layer in stack.layers):
            stack.use_nested_tensor = False


def _quantizes_input(module: nn.Module) -> bool:
    return isinstance(module, LowBitLayer) and module.activation is not None
