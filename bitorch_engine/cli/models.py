"""The networks that the command line can name: a small CNN, a small ResNet, or a callable of the user's."""

import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_engine.cli.errors import UsageError


def small_cnn(in_channels: int, num_classes: int) -> nn.Sequential:
    """Three 3x3 convolutions (32, 64 at half size, 64), global average, linear: 55 584 convolution weights for grey."""
    return nn.Sequential(
        _conv_norm(in_channels, 32, relu=True)
        | _conv_norm(32, 64, 2, stride=2, relu=True)
        | _conv_norm(64, 64, 3, relu=True)
        | _classifier(64, num_classes)
    )


def small_resnet(in_channels: int, num_classes: int) -> nn.Sequential:
    """A ResNet-8 (He et al. 2016, arXiv:1512.03385, section 4.2): one block each of 32, 64 and 128 channels."""
    blocks = OrderedDict(
        block1=ResidualBlock(32, 32), block2=ResidualBlock(32, 64, stride=2), block3=ResidualBlock(64, 128, stride=2)
    )
    return nn.Sequential(_conv_norm(in_channels, 32, relu=True) | blocks | _classifier(128, num_classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        first = _conv_norm(in_channels, out_channels, stride=stride, relu=True)
        self.body = nn.Sequential(first | _conv_norm(out_channels, out_channels, 2))
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Sequential(
            OrderedDict() if same else _conv_norm(in_channels, out_channels, kernel=1, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _conv_norm(
    in_channels: int, out_channels: int, number: int = 1, *, kernel: int = 3, stride: int = 1, relu: bool = False
) -> OrderedDict[str, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    modules: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(out_channels))]
    if relu:
        modules.append(("relu", nn.ReLU()))
    return OrderedDict((f"{name}{number}", module) for name, module in modules)


def _classifier(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(channels, num_classes))


BUILTIN: dict[str, Callable[[int, int], nn.Module]] = {"cnn": small_cnn, "resnet": small_resnet}


def build_model(name: str, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The float network that ``--model`` names, tried on one image.

    name: ``cnn``, ``resnet`` or ``package.module:callable``; the callable is imported (also from the current folder)
    and called with ``in_channels=`` and ``num_classes=``.  Importing runs code: pass only names that the user typed.
    Raises UsageError where there is no such model, or it does not turn an image into one number per class.
    """
    factory = BUILTIN.get(name) or _import_callable(name)
    try:
        model = factory(in_channels=input_shape[0], num_classes=num_classes)  # type: ignore[call-arg]
    except TypeError as error:
        raise UsageError(f"{name} must accept in_channels= and num_classes=: {error}") from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} must return a torch.nn.Module, got {type(model).__name__}.")
    _try_on_one_image(model, name, input_shape, num_classes)
    return model


def _import_callable(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise UsageError(f"model must be {', '.join(BUILTIN)} or package.module:callable, got {name}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model {name} cannot be imported: {error}") from None
    if not callable(found):
        raise UsageError(f"model {name} must be callable, got {type(found).__name__}.")
    return found


def _try_on_one_image(model: nn.Module, name: str, input_shape: tuple[int, int, int], num_classes: int) -> None:
    training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"{name} cannot take images of shape {input_shape}: {error}") from None
    finally:
        model.train(training)
    if output.shape != (1, num_classes):
        raise UsageError(f"{name} must return (N, {num_classes}), got {tuple(output.shape)} for one image.")
