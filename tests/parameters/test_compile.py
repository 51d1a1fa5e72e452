"""torch.compile, torch.export, functional_call, checkpointing and autocast treat packed weights as float ones.

aot_eager runs all of the compiler but its code generator, which one case includes.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitorch_engine import nBitConv2d, nBitConvParameter, nBitConvTranspose2d
from bitorch_engine.optim import DiodeMix

# what torch's own compiler does internally
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

BITS: dict[str, dict[str, Any]] = {
    "weights": {"a_bit": None, "g_bit": None},
    "weights and activations": {"a_bit": 8, "g_bit": None},
    "weights and signs": {"a_bit": 1, "g_bit": None},
    "weights, activations and gradients": {"a_bit": 8, "g_bit": 8},
    "weights and gradients": {"a_bit": None, "g_bit": 8},
}
X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def compiled(module: nn.Module, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=backend)


def run(function: Any, module: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Output, gradient of the input and of all parameters."""
    torch.manual_seed(7)
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def assert_close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-5) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= rtol * float(other.abs().max())


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_compiled_without_graph_breaks_a_new_layer_computes_what_eager_does(bits: dict[str, Any]) -> None:
    layer = nBitConv2d(2, 3, 3, **bits)
    twin = copy.deepcopy(layer)
    eager = run(twin, twin)
    assert_close(run(compiled(layer), layer), eager)
    assert type(layer.weight) is nBitConvParameter
    assert torch.equal(layer.weight.residual, twin.weight.residual)
    assert torch.equal(layer.weight.packed, twin.weight.packed)


def test_generated_code_computes_what_eager_does() -> None:
    layer = nBitConv2d(2, 3, 3, w_bit=3)
    eager = run(layer, layer)
    assert_close(run(compiled(layer, "inductor"), layer), eager)


def test_a_transposed_layer_compiles() -> None:
    layer = nBitConvTranspose2d(2, 4, 3, groups=2, a_bit=4)
    eager = run(layer, layer)
    assert_close(run(compiled(layer), layer), eager)


def test_training_a_compiled_model_does_not_compile_it_again() -> None:
    layers = [nn.Sequential(nBitConv2d(2, 3, 3, a_bit=8), nn.ReLU(), nBitConv2d(3, 2, 1)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    functions = [layers[0], torch.compile(layers[1], fullgraph=True, backend=compiles)]
    for layer, function in zip(layers, functions, strict=True):
        layer(X)  # sets the activation scale
        optimizer = DiodeMix(layer.parameters(), lr=1e-2)
        for _ in range(4):
            run(function, layer)
            optimizer.step()
    assert compiles.frame_count == 1
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)
    assert torch.equal(layers[0][0].weight.codes, layers[1][0].weight.codes)


@pytest.mark.parametrize("a_bit", [None, 8, 1])
def test_an_exported_program_computes_the_same_and_holds_the_packed_weight(a_bit: int | None) -> None:
    layer = nBitConv2d(2, 3, 3, a_bit=a_bit).eval()
    expected = layer(X)
    program = torch.export.export(layer, (X,))
    assert torch.equal(program.module()(X), expected)
    stored = program.state_dict["weight"]
    assert isinstance(stored, nBitConvParameter) and torch.equal(stored.codes, layer.weight.codes)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("a_bit", [None, 8])
def test_an_exported_program_without_gradients_is_decomposed(a_bit: int | None) -> None:
    layer = nBitConv2d(2, 3, 3, a_bit=a_bit).eval()
    expected = layer(X)
    program = torch.export.export(layer.requires_grad_(False), (X,)).run_decompositions()
    torch.testing.assert_close(program.module()(X), expected.detach())


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_functional_call_with_a_float_weight_gives_it_a_gradient(bits: dict[str, Any]) -> None:
    layer = nBitConv2d(2, 3, 3, **bits)
    layer(X)
    weight = layer.weight.dequantize().requires_grad_()
    torch.manual_seed(7)
    y = torch.func.functional_call(layer, {"weight": weight}, (X,))
    y.square().sum().backward()
    assert layer.weight.grad is None
    expected = run(layer, layer)
    assert torch.allclose(y, expected[0], atol=1e-5)
    cosine = F.cosine_similarity(weight.grad.view(-1), layer.weight.grad.view(-1), 0)
    # the float and the packed path round different gradients, each without bias
    assert torch.allclose(weight.grad, layer.weight.grad, rtol=1e-4) if bits["g_bit"] is None else float(cosine) > 0.999


def test_functional_call_with_another_packed_weight() -> None:
    layer, other = nBitConv2d(2, 3, 3, a_bit=8), nBitConv2d(2, 3, 3)
    layer(X)
    y = torch.func.functional_call(layer, {"weight": other.weight, "bias": other.bias}, (X,))
    layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(y, layer(X))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_activation_checkpointing_gives_the_same_gradients(bits: dict[str, Any], use_reentrant: bool) -> None:
    layer = nBitConv2d(2, 3, 3, **bits)
    layer(X)
    expected = run(layer, layer)
    actual = run(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer)
    for one, other in zip(actual, expected, strict=True):
        # the noise of a quantized gradient is drawn in backward
        assert (
            torch.equal(one, other)
            if bits["g_bit"] is None
            else torch.allclose(one, other, atol=0.02 * other.abs().max())
        )


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_autocast_computes_in_bfloat16_and_leaves_float_gradients(bits: dict[str, Any]) -> None:
    layer = nBitConv2d(2, 3, 3, **bits)
    layer(X)
    expected = run(layer, layer)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    actual = run(under_autocast, layer)
    assert layer.weight.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        error = (one - other).square().mean().sqrt() / other.square().mean().sqrt()
        # rounding to bfloat16 carries some activations over to the next code; a scale's gradient is a sum that cancels
        assert float(error) < (0.05 if other.numel() > 1 else 0.3)


def test_autocast_saves_the_weight_packed() -> None:
    layer, saved = nBitConv2d(8, 32, 3, bias=False), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        layer(torch.randn(1, 8, 5, 5, requires_grad=True))
    weights = [t for t in saved if t.shape == layer.weight.shape]
    assert len(weights) == 1 and isinstance(weights[0], nBitConvParameter)


def test_vmap_over_inputs() -> None:
    layer = nBitConv2d(2, 3, 3)
    y = torch.func.vmap(lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)))(X)
    assert torch.allclose(y, layer(X), atol=1e-6)


def test_per_sample_gradients_of_a_float_replacement() -> None:
    layer = nBitConv2d(2, 3, 3, bias=False)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.dequantize(), X)
    layer(X).square().sum().backward()
    assert torch.allclose(per_sample.sum(0), layer.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("kind", [DiodeMix, torch.optim.SGD, None], ids=str)
def test_a_compiled_step_of_training_trains_as_eager_does(kind: Any) -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(5)
        layer = nBitConv2d(2, 3, 3, a_bit=8)
        optimizer = None if kind is None else kind(layer.parameters(), lr=1e-2)

        def step() -> Tensor:
            layer.zero_grad()
            loss = layer(X).square().sum()
            loss.backward()
            if optimizer is None:
                layer.weight.update(layer.weight, lr=1e-2)
            else:
                optimizer.step()
            return loss.detach()

        torch._dynamo.reset()
        run = torch.compile(step, backend="aot_eager") if compiled else step
        return [run().item() for _ in range(4)]

    eager = losses(False)
    assert losses(True) == pytest.approx(eager, rel=1e-4) and eager[-1] < eager[0]
