"""BinaryLinear is a product of signs, times two scales."""

import inspect

import pytest
import torch
from torch import nn

from bitorch_engine import BinaryLinear, BinaryLinearBase, BinaryLinearParameter, nBitLinear


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 0, 9), (2, 3, 9)], ids=str)
def test_it_multiplies_signs(shape: tuple[int, ...]) -> None:
    layer, x = BinaryLinear(9, 5), torch.randn(shape)
    with torch.no_grad():
        y = layer(x)
        signs = torch.where(x >= 0, 1, -1) @ torch.where(layer.weight.dequantize() >= 0, 1, -1).T
        wanted = signs * layer.weight.channel_scale * layer.activation.scale + layer.bias
    torch.testing.assert_close(y, wanted)
    if x.numel():
        torch.testing.assert_close(layer.activation.scale, x.abs().mean())


def test_gradients_pass_where_the_input_is_within_the_scale() -> None:
    layer, x = BinaryLinear(6, 3, bias=False), torch.tensor([[-3.0, -1.0, -0.1, 0.0, 0.5, 2.0]], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    inside = x.detach().abs() <= layer.activation.scale.detach()
    assert inside.any() and not inside.all()
    assert torch.equal(x.grad, torch.where(inside, layer.weight.dequantize().sum(0), 0.0))
    signs = torch.where(x.detach() >= 0, 1.0, -1.0) * layer.activation.scale.detach()
    torch.testing.assert_close(layer.weight.grad, signs.expand(3, 6).contiguous())


@pytest.mark.parametrize("g_bit", [None, 8])
def test_it_is_the_one_bit_case_of_the_n_bit_layer(g_bit: int | None) -> None:
    binary, other, x = (
        BinaryLinear(30, 7, g_bit=g_bit),
        nBitLinear(30, 7, w_bit=1, a_bit=1, g_bit=g_bit),
        torch.randn(4, 30),
    )
    other.load_state_dict(binary.state_dict())
    assert torch.equal(binary(x), other(x))
    assert type(binary.weight) is BinaryLinearParameter and (binary.w_bit, binary.a_bit, binary.g_bit) == (1, 1, g_bit)
    assert isinstance(binary, nn.Linear)


def test_its_arguments_are_torchs_and_two_more() -> None:
    theirs = list(inspect.signature(nn.Linear).parameters)
    assert list(inspect.signature(BinaryLinear).parameters) == [*theirs, "g_bit", "learn_scale"]


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="w_bit of BinaryLinear is 1; for other bits take an nBit layer"):
        BinaryLinear(3, 2, w_bit=2)
    layer = BinaryLinear(3, 2)
    with pytest.raises(ValueError, match="BinaryLinear has one bit for weights and input, got w_bit=2, a_bit=4; for"):
        layer.quantize_(2, 4)
    # What the message says to do does it.
    other = nBitLinear(3, 2, w_bit=2, a_bit=4)
    other.weight.quantize_(layer.weight.dequantize())
    assert torch.allclose(other.weight, layer.weight, rtol=1e-6)  # +-1 times a scale is on the grid of 2 bits
    layer.activation = None
    x = torch.randn(5, 3)
    expected = nn.functional.linear(x.double(), layer.weight.dequantize().double(), layer.bias.double())
    assert torch.allclose(layer(x).double(), expected, atol=1e-6)


def test_bitorch_engines_base_class() -> None:
    layer = BinaryLinearBase(8, 3, "cpu", torch.bfloat16)
    assert layer.bias is None and layer.weight.dtype == torch.bfloat16
    layer.set_bits_binary_word(32)
    layer.set_weight_data(torch.ones(3, 8))
    assert bool((layer.weight.codes == 1).all())
    with pytest.raises(NotImplementedError, match="symmetric=False is not supported"):
        BinaryLinearBase(8, 3, symmetric=False)
