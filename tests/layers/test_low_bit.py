"""A layer that keeps plans of its calls gives what it gives without, whatever was written or replaced in between."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import bitorch_engine as be
from bitorch_engine.layers.low_bit import LowBitLayer
from bitorch_engine.ops import calls, cpu

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")


@pytest.fixture(autouse=True, params=["compiled", "python"])
def calls_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this holds for csrc/python, and for what takes its place where it is not compiled."""
    if request.param == "python":
        monkeypatch.setattr(calls, "CALLS", None)
    elif calls.CALLS is None:
        pytest.skip("compiled without Python's headers")


IMAGE = torch.rand(2, 12, 6, 6) - 0.3
ROWS = torch.rand(3, 32) - 0.3

LAYERS: dict[str, tuple[Callable[[], LowBitLayer], Tensor]] = {
    "conv": (lambda: be.nBitConv2d(12, 8, 3, padding=1, a_bit=8), IMAGE),
    "depthwise": (lambda: be.nBitConv2d(12, 12, 3, padding=1, groups=12, a_bit=8), IMAGE),
    "binary": (lambda: be.BinaryConv2d(12, 8, 3, padding=1), IMAGE),
    "transposed": (lambda: be.nBitConvTranspose2d(12, 8, 3, stride=2, a_bit=8), IMAGE),
    "transposed, float input": (lambda: be.nBitConvTranspose2d(12, 8, 3, stride=2), IMAGE),
    "transposed groups, float input": (lambda: be.nBitConvTranspose2d(12, 8, 3, stride=2, groups=4, w_bit=3), IMAGE),
    "linear, 8-bit input": (lambda: be.nBitLinear(32, 16, a_bit=8), ROWS),
    "linear": (lambda: be.nBitLinear(32, 16), ROWS),
}


def in_use(name: str) -> tuple[Any, Tensor]:
    """A layer that has seen its input twice, and that input."""
    make, x = LAYERS[name]
    layer = make()
    layer(x)
    layer.eval()
    with torch.no_grad():
        layer(x)
        assert layer._plans
        layer(x)
    return layer, x


def without_plans(layer: nn.Module, x: Tensor) -> Tensor:
    """Where gradients are recorded, other ops compute the same."""
    with torch.enable_grad():
        return layer(x).detach()


def check(layer: nn.Module, x: Tensor) -> None:
    expected = without_plans(layer, x)
    with torch.no_grad():
        for _ in range(3):  # none yet, made, used
            y = layer(x)
            assert y.stride() == expected.stride()
            assert y.dtype is expected.dtype
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parameter(layer: nn.Module) -> Any:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(-1)
    return other.weight


def other_activation(layer: Any) -> None:
    if layer.activation is not None:
        layer.activation = type(layer.activation)(layer.a_bit)
        with torch.no_grad():
            layer.activation.prepare_(IMAGE * 3)


def set_gain(layer: Any, *, through_data: bool) -> None:
    if layer.activation is not None:
        gain = layer.activation.log_gain
        (gain.data if through_data else gain).fill_(0.5)


def set_data(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


WEIGHT: dict[str, Callable[[Any], object]] = {
    "weight written": lambda layer: layer.weight.mul_(-1),
    "weight's data written": lambda layer: layer.weight.data.mul_(-1),
    "data assigned": lambda layer: set_data(layer.weight, -layer.weight.dequantize()),
    "codes written": lambda layer: layer.weight.packed.bitwise_not_(),
    "codes replaced": lambda layer: setattr(layer.weight, "packed", ~layer.weight.packed),
    "weight replaced": lambda layer: setattr(layer, "weight", parameter(layer)),
    "weight replaced unseen": lambda layer: layer._parameters.update(weight=parameter(layer)),
    "scale written": lambda layer: layer.weight.channel_scale.mul_(2),
    "scale written unseen": lambda layer: layer.weight.channel_scale.data.mul_(2),
    "scale's data replaced": lambda layer: set_data(layer.weight.channel_scale, layer.weight.channel_scale.flip(0) * 2),
    "scale replaced": lambda layer: setattr(layer.weight, "channel_scale", layer.weight.channel_scale * 2),
    "shared, then written": lambda layer: (layer.weight.share_memory_(), layer.weight.packed.data.bitwise_not_()),
    "bias written": lambda layer: layer.bias.add_(1),
    "bias written unseen": lambda layer: layer.bias.data.add_(1),
    "bias's data replaced": lambda layer: set_data(layer.bias, layer.bias.data + 1),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.data + 1)),
    "bias replaced unseen": lambda layer: layer._parameters.update(bias=nn.Parameter(layer.bias.data + 1)),
    "bias in half precision": lambda layer: set_data(layer.bias, (layer.bias.data + 1).half()),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "reset": lambda layer: layer.reset_parameters(),
    "loaded": lambda layer: layer.load_state_dict(
        {k: -v if k in ("weight", "bias") else v for k, v in layer.state_dict().items()}
    ),
}
ACTIVATION: dict[str, Callable[[Any], object]] = {
    "gain written": lambda layer: set_gain(layer, through_data=False),
    "gain written unseen": lambda layer: set_gain(layer, through_data=True),
    "gain's data replaced": lambda layer: set_data(layer.activation.log_gain, torch.tensor(0.5)),
    "range's data replaced": lambda layer: set_data(layer.activation.initial_scale, torch.tensor(0.3)),
    "range replaced": lambda layer: layer.activation._buffers.update(initial_scale=torch.tensor(0.3)),
    "range written unseen": lambda layer: layer.activation.initial_scale.data.mul_(1.5),
    "lowest code written": lambda layer: layer.activation.low.zero_(),
    "quantizer replaced": other_activation,
}


@pytest.mark.parametrize("write", WEIGHT.values(), ids=WEIGHT)
def test_a_plan_does_not_outlive_what_it_was_made_of(name: str, write: Callable[[Any], object]) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        before = layer(x)
        write(layer)
        assert not torch.equal(layer(x), before)
    check(layer, x)


@pytest.mark.parametrize("write", ACTIVATION.values(), ids=ACTIVATION)
@pytest.mark.parametrize("name", ["conv", "depthwise", "transposed", "linear, 8-bit input", "binary"])
def test_a_plan_does_not_outlive_the_activations_scale(name: str, write: Callable[[Any], object]) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        before = layer(x)
        write(layer)
        if not (name == "binary" and write is ACTIVATION["lowest code written"]):  # which it does not read
            assert not torch.equal(layer(x), before)
            check(layer, x)


@pytest.mark.parametrize(
    ("attribute", "value"), [("stride", (2, 2)), ("padding", (0, 1)), ("dilation", (2, 2)), ("padding_mode", "reflect")]
)
def test_a_plan_does_not_outlive_the_geometry(attribute: str, value: Any) -> None:
    layer, x = in_use("conv")
    setattr(layer, attribute, value)
    layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]
    check(layer, x)


def test_padded_and_other_inputs_of_one_shape_differ() -> None:
    layer = be.nBitConv2d(12, 8, 3, padding=1, padding_mode="reflect", a_bit=8)
    layer(IMAGE)
    for x in (IMAGE, torch.randn(2, 12, 8, 8), IMAGE):  # IMAGE is 8 x 8 once it is padded
        check(layer.eval(), x)


@pytest.mark.parametrize("name", ["transposed", "transposed, float input", "transposed groups, float input"])
def test_output_sizes_of_a_transposed_layer_have_their_plans(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        for side in (13, 14, 13, 14):
            y = layer(x, output_size=(side, side))
            assert y.shape == (2, 8, side, side)
            torch.testing.assert_close(y[..., :13, :13], layer(x), rtol=1e-5, atol=1e-5)


def test_each_shape_memory_order_and_dtype_has_its_plan(name: str) -> None:
    layer, x = in_use(name)
    inputs = [x, x[:1], x.flip(0), x.double(), x.bfloat16(), torch.cat([x, x])[::2]]
    if x.dim() == 4:
        inputs.append(x.contiguous(memory_format=torch.channels_last))
    for _ in range(2):
        for other in inputs:
            with torch.no_grad():
                y = layer(other)
            expected = without_plans(layer, other)
            assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
            tolerance = 1e-2 if other.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_inputs_without_memory_of_ours_have_no_plan(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        assert layer(x.to("meta")).is_meta
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(layer(mode.from_tensor(x)), torch._subclasses.FakeTensor)


def test_nothing_is_a_shape_too(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        for _ in range(3):
            assert layer(x[:0]).shape == layer(x)[:0].shape


def test_more_shapes_than_plans() -> None:
    layer = be.nBitLinear(8, 8).eval()
    inputs = [torch.randn(1, *[1] * n, 8) for n in range(50)] + [torch.randn(n, 1, 8) for n in range(2, 9)] * 3
    inputs += [torch.randn(2, *[1] * n, 8) for n in range(50)]
    with torch.no_grad():
        for x in inputs * 2:
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight.dequantize(), layer.bias))
            assert len(layer._plans) <= 64


def test_negative_views_are_read_as_what_they_stand_for(name: str) -> None:
    layer, x = in_use(name)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    with torch.no_grad():
        layer(torch.complex(torch.zeros_like(x), x).imag)  # of that memory order
        assert torch.equal(layer(negative), layer(x))


def test_autocast_is_heard(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        assert layer(x).dtype is torch.float32


def test_a_cast_layer_has_other_plans(name: str) -> None:
    layer, x = in_use(name)
    layer.to(torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            y = layer(x.bfloat16())
            assert y.dtype is torch.bfloat16
            torch.testing.assert_close(y, without_plans(layer, x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_functional_call_brings_its_own_tensors(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        before = layer(x)
        for weight in (parameter(layer), layer.weight.dequantize().neg()):
            y = torch.func.functional_call(layer, {"weight": weight}, (x,))
            bias = layer.bias.view(-1, *[1] * (x.dim() - 2))
            torch.testing.assert_close(y - bias, bias - before, rtol=1e-4, atol=1e-4)
            assert torch.equal(layer(x), before)


def test_hooks_run(name: str) -> None:
    layer, x = in_use(name)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        assert layer(x) is seen[0]


def test_copies_make_plans_of_their_own(name: str) -> None:
    layer, x = in_use(name)
    for made in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert made._plans == ()
        check(made, x)


def test_gradients_are_recorded_where_they_should_be(name: str) -> None:
    layer, x = in_use(name)
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None


def test_plans_of_inference_mode_give_no_inference_tensors_outside(name: str) -> None:
    make, x = LAYERS[name]
    layer = make()
    layer(x)
    layer.eval()
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        y = layer(x)
    assert not y.is_inference()
    assert torch.equal(y, expected)


def test_the_number_of_threads_is_followed(name: str) -> None:
    layer, x = in_use(name)
    threads, (plan,) = torch.get_num_threads(), layer._plans
    try:
        torch.set_num_threads(threads + 1)
        check(layer, x)
        assert plan not in layer._plans
    finally:
        torch.set_num_threads(threads)


def test_weights_without_a_version_have_no_plans(name: str) -> None:
    make, x = LAYERS[name]
    with torch.inference_mode():
        layer = make()
        layer(x)
        layer(x)
        assert layer._plans == ()


def test_shared_weights_have_no_plans(name: str) -> None:
    make, x = LAYERS[name]
    layer: Any = make()
    layer(x)
    layer.weight.share_memory_()
    with torch.no_grad():
        before = layer(x)
        layer(x)
        layer.weight.packed.data.bitwise_not_()  # as another process does
        assert not torch.equal(layer(x), before)
    check(layer, x)


@pytest.mark.parametrize("name", ["conv", "binary", "linear, 8-bit input"])
def test_a_loaded_scale_is_prepared_again(name: str) -> None:
    layer, x = in_use(name)
    layer.activation.load_state_dict(layer.activation.state_dict())
    assert not layer.activation.is_ready
    with torch.no_grad():
        layer(x)
    assert layer.activation.is_ready  # ranks do this together


def test_not_finite_inputs_give_nan(name: str) -> None:
    layer, x = in_use(name)
    x = x.clone()
    x[0, 0] = float("inf")
    with torch.no_grad():
        assert torch.equal(layer(x).isnan(), without_plans(layer, x).isnan())


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_a_cap_holds_for_plans_made_before(name: str, isa: str) -> None:
    layer, x = in_use(name)
    with cpu.cap_isa(isa), torch.no_grad():
        torch.testing.assert_close(layer(x), without_plans(layer, x), rtol=1e-5, atol=1e-5)


def test_integers_are_refused(name: str) -> None:
    layer, x = in_use(name)
    for record in (True, False):
        with torch.set_grad_enabled(record), pytest.raises(TypeError, match="must be floating point"):
            layer(x.round().long())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_tracing_with_torch_jit_is_refused(name: str) -> None:
    layer, x = in_use(name)
    for record in (True, False):
        with torch.set_grad_enabled(record), pytest.raises(NotImplementedError, match="use torch.export.export or"):
            torch.jit.trace(nn.Sequential(layer), (x,))
    check(layer, x)


def test_a_written_weight_is_forgotten_in_every_shape(name: str) -> None:
    layer, x = in_use(name)
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x, x])):
            layer(batch)
        assert len(layer._plans) == 3
        layer.weight.packed.bitwise_not_()
        layer(torch.cat([x, x[:1]]))
    assert len(layer._plans) == 1  # a plan holds the weight in a kernel's order


def test_a_subclass_wraps_an_input_of_more_dimensions_once() -> None:
    class Doubled(be.nBitLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(6, 5, a_bit=8)
    x = torch.randn(2, 3, 6)
    layer(x)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 1)).view(2, 3, 5))


class Add(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return value + 10


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", ["parametrize", "prune"])
def test_a_bias_that_is_made_of_others_is_added_in_inference(name: str, change: str) -> None:
    layer, x = in_use(name)
    if change == "parametrize":
        torch.nn.utils.parametrize.register_parametrization(layer, "bias", Add())
    else:
        torch.nn.utils.prune.custom_from_mask(layer, "bias", torch.arange(len(layer.bias)) % 2)
    with torch.enable_grad():
        expected = layer(x)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)


def test_a_bias_of_a_convolution_of_few_channels_that_is_made_of_others_is_added_in_inference() -> None:
    layer, x = be.nBitConv2d(3, 16, 3, padding=1), IMAGE[:, :3].contiguous()
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Add())
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_a_write_while_a_plan_is_made_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = in_use("conv")
    plan = be.ops.plan

    def plan_after_a_write(*arguments: Any) -> Any:
        layer.activation.log_gain.add_(1)  # as another thread may
        return plan(*arguments)

    monkeypatch.setattr(be.ops, "plan", plan_after_a_write)
    layer(torch.cat([x, x]))
    monkeypatch.setattr(be.ops, "plan", plan)
    check(layer, torch.cat([x, x]))


def test_a_bias_that_becomes_one_number_for_all_is_no_longer_planned() -> None:
    layer, x = in_use("linear")
    layer.bias.data = layer.bias.data[:1].expand(layer.bias.shape)
    check(layer, x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_of_another_length_is_not_read_beyond_its_end(name: str) -> None:
    layer, x = in_use(name)
    layer.bias.data = layer.bias.data[:4]  # at the same place
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                layer(x)


@pytest.mark.parametrize("name", ["linear", "linear, 8-bit input"])
def test_one_bias_for_all_outputs_is_added_to_all(name: str) -> None:
    layer, x = in_use(name)
    layer.bias = nn.Parameter(torch.full((1,), 0.5))
    check(layer, x)


@pytest.mark.parametrize("a_bit", [None, 8])
@pytest.mark.parametrize("kind", [be.nBitConv2d, be.nBitConvTranspose2d])
def test_a_padding_that_is_set_anew_is_used_with_and_without_gradients(kind: Any, a_bit: int | None) -> None:
    layer, x = kind(12, 8, 3, a_bit=a_bit), IMAGE
    check(layer, x)
    twin = {be.nBitConv2d: nn.Conv2d, be.nBitConvTranspose2d: nn.ConvTranspose2d}[kind](12, 8, 3, padding=(2, 1))
    layer.padding = (2, 1)
    check(layer, x)
    assert layer(x).shape == twin(x).shape


@pytest.mark.parametrize("name", ["conv", "depthwise", "transposed", "linear, 8-bit input", "linear"])
@pytest.mark.parametrize("assign", [False, True], ids=["tied", "loaded"])
def test_bits_are_those_of_the_weight_that_is_there(name: str, assign: bool) -> None:
    layer, x = in_use(name)
    other = copy.deepcopy(layer)
    other.weight = layer.parameter_class(
        layer.weight.dequantize(),
        w_bit=2,
        transposed=layer.transposed_groups > 0,
        groups=max(1, layer.transposed_groups),
    )
    if assign:
        layer.load_state_dict(other.state_dict(), assign=True)
    else:
        layer.weight = other.weight
    assert layer.w_bit == 2 and "w_bit=2" in repr(layer)
    check(layer, x)
    layer.weight = nn.Parameter(layer.weight.dequantize())
    assert layer.w_bit == 2  # what it is quantized to again


def test_a_float_weight_has_the_bits_of_the_one_it_replaces_however_that_came() -> None:
    layer = be.nBitLinear(4, 6, w_bit=5)
    for bits, put in (
        (2, lambda packed: layer.register_parameter("weight", packed)),
        (3, lambda packed: layer._parameters.update(weight=packed)),
    ):
        put(be.nBitLinearParameter(torch.randn(6, 4), w_bit=bits))
        layer.weight = nn.Parameter(torch.randn(6, 4))
        assert layer.w_bit == bits


@pytest.mark.parametrize("bits", ["w_bit", "a_bit"])
def test_bits_of_what_is_there_cannot_be_set(bits: str) -> None:
    layer, x = in_use("linear, 8-bit input")
    setattr(layer, bits, getattr(layer, bits))
    with pytest.raises(AttributeError, match=f"{bits} of this layer is . and cannot be set"):
        setattr(layer, bits, 3)
    check(layer, x)


def test_the_input_can_have_other_bits_while_the_weight_stays() -> None:
    layer, x = in_use("linear, 8-bit input")
    weight = layer.weight
    layer.quantize_(layer.w_bit, 2, layer.g_bit)
    assert layer.weight is weight and layer.a_bit == 2
    layer(x)
    check(layer, x)
    layer.activation = None
    assert layer.a_bit is None
    check(layer, x)


@pytest.mark.parametrize("used", [True, False])
def test_a_deleted_activation_is_none_and_the_input_float_from_then_on(used: bool) -> None:
    layer, x = nn.Linear(8, 3), torch.randn(2, 8)
    be.quantize_(layer, 8, a_bit=2)
    if used:
        with torch.no_grad():
            assert torch.equal(layer(x), layer(x))  # planned, the second time
    del layer.activation
    assert layer.activation is None and layer.a_bit is None and "a_bit" not in repr(layer)
    assert not [name for name in layer.state_dict() if name.startswith("activation")]
    expected = nn.functional.linear(x.double(), layer.weight.dequantize().double(), layer.bias.double())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(layer(x).double(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [be.nBitConv2d, be.nBitConvTranspose2d, be.nBitLinear])
@pytest.mark.parametrize("bits", [{}, {"a_bit": 8}, {"g_bit": 8}], ids=str)
def test_symbolic_tracing_says_what_to_do(kind: Any, bits: dict[str, int]) -> None:
    model = nn.Sequential(kind(*[3] * (2 if kind is be.nBitLinear else 3), **bits))
    with pytest.raises(TypeError, match="Trace the float model and call quantize_ on the graph module"):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4)))
    assert len(be.quantize_(traced, **bits).converted) == 1
    assert traced(torch.randn(2, 3)).shape == (2, 4)


@pytest.mark.parametrize("bits", [{"a_bit": 8}, {"g_bit": 8}], ids=str)
def test_transforms_of_torch_func_are_refused(bits: dict[str, int]) -> None:
    layer, x = be.nBitConv2d(3, 4, 3, **bits), torch.randn(2, 3, 6, 6)
    for _ in range(2):
        with pytest.raises(
            NotImplementedError, match=r"with a_bit or g_bit is not supported in torch.func's transforms"
        ):
            torch.func.grad(lambda x: layer(x).sum())(x)
        layer(x)


def test_plans_of_either_kind_are_called_with_all_that_they_look_at() -> None:
    layer, x = in_use("conv")
    ((_, _, plan),) = layer._plans
    with pytest.raises(TypeError, match="argument"):
        plan(x)


def test_layers_are_freed_with_their_plans() -> None:
    layer, _ = in_use("conv")

    def hook(grad: Tensor, held: nn.Module = layer) -> Tensor:
        return grad

    layer.bias.register_hook(hook)  # a cycle through what the plan holds
    freed = weakref.ref(layer)
    del layer, hook
    gc.collect()
    assert freed() is None
