"""What a model consists of, layer by layer: shape, bits, bytes, multiply-adds, and how often each code is used."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from bitorch_engine.bits import bit_format
from bitorch_engine.parameters import PackedParameter
from bitorch_engine.quantizers.activation import ActivationQuantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerRow:
    """One module that has parameters or buffers of its own, with the quantizer of its input where it has one."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of the weight, else of the first tensor."""
    bits: int
    """Of one weight as stored."""
    values: int
    """Numbers held, scales of weights not counted."""
    stored_bytes: int
    """In a deployment file: codes and scales, no residual."""
    macs: int
    """Multiply-adds for one image; 0 for what is neither convolution nor linear."""
    histogram: tuple[int, ...] | None
    """How many weights have each of ``codes``; None for float."""

    @property
    def codes(self) -> range:
        """The codes of a packed weight, from the lowest."""
        format = bit_format(self.bits)
        return range(format.low, format.high + 1, format.step)


def layer_rows(model: nn.Module, input_shape: tuple[int, ...]) -> list[LayerRow]:
    """A row for each module with tensors of its own, in order.

    input_shape: of one image, without the batch. One of zeros passes through the model, from which activation
    quantizers that have seen nothing yet would take their scale: call this before conversion, or after training.
    """
    macs = _multiply_adds(model, input_shape)
    rows = []
    for name, module in model.named_modules():
        tensors = _own_tensors(module)
        if isinstance(module, ActivationQuantizer) or not tensors:
            continue
        weight = tensors.get("weight", next(iter(tensors.values())))
        packed = weight if isinstance(weight, PackedParameter) else None
        rows.append(
            LayerRow(
                name=name or "(the model)",
                kind=type(module).__name__,
                shape=tuple(weight.shape),
                bits=packed.w_bit if packed is not None else 8 * weight.element_size(),
                values=sum(tensor.numel() for tensor in tensors.values()),
                stored_bytes=sum(stored_bytes(tensor) for tensor in tensors.values()),
                macs=macs.get(name, 0),
                histogram=None if packed is None else code_histogram(packed),
            )
        )
    return rows


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, without its children's; a quantizer of its input counts as a part of it."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False)) | dict(
        module.named_buffers(recurse=False)
    )
    for name, child in module.named_children():
        if isinstance(child, ActivationQuantizer):
            tensors |= {f"{name}.{key}": tensor for key, tensor in _own_tensors(child).items()}
    return tensors


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in a deployment file: of a packed one its codes and scales."""
    if isinstance(tensor, PackedParameter):
        return tensor.packed.nbytes + tensor.scale.nbytes
    return tensor.nbytes


def code_histogram(parameter: PackedParameter) -> tuple[int, ...]:
    """How many weights have each code of the parameter's format, from the lowest."""
    format = bit_format(parameter.w_bit)
    index = format.index(parameter.codes).flatten().long()
    return tuple(torch.bincount(index, minlength=format.levels).tolist())


def _multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiply-adds of each convolution and linear layer for one image, counted while one passes through."""
    counts: dict[str, int] = {}

    def count(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Each output of a convolution or linear layer costs the numbers of one filter; each input of a transposed one.
        sites = given if isinstance(module, TRANSPOSED) else output
        counts[name] = counts.get(name, 0) + sites.numel() * prod(weight.shape[1:])

    counted = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: count(name, module, given[0], output))
        for name, module in model.named_modules()
        if isinstance(module, counted)
    ]
    training = model.training
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return counts
