"""nBitLinear and BinaryLinear agree with torch on dequantized weights, keep only codes for backward, and learn."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from bitorch_engine import BinaryLinear, nBitLinear, nBitLinearBase, nBitLinearParameter
from bitorch_engine.optim import DiodeMix
from bitorch_engine.parameters import PackedParameter

WIDTHS = range(1, 9)
SHAPES = [(7,), (1, 7), (5, 7), (0, 7), (2, 0, 7), (2, 3, 7), (2, 1, 3, 7)]
SETTINGS: list[dict[str, Any]] = [{}, {"a_bit": 4}, {"g_bit": 2}, {"a_bit": 8, "g_bit": 2}]


def fake_quantize(x: Tensor, layer: Any) -> Tensor:
    """x on the layer's grid of activations, in x's dtype; the gradient goes straight through where x is inside."""
    if layer.a_bit is None:
        return x
    scale, low, levels = layer.activation.scale.detach(), layer.activation.low, 2**layer.a_bit
    ratio = x.detach().to(torch.float32) * (1 / scale)
    if layer.a_bit == 1:
        codes, inside = torch.where(ratio >= 0, 1.0, -1.0), ratio.abs() <= 1
    else:
        codes, inside = ratio.round().clamp(low, low + levels - 1), (ratio >= low) & (ratio <= low + levels - 1)
    return codes.to(x.dtype) * scale.to(x.dtype) + inside * (x - x.detach())


def reference(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of torch.nn.functional.linear in float64, on the dequantized weight."""
    x = x.detach().double().requires_grad_()
    weight = layer.weight.dequantize().detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = F.linear(fake_quantize(x, layer), weight, bias)
    y.backward(grad.double())
    found = {"output": y.detach(), "input": x.grad, "weight": weight.grad, "bias": None if bias is None else bias.grad}
    return {name: value for name, value in found.items() if value is not None}


def measured(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same of the layer."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    found = {"output": y.detach(), "input": x.grad, "weight": layer.weight.grad}
    return found if layer.bias is None else found | {"bias": layer.bias.grad}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert type(found[name]) is Tensor and found[name].shape == expected.shape, name
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=tolerance * largest + 1e-6)


def signs_like(y: Tensor) -> Tensor:
    """-1, 0 and 1, which every g_bit holds exactly where the scales of the weight are equal."""
    return torch.randint(-1, 2, y.shape).to(y.dtype)


class TestAgreesWithTorch:
    @given(
        shape=st.lists(st.integers(0, 4), max_size=3),
        features=st.tuples(st.integers(1, 40), st.integers(1, 9)),
        w_bit=st.integers(1, 8),
        a_bit=st.one_of(st.none(), st.integers(1, 8)),
        g_bit=st.sampled_from([None, 2, 4]),
        bias=st.booleans(),
        unsigned=st.booleans(),
    )
    def test_output_and_gradients(
        self,
        shape: list[int],
        features: tuple[int, int],
        w_bit: int,
        a_bit: int | None,
        g_bit: int | None,
        bias: bool,
        unsigned: bool,
    ) -> None:
        layer = nBitLinear(*features, bias=bias, w_bit=w_bit, a_bit=a_bit, g_bit=g_bit)
        x = torch.randn(*shape, features[0])
        x = x.relu() if unsigned else x
        grad = signs_like(layer(x))
        assert_near(measured(layer, x, grad), reference(layer, x, grad))

    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_inputs_of_every_rank(self, shape: tuple[int, ...], bits: dict[str, int]) -> None:
        layer, x = nBitLinear(7, 3, **bits), torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 3)
        grad = signs_like(y)
        assert_near(measured(layer, x, grad), reference(layer, x, grad))

    @pytest.mark.parametrize("w_bit", WIDTHS)
    @pytest.mark.parametrize("a_bit", [None, *WIDTHS])
    def test_every_width_with_a_scale_per_channel(self, w_bit: int, a_bit: int | None) -> None:
        layer, x = nBitLinear(33, 5, w_bit=w_bit, a_bit=a_bit), torch.randn(4, 33)
        layer.weight.quantize_(torch.randn(5, 33), 0.02 + torch.rand(5))
        grad = torch.randn(4, 5)
        layer(x)
        assert_near(measured(layer, x, grad), reference(layer, x, grad))

    @pytest.mark.parametrize("bits", [{}, {"a_bit": 4}], ids=str)
    def test_in_bfloat16(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(24, 6, dtype=torch.bfloat16, **bits), torch.randn(5, 24).bfloat16()
        layer(x)
        found = measured(layer, x, torch.ones(5, 6))
        assert {value.dtype for value in found.values()} == {torch.bfloat16}
        assert_near(found, reference(layer, x, torch.ones(5, 6)), 0.03)

    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    def test_an_input_that_is_not_contiguous(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(6, 4, **bits), torch.randn(6, 5, 8).permute(2, 1, 0)[:, ::2]
        grad = signs_like(layer(x))
        assert_near(measured(layer, x, grad), reference(layer, x, grad))

    @pytest.mark.parametrize(("a_bit", "w_bit"), [(1, 1), (2, 8), (4, 4), (8, 1), (8, 8)])
    def test_forward_is_an_integer_product(self, a_bit: int, w_bit: int) -> None:
        layer, x = nBitLinear(50, 6, bias=False, w_bit=w_bit, a_bit=a_bit), torch.randn(3, 50)
        with torch.no_grad():
            y = layer(x)
            scale, low = layer.activation.scale, int(layer.activation.low)
            codes = (x * (1 / scale)).round().clamp(low, low + 2**a_bit - 1).long()
            codes = torch.where(x >= 0, 1, -1) if a_bit == 1 else codes
        total = codes @ layer.weight.codes.long().T
        wanted = total * layer.weight.channel_scale.double() * scale.double()
        torch.testing.assert_close(y.double(), wanted, rtol=2**-22, atol=0)

    @pytest.mark.parametrize("bits", [{}, {"a_bit": 4}], ids=str)
    def test_functional_call_with_packed_and_with_float_weights(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(7, 3, **bits), torch.randn(2, 7)
        grad = signs_like(layer(x))
        other = nBitLinear(7, 3, **bits).weight
        for weight in (other, other.dequantize().detach().requires_grad_()):
            y = functional_call(layer, {"weight": weight}, (x,))
            (grad_weight,) = torch.autograd.grad(y, weight, grad)
            plain = copy.deepcopy(layer)
            plain.weight.data = other
            wanted = reference(plain, x, grad)
            assert_near({"y": y.detach(), "w": grad_weight}, {"y": wanted["output"], "w": wanted["weight"]})

    def test_gradients_of_gradients_reach_a_packed_weight(self) -> None:
        layer, x = nBitLinear(7, 3), torch.randn(2, 7, requires_grad=True)
        dense = layer.weight.dequantize().detach().requires_grad_()
        grads = []
        for weight in (layer.weight, dense):
            y = functional_call(layer, {"weight": weight}, (x,)).square().sum()
            (grad_x,) = torch.autograd.grad(y, x, create_graph=True)
            grads.append(torch.autograd.grad(grad_x.square().sum(), (weight, x)))
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted)


class TestGradientBits:
    @pytest.mark.parametrize("a_bit", [None, 3])
    @pytest.mark.parametrize("g_bit", [2, 8])
    def test_the_mean_of_many_is_the_exact_gradient(self, g_bit: int, a_bit: int | None) -> None:
        layer, x = nBitLinear(12, 5, a_bit=a_bit, g_bit=g_bit), torch.randn(6, 12, requires_grad=True)
        layer.weight.quantize_(torch.randn(5, 12), 0.1 + torch.rand(5))
        y, grad, runs = layer(x), torch.randn(6, 5), 200
        samples = [torch.autograd.grad(y, (x, layer.weight), grad, retain_graph=True) for _ in range(runs)]
        wanted = reference(layer, x, grad)
        for name, stack in (("input", [s[0] for s in samples]), ("weight", [s[1] for s in samples])):
            found = torch.stack(stack).double()
            spread, error = found.std(0), (found.mean(0) - wanted[name]).abs()
            assert float(spread.max()) > 0
            assert bool((error <= 6 * (spread + spread.mean()) / math.sqrt(runs)).all()), name


class TestSavedForBackward:
    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    def test_no_float_weight(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(200, 300, w_bit=2, **bits), torch.randn(16, 200, requires_grad=True)
        layer(x)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        packed = [t for t in saved if isinstance(t, PackedParameter)]
        assert [t.packed.data_ptr() for t in packed] == [layer.weight.packed.data_ptr()]
        a_bit = bits.get("a_bit")
        kept = sum(t.numel() * t.element_size() for t in saved if not isinstance(t, PackedParameter))
        assert kept <= (x.nbytes if a_bit is None else (a_bit + 1) * x.numel() / 8 + 64)


class TestModule:
    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    def test_copies_pickles_and_state_dicts_compute_the_same(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(9, 4, w_bit=3, **bits), torch.randn(2, 9)
        wanted = layer(x)
        loaded = nBitLinear(9, 4, w_bit=3, **bits)
        loaded.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert torch.equal(other(x), wanted) and type(other.weight) is nBitLinearParameter

    def test_a_float_checkpoint_is_quantized_on_the_way_in(self) -> None:
        twin, layer, x = nn.Linear(64, 8), nBitLinear(64, 8, w_bit=8, a_bit=8), torch.randn(5, 64)
        layer.load_state_dict(twin.state_dict())
        assert (layer(x) - twin(x)).square().mean() < 1e-3 * twin(x).square().mean()

    def test_reset_parameters_gives_new_weights(self) -> None:
        layer = nBitLinear(50, 20, a_bit=4)
        layer(torch.randn(2, 50))
        before, weight = layer.weight.dequantize(), layer.weight
        layer.reset_parameters()
        assert layer.weight is weight and not torch.equal(weight.dequantize(), before)
        assert float(layer.activation.initial_scale) == 0

    def test_it_shows_its_bits(self) -> None:
        assert nBitLinear(3, 2, w_bit=3, g_bit=8).extra_repr() == (
            "in_features=3, out_features=2, bias=True, w_bit=3, g_bit=8"
        )

    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    @pytest.mark.parametrize("shape", [(), (2, 6), (7, 3, 1)], ids=str)
    def test_an_input_that_does_not_fit_is_refused(self, shape: tuple[int, ...], bits: dict[str, int]) -> None:
        layer = nBitLinear(7, 3, **bits)
        with pytest.raises(ValueError, match=r"must have in_features \(=7\) elements, got \("):
            layer(torch.randn(shape))
        assert layer.activation is None or float(layer.activation.initial_scale) == 0

    def test_wrong_bits(self) -> None:
        with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
            nBitLinear(3, 2, w_bit=9)
        with pytest.raises(ValueError, match="g_bit must be 2 to 8"):
            nBitLinear(3, 2, g_bit=1)

    def test_bitorch_engines_base_class(self) -> None:
        layer = nBitLinearBase(5, 4, 8, 2, "cpu", torch.bfloat16)
        assert (layer.a_bit, layer.w_bit, layer.bias, layer.weight.dtype) == (8, 2, None, torch.bfloat16)
        layer.prepare_params()
        codes = torch.randint(-2, 2, (4, 5), dtype=torch.int8)
        layer.set_quantized_weight_data(codes)
        assert torch.equal(layer.weight.codes, codes) and layer.qweight is layer.weight.packed
        layer.generate_quantized_weight(qweight_only=True)
        assert layer.weight.residual is None and layer.opt_weight is layer.weight


class TestComposesWithTorch:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    def test_compile_equals_eager(self, bits: dict[str, int]) -> None:
        torch.compiler.reset()
        eager = nn.Sequential(nBitLinear(8, 6, **bits), nn.ReLU(), nBitLinear(6, 4, **bits))
        x = torch.randn(2, 3, 8)
        eager(x)
        compiled = copy.deepcopy(eager)
        results = []
        for model, call in (
            (eager, eager),
            (compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager")),
        ):
            inputs = x.clone().requires_grad_()
            torch.manual_seed(1)
            y = call(inputs)
            y.square().sum().backward()
            results.append([y, inputs.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0])

    @pytest.mark.parametrize("bits", SETTINGS, ids=str)
    def test_autocast(self, bits: dict[str, int]) -> None:
        layer, x = nBitLinear(16, 4, **bits), torch.randn(3, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        grad = torch.ones(3, 4)
        y.backward(grad.bfloat16())
        found = {"output": y.detach(), "input": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        assert {found[name].dtype for name in ("input", "weight", "bias")} == {torch.float32}
        assert_near(found, reference(layer, x.bfloat16(), grad), 0.03)


@pytest.mark.parametrize("kind", ["weight only", "all bits", "binary"])
def test_training_lowers_the_loss_and_moves_codes(kind: str) -> None:
    layers: dict[str, Any] = {
        "weight only": lambda *shape: nBitLinear(*shape, w_bit=2),
        "all bits": lambda *shape: nBitLinear(*shape, w_bit=4, a_bit=4, g_bit=8),
        "binary": BinaryLinear,
    }
    model = nn.Sequential(layers[kind](16, 64), nn.BatchNorm1d(64), layers[kind](64, 2))
    x = torch.randn(256, 16)
    y = (x[:, 0] + x[:, 1] > 0).long()
    optimizer = DiodeMix(model.parameters(), lr=1e-2)
    before = model[0].weight.codes
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.7 * losses[0]
    assert not torch.equal(model[0].weight.codes, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("settings", [*SETTINGS, {"a_bit": 8, "g_bit": 8}], ids=str)
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_a_layer_without_inputs_or_outputs_computes_and_steps(sizes: tuple[int, int], settings: dict[str, Any]) -> None:
    layer = nBitLinear(*sizes, **settings)
    x = torch.randn(2, sizes[0], requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.detach().expand(2, -1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, sizes[0]))
    assert layer.weight.grad.shape == layer.weight.shape
    DiodeMix(layer.parameters()).step()
    assert layer.weight.dequantize().shape == layer.weight.shape
