"""Whatever copies, moves, stores or shares a parameter keeps its type, codes, scale and residual."""

import copy
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitorch_engine as be
from bitorch_engine import nBitConv2d, nBitConvParameter, nBitConvTranspose1d

TRAINED = ("packed", "channel_scale", "residual", "scale_moments", "w_bit", "transposed_groups", "learn_scale",
           "noise_seed", "noise_step", "grad_exponent")  # fmt: skip


def trained(w_bit: int = 3, **layout: Any) -> nBitConvParameter:
    """A weight with every kind of training state."""
    weight = nBitConvParameter(torch.randn(4, 6, 3, 3), w_bit=w_bit, learn_scale=True, **layout)
    v, m = (torch.zeros(weight.shape, dtype=torch.float16) for _ in range(2))
    weight.update(weight, v, m, lr=0.01, grad=torch.randn(weight.shape))
    assert weight.noise_seed is not None and weight.grad_exponent is not None and weight.scale_moments is not None
    return weight


def assert_same(a: nBitConvParameter, b: Tensor, *, shared: bool = False) -> None:
    assert type(b) is nBitConvParameter
    assert (a.shape, a.requires_grad) == (b.shape, b.requires_grad)
    for name in TRAINED:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, Tensor):
            assert torch.equal(one.cpu(), other.cpu()), name
            if one.numel():
                assert (one.data_ptr() == other.data_ptr()) == shared, name
        else:
            assert one == other, name


def saved_and_loaded(weight: nBitConvParameter) -> Any:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[nBitConvParameter], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "torch.save and torch.load": saved_and_loaded,
    "clone": lambda weight: weight.detach().clone().requires_grad_(),
    "deepcopy of a module": lambda weight: copy.deepcopy(nn.ParameterList([weight]))[0],
    "to(dtype) and back": lambda weight: weight.detach().to(torch.bfloat16).to(torch.float32).requires_grad_(),
    "to(device, copy=True)": lambda weight: weight.detach().to("cpu", copy=True).requires_grad_(),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layout", [{}, {"transposed": True, "groups": 2}], ids=["plain", "transposed"])
def test_a_copy_has_everything_and_shares_nothing(layout: dict[str, Any], copied: Callable[..., Any]) -> None:
    weight = trained(**layout)
    assert_same(weight, copied(weight))


@pytest.mark.parametrize("w_bit", range(1, 9))
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_a_copy_goes_on_training_as_the_original_does(w_bit: int, copied: Callable[..., Any]) -> None:
    weights = [weight := trained(w_bit), copied(weight)]
    for weight in weights:
        weight.update(weight, lr=0.01, grad=torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    assert_same(*weights)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, saved_and_loaded, COPIES["pickle"]], ids=["deepcopy", "save", "pickle"]
)
def test_a_copy_requires_grad_as_the_original_does(copied: Callable[..., Any], requires_grad: bool) -> None:
    weight = trained().requires_grad_(requires_grad)
    assert copied(weight).requires_grad == requires_grad


def test_deepcopy_keeps_weights_tied() -> None:
    module = nn.Module()
    module.a = module.b = trained()
    copied = copy.deepcopy(module)
    assert copied.a is copied.b and copied.a is not module.a


@pytest.mark.parametrize(
    "share",
    [lambda p: p.detach().requires_grad_(), lambda p: p.data.requires_grad_(), lambda p: nn.Parameter(p.detach())],
    ids=["detach", "data", "nn.Parameter"],
)
def test_what_shares_the_codes_is_still_packed(share: Callable[..., Any]) -> None:
    weight = trained()
    assert_same(weight, share(weight), shared=True)


def test_training_a_detached_alias_trains_the_weight() -> None:
    weight = nBitConvParameter(torch.randn(4, 3), w_bit=4)
    alias = weight.detach()
    with torch.no_grad():
        weight.add_(0.3)
    assert torch.equal(alias.codes, weight.codes) and torch.equal(alias.level_values(), weight.level_values())


def test_a_fresh_process_loads_it_with_weights_only(tmp_path: Path) -> None:
    weight, model = trained(), nn.Sequential(nBitConv2d(2, 3, 3, a_bit=8), nBitConvTranspose1d(3, 4, 3, w_bit=2))
    model[0](torch.randn(1, 2, 5, 5))
    torch.save({"weight": weight, "model": model.state_dict()}, tmp_path / "file.pt")
    program = f"""
import bitorch_engine, torch, warnings
warnings.simplefilter("error")
file = torch.load({str(tmp_path / "file.pt")!r}, weights_only=True)
weight, state = file["weight"], file["model"]
print(type(weight).__name__, weight.w_bit, int(weight.codes.sum()), int(weight.residual.sum()), weight.noise_seed)
print(*(type(value).__name__ for value in state.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    expected = f"nBitConvParameter 3 {int(weight.codes.sum())} {int(weight.residual.sum())} {weight.noise_seed}"
    assert first == expected
    assert second.split() == ["nBitConvParameter", *["Tensor"] * 4, "nBitConvParameter", "Tensor"]


def test_what_is_saved_is_as_small_as_what_is_held() -> None:
    layer, file = nBitConv2d(64, 64, 3, w_bit=2, bias=False), io.BytesIO()
    layer.weight.drop_residual_()
    torch.save(layer.state_dict(), file)
    assert file.tell() < layer.weight.nbytes + 3000


class TestModules:
    def layer(self, **bits: Any) -> nBitConv2d:
        layer = nBitConv2d(2, 3, 3, **bits)
        layer.weight.update(layer.weight, lr=0.01, grad=torch.randn(layer.weight.shape))
        if layer.a_bit is not None:
            layer(torch.randn(1, 2, 5, 5))
        return layer

    @pytest.mark.parametrize(
        ("move", "dtype"),
        [
            (lambda m: m.half(), torch.float16),
            (lambda m: m.bfloat16(), torch.bfloat16),
            (lambda m: m.double(), torch.float64),
            (lambda m: m.float(), torch.float32),
            (lambda m: m.cpu(), torch.float32),
            (lambda m: m.to("cpu"), torch.float32),
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.to("cpu", torch.float16), torch.float16),
            (lambda m: m.type(torch.float16), torch.float16),
        ],
        ids=["half", "bfloat16", "double", "float", "cpu", "to a device", "to a dtype", "to both", "type"],
    )
    def test_moving_a_module_keeps_everything(self, move: Callable[..., Any], dtype: torch.dtype) -> None:
        layer = self.layer(a_bit=8)
        before = copy.deepcopy(layer.weight)
        move(layer)
        assert layer.weight.dtype == layer.weight.dequantize().dtype == dtype
        assert_same(before, layer.weight)
        assert layer(torch.randn(1, 2, 5, 5, dtype=dtype)).dtype == dtype

    def test_a_dtype_there_and_back_loses_nothing(self) -> None:
        layer = self.layer()
        values = layer.weight.dequantize()
        assert torch.equal(layer.half().float().weight.dequantize(), values)

    def test_gradients_move_with_the_module(self) -> None:
        layer = self.layer()
        layer(torch.randn(1, 2, 5, 5)).sum().backward()
        grad, values = layer.weight.grad, layer.weight.grad.bfloat16()
        layer.to(torch.bfloat16)
        assert layer.weight.grad is grad and torch.equal(grad, values)

    @pytest.mark.parametrize(
        "move",
        [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.double(), lambda m: m.to_empty(device="cpu"),
         lambda m: m.share_memory(), lambda m: m.to(memory_format=torch.channels_last)],
        ids=["to", "float", "double", "to_empty", "share_memory", "channels last"],
    )  # fmt: skip
    def test_what_belongs_to_a_weight_stays_while_a_graph_and_a_weak_reference_hold_it(
        self, move: Callable[..., Any]
    ) -> None:
        model, called = nn.Sequential(self.layer()), []
        weight, reference = model[0].weight, weakref.ref(model[0].weight)
        weight.note = "mine"
        weight.register_hook(lambda grad: called.append("hook"))
        weight.register_post_accumulate_grad_hook(lambda p: called.append("after"))
        y = model(torch.randn(1, 2, 5, 5))
        move(model)
        assert model[0].weight is weight is reference() and weight.note == "mine"
        y.sum().backward()
        weight.grad = None
        model[0].reset_parameters()  # what to_empty left
        model(torch.randn(1, 2, 5, 5, dtype=weight.dtype)).sum().backward()
        assert called == ["hook", "after"] * 2
        assert weight.grad.dtype == weight.dtype

    def test_steps_in_backward_go_on_after_moving(self) -> None:
        layer = self.layer()
        be.optim.DiodeMix(layer.parameters(), lr=1.0).step_in_backward()
        layer.to("cpu")
        codes = layer.weight.codes
        layer(torch.randn(1, 2, 5, 5)).sum().backward()
        assert not torch.equal(codes, layer.weight.codes) and layer.weight.grad is None

    def test_what_a_function_makes_floats_of_is_written(self) -> None:
        layer = self.layer(bias=False)
        weight, values = layer.weight, layer.weight.dequantize()
        layer._apply(lambda t: t * -1.0)
        assert layer.weight is weight
        torch.testing.assert_close(weight.dequantize(), -values, atol=float(weight.channel_scale.max()), rtol=0)

    def test_where_no_layer_holds_a_weight_torch_swaps_it(self) -> None:
        weights = nn.ParameterList([trained()])
        before = copy.deepcopy(weights[0])
        assert weights.double()[0].dtype == torch.float64
        assert_same(before, weights[0])

    def test_an_optimizer_made_before_moving_still_steps_the_weight(self) -> None:
        layer = self.layer()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer.to(torch.float64)
        codes = layer.weight.codes
        layer(torch.randn(1, 2, 5, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert not torch.equal(codes, layer.weight.codes)

    def test_to_meta_keeps_shapes_and_sizes(self) -> None:
        layer = self.layer()
        nbytes = layer.weight.nbytes
        layer.to("meta")
        assert type(layer.weight) is nBitConvParameter and layer.weight.nbytes == nbytes
        assert {t.device.type for t in vars(layer.weight).values() if isinstance(t, Tensor)} == {"meta"}

    @pytest.mark.parametrize("a_bit", [None, 8, 1])
    def test_a_module_built_on_meta_can_be_emptied_onto_a_device_and_reset(self, a_bit: int | None) -> None:
        torch.manual_seed(3)
        layer = nBitConv2d(2, 3, 3, a_bit=a_bit, device="meta").to_empty(device="cpu")
        for module in layer.modules():
            for tensor in (*module.parameters(False), *module.buffers(False)):
                if not isinstance(tensor, nBitConvParameter):
                    tensor.detach().fill_(float("nan"))  # what uninitialized memory may be
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        x = torch.randn(2, 2, 5, 5)
        assert bool(layer(x).isfinite().all())
        assert type(layer.weight) is nBitConvParameter and 0.05 < float(layer.weight.dequantize().std()) < 0.4

    def test_reset_parameters_draws_what_torch_draws(self) -> None:
        layer, twin = self.layer(), nn.Conv2d(2, 3, 3)
        torch.manual_seed(5)
        layer.reset_parameters()
        torch.manual_seed(5)
        twin.reset_parameters()
        assert torch.equal(layer.bias, twin.bias)
        step = float(layer.weight.channel_scale.max())
        assert float((layer.weight.dequantize() - twin.weight).detach().abs().max()) < 0.7 * step

    def test_a_state_dict_loads_strictly_and_exactly(self) -> None:
        for w_bit, a_bit in ((1, None), (4, 8), (8, 1)):
            source, target = self.layer(w_bit=w_bit, a_bit=a_bit), self.layer(w_bit=w_bit, a_bit=a_bit)
            assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
            assert_same(source.weight, target.weight)
            x = torch.randn(2, 2, 5, 5)
            assert torch.equal(source(x), target(x))

    def test_a_state_dict_shares_memory_like_torchs_and_keep_vars_gives_the_parameter(self) -> None:
        layer = self.layer()
        assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
        stored = layer.state_dict()["weight"]
        assert type(stored) is nBitConvParameter and stored.packed is layer.weight.packed

    def test_assign_takes_the_tensors_themselves(self) -> None:
        source, target = self.layer(), nBitConv2d(2, 3, 3, device="meta")
        state = copy.deepcopy(source.state_dict())
        target.load_state_dict(state, assign=True)
        assert_same(source.weight, target.weight)
        assert target.weight.packed is state["weight"].packed
        assert torch.equal(source(x := torch.randn(1, 2, 5, 5)), target(x))

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_float_checkpoint_is_quantized_on_the_way_in(self, dtype: torch.dtype, assign: bool) -> None:
        twin, layer = nn.Conv2d(2, 3, 3, dtype=dtype), self.layer(a_bit=8)
        state = twin.state_dict()
        kept = dict(state)
        layer.load_state_dict(state, strict=True, assign=assign)
        assert type(layer.weight) is nBitConvParameter and layer.weight.requires_grad
        expected = nBitConvParameter(twin.weight.detach().float(), w_bit=4)
        assert torch.equal(layer.weight.codes, expected.codes)
        assert torch.equal(layer.weight.channel_scale, expected.channel_scale)
        assert torch.equal(layer.bias.float(), twin.bias.float())
        assert state.keys() == kept.keys() and all(state[key] is kept[key] for key in kept)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (lambda: nBitConv2d(2, 3, 3, w_bit=2).state_dict(), "w_bit"),
            (lambda: nBitConv2d(2, 4, 3).state_dict(), "size mismatch|shape"),
            (lambda: nn.Conv2d(2, 4, 3).state_dict(), "size mismatch for weight"),
            (lambda: {"bias": torch.zeros(3)}, 'Missing key.*"weight"'),
            (lambda: nBitConv2d(2, 3, 3).state_dict() | {"other": torch.zeros(1)}, 'Unexpected key.*"other"'),
        ],
        ids=["another width", "another shape", "another float shape", "no weight", "something else"],
    )
    def test_a_state_dict_that_does_not_fit_is_refused(self, state: Callable[..., Any], message: str) -> None:
        layer = self.layer()
        codes = layer.weight.codes
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state())
        assert message.startswith("Unexpected") or torch.equal(layer.weight.codes, codes)

    def test_swap_tensors_exchanges_two_weights(self) -> None:
        a, b = trained(), trained()
        was_a, was_b = copy.deepcopy(a), copy.deepcopy(b)
        torch.utils.swap_tensors(a, b)
        assert_same(was_a, b)
        assert_same(was_b, a)

    def test_moving_swaps_where_torch_is_told_to(self) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer = self.layer()
            before, weight = copy.deepcopy(layer.weight), layer.weight
            layer.half()
            assert layer.weight is weight and layer.weight.dtype == torch.float16
            assert_same(before, layer.weight)
            layer.load_state_dict(copy.deepcopy(layer.state_dict()))
            assert type(layer.weight) is nBitConvParameter
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    def test_parameters_to_vector_and_back(self) -> None:
        layer = self.layer()
        before = copy.deepcopy(layer.weight)
        vector = nn.utils.parameters_to_vector(layer.parameters())
        assert torch.equal(vector[: layer.weight.numel()], before.dequantize().view(-1))
        nn.utils.vector_to_parameters(vector.detach(), layer.parameters())
        assert torch.equal(layer.weight.codes, before.codes)
        assert torch.equal(layer.weight.channel_scale, before.channel_scale)

    def test_gradients_are_clipped_like_any_others(self) -> None:
        layer = self.layer()
        layer(torch.randn(4, 2, 5, 5)).square().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        true = torch.cat([g.view(-1) for g in grads]).norm()
        assert torch.allclose(norm, true)
        for p, g in zip(layer.parameters(), grads, strict=True):
            assert torch.allclose(p.grad, g * 0.5 / true, rtol=1e-4)
        nn.utils.clip_grad_value_(layer.parameters(), 1e-3)
        assert float(layer.weight.grad.abs().max()) < 1.0001e-3

    def test_freezing_a_layer(self) -> None:
        layer = self.layer().requires_grad_(False)
        x = torch.randn(1, 2, 5, 5, requires_grad=True)
        layer(x).sum().backward()
        assert layer.weight.grad is None and x.grad is not None

    def test_zero_grad_and_assigning_a_gradient(self) -> None:
        layer = self.layer()
        layer(torch.randn(1, 2, 5, 5)).sum().backward()
        assert type(layer.weight.grad) is Tensor and layer.weight.grad.shape == layer.weight.shape
        layer.weight.grad = None
        assert layer.weight.grad is None
        layer.weight.grad = torch.ones(3, 2, 3, 3)
        layer.zero_grad(set_to_none=False)
        assert not layer.weight.grad.any()
        layer.zero_grad()
        assert layer.weight.grad is None

    def test_sharing_memory_shares_what_is_held(self) -> None:
        assert nBitConvParameter.share_memory_ is not Tensor.share_memory_  # which would crash the process
        layer = self.layer()
        before = copy.deepcopy(layer.weight)
        layer.share_memory()
        assert layer.weight.is_shared() and layer.weight.packed.is_shared() and layer.weight.residual.is_shared()
        for name in TRAINED:
            one, other = getattr(before, name), getattr(layer.weight, name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name
