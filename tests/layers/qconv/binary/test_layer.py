"""Binary convolutions are convolutions of signs with zero padding, times two scales."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitorch_engine import BinaryConv1d, BinaryConv2d, BinaryConv2dBase, BinaryConv3d, BinaryConvParameter, nBitConv2d
from bitorch_engine.optim import DiodeMix

KINDS: dict[Any, tuple[Any, Any]] = {
    BinaryConv1d: (nn.Conv1d, F.conv1d),
    BinaryConv2d: (nn.Conv2d, F.conv2d),
    BinaryConv3d: (nn.Conv3d, F.conv3d),
}
ALL = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def example(kind: Any, **more: Any) -> tuple[Any, torch.Tensor]:
    rank = int(kind.__name__[-2])
    layer = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, **more)
    return layer, torch.randn(2, 4, *[9, 8, 7][:rank])


@ALL
def test_it_convolves_signs_and_pads_with_zeros(kind: Any) -> None:
    layer, x = example(kind)
    with torch.no_grad():
        y = layer(x)
        signs, weight = torch.where(x >= 0, 1.0, -1.0), torch.where(layer.weight.dequantize() >= 0, 1.0, -1.0)
        per_channel = [-1] + [1] * (x.dim() - 2)
        total = KINDS[kind][1](signs.double(), weight.double(), None, layer.stride, layer.padding, layer.dilation, 2)
        wanted = total * layer.weight.channel_scale.view(per_channel) * layer.activation.scale
    torch.testing.assert_close(y.double(), wanted + layer.bias.detach().view(per_channel))


@ALL
@pytest.mark.parametrize("g_bit", [None, 8])
def test_gradients_are_those_of_the_float_convolution_within_the_scale(kind: Any, g_bit: int | None) -> None:
    layer, x = example(kind, g_bit=g_bit)
    y = layer(x.requires_grad_())
    grad = torch.randint(-1, 2, y.shape).float()
    y.backward(grad)
    scale = layer.activation.scale.detach()
    values = (torch.where(x >= 0, 1.0, -1.0) * scale).detach().double().requires_grad_()
    weight = layer.weight.dequantize().detach().double().requires_grad_()
    KINDS[kind][1](values, weight, None, layer.stride, layer.padding, layer.dilation, 2).backward(grad.double())
    tolerance = {"rtol": 0, "atol": 1e-5 if g_bit is None else 0.02 * float(weight.grad.abs().max())}
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, **tolerance)
    inside = x.detach().abs() <= scale
    torch.testing.assert_close(x.grad.double(), torch.where(inside, values.grad, 0.0), **tolerance)


@ALL
def test_arguments_are_torchs_and_two_more_and_copies_are_equal(kind: Any) -> None:
    theirs = list(inspect.signature(KINDS[kind][0]).parameters)
    assert list(inspect.signature(kind).parameters) == [*theirs, "g_bit", "learn_scale"]
    layer, x = example(kind)
    wanted = layer(x)
    other = example(kind)[0]
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), other):
        assert torch.equal(same(x), wanted) and type(same.weight) is BinaryConvParameter


def test_it_is_the_one_bit_case_of_the_n_bit_layer() -> None:
    binary, other, x = BinaryConv2d(3, 4, 3), nBitConv2d(3, 4, 3, w_bit=1, a_bit=1), torch.randn(2, 3, 6, 6)
    other.load_state_dict(binary.state_dict())
    assert torch.equal(binary(x), other(x))
    with pytest.raises(ValueError, match="a_bit of BinaryConv2d is 1; for other bits take an nBit layer"):
        BinaryConv2d(3, 4, 3, a_bit=2)


def test_training_lowers_the_loss_and_moves_codes() -> None:
    model = nn.Sequential(
        BinaryConv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), BinaryConv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2)
    )
    x = torch.randn(64, 1, 6, 6)
    y = (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long()
    optimizer, before, losses = DiodeMix(model.parameters(), lr=1e-2), model[2].weight.codes, []
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model[2].weight.codes, before)


def test_bitorch_engines_base_class() -> None:
    layer = BinaryConv2dBase(3, 4, 3, 2, 1, 1, "cpu", torch.bfloat16)
    assert (layer.stride, layer.padding, layer.bias, layer.weight.dtype) == ((2, 2), (1, 1), None, torch.bfloat16)
    layer.set_quantized_weight_data(torch.ones(4, 3, 3, 3, dtype=torch.int8))
    assert bool((layer.weight.codes == 1).all())
    with pytest.raises(NotImplementedError, match="symmetric=False is not supported"):
        BinaryConv2dBase(3, 4, 3, symmetric=False)
