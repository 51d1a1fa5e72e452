"""A model that was saved and loaded computes the same bits; a file that does not fit changes nothing."""

import copy
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bitorch_engine
from bitorch_engine import fuse_batch_norm_, nBitConv2d, nBitConvParameter, quantize_
from bitorch_engine.bits import packed_size
from bitorch_engine.checkpoint import CheckpointError, load, read_metadata, save
from bitorch_engine.parameters import PackedParameter

Network = Callable[..., nn.Sequential]
Bits = Callable[[Any], Any]
X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).view(4, 3, 8, 8)


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = bitorch_engine.optim.DiodeMix(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("w_bit", "a_bit"), [*zip(range(1, 9), range(8, 0, -1), strict=True), (4, None)])
def test_a_loaded_model_computes_the_same_bits(tmp_path: Path, network: Network, w_bit: int, a_bit: int | None) -> None:
    model = network(w_bit=w_bit, a_bit=a_bit)
    train(model)
    save(model, tmp_path / "m")
    converted, still_float = network(seed=1, w_bit=w_bit, a_bit=a_bit), network(seed=2, quantized=False)
    load(converted, tmp_path / "m")
    load(still_float, tmp_path / "m")
    assert torch.equal(outputs(converted), outputs(model))
    assert torch.equal(outputs(still_float), outputs(model))


LAYERS = {
    "Conv1d": (nn.Conv1d, (4, 6, 3), {"groups": 2}, (2, 4, 9)),
    "Conv2d depthwise": (nn.Conv2d, (4, 8, (3, 2)), {"groups": 4, "bias": False}, (2, 4, 7, 6)),
    "Conv3d": (nn.Conv3d, (2, 3, 2), {"padding": "same"}, (1, 2, 4, 5, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d, (4, 6, 3), {"groups": 2}, (2, 4, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (6, 4, (2, 3)), {"stride": 2}, (2, 6, 3, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d, (2, 4, 2), {"groups": 2, "bias": False}, (1, 2, 3, 3, 3)),
    "Linear": (nn.Linear, (7, 5), {}, (2, 3, 7)),
    "Linear without bias": (nn.Linear, (1, 9), {"bias": False}, (4, 1)),
}


@pytest.mark.parametrize(("kind", "shape", "options", "input_shape"), LAYERS.values(), ids=LAYERS)
def test_every_layer_comes_back_even_as_the_model_itself(
    tmp_path: Path,
    kind: type[nn.Module],
    shape: tuple[Any, ...],
    options: dict[str, Any],
    input_shape: tuple[int, ...],
    bits_of: Bits,
) -> None:
    x = torch.randn(input_shape)
    model, fresh = kind(*shape, **options), kind(*shape, **options)
    quantize_(model, w_bit=3, a_bit=5, g_bit=4, learn_scale=True)
    wanted = outputs(model, x)
    save(model, tmp_path / "m")
    load(fresh, tmp_path / "m")
    assert torch.equal(outputs(fresh, x), wanted)
    fresh.weight.drop_residual_()
    model.weight.drop_residual_()
    assert bits_of(fresh) == bits_of(model)
    assert (fresh.w_bit, fresh.a_bit, fresh.g_bit, fresh.weight.learn_scale) == (3, 5, 4, True)
    assert fresh.extra_repr() == model.extra_repr()


def test_the_file_holds_codes_and_scales_and_no_training_state(tmp_path: Path, network: Network) -> None:
    model = network(w_bit=3, a_bit=None)
    train(model)
    save(model, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    names = set(model.state_dict()) - {"0.weight", "4.weight", "5.weight"}
    assert set(tensors) == names | {f"{i}.weight.{part}" for i in (0, 4, 5) for part in ("packed", "scale")}
    assert tensors["0.weight.packed"].dtype == torch.uint8
    assert tensors["0.weight.packed"].shape == (packed_size(8 * 3 * 3 * 3, 3),)
    assert tensors["0.weight.scale"].shape == (8,)


def test_saving_changes_nothing(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    model = network()
    train(model)
    before = bits_of(model)
    save(model, tmp_path / "m")
    assert bits_of(model) == before


def test_loading_drops_the_training_state_and_training_can_go_on(tmp_path: Path, network: Network) -> None:
    model = network(a_bit=None)
    save(model, tmp_path / "m")
    train(model)
    load(model, tmp_path / "m")
    assert all(value in (None, 0) for value in model[0].weight.training_state().values())
    train(model)


def test_the_activation_scale_of_the_file_is_used_at_once(tmp_path: Path, network: Network) -> None:
    model, other = network(), network(seed=1)
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    outputs(other, 100 * X)  # a first batch would set the scale anew
    assert other[0].activation.scale.item() == model[0].activation.scale.item()
    assert torch.equal(outputs(other), outputs(model))


def test_a_model_saved_before_its_first_batch_finds_its_scales_with_the_first_batch_after(tmp_path: Path) -> None:
    model, used = nBitConv2d(3, 4, 3, a_bit=8), nBitConv2d(3, 4, 3, a_bit=8)
    save(model, tmp_path / "m")
    outputs(used, 100 * X)
    load(used, tmp_path / "m")
    assert torch.equal(outputs(used), outputs(model))


def resnet18(classes: int = 1000) -> nn.Module:
    """The parameters of ResNet-18; it is not run."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    inputs = 64
    for outputs_ in (64, 128, 256, 512):
        for block_inputs in (inputs, outputs_):
            blocks += [nn.Conv2d(block_inputs, outputs_, 3, bias=False), nn.BatchNorm2d(outputs_)]
            blocks += [nn.Conv2d(outputs_, outputs_, 3, bias=False), nn.BatchNorm2d(outputs_)]
        if inputs != outputs_:
            blocks += [nn.Conv2d(inputs, outputs_, 1, bias=False), nn.BatchNorm2d(outputs_)]
        inputs = outputs_
    return nn.Sequential(*blocks, nn.Linear(512, classes))


def test_a_resnet18_of_4_bits_takes_at_most_014_of_its_float_file(tmp_path: Path) -> None:
    model = resnet18(classes=10)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "float")
    for layer in model:
        if isinstance(layer, nn.Conv2d):  # any codes do: what they are does not change the size
            codes = torch.zeros(layer.weight.shape, dtype=torch.int8)
            layer.weight = nBitConvParameter(codes, w_bit=4, scale=0.1)
    save(model, tmp_path / "packed")
    ratio = (tmp_path / "packed").stat().st_size / (tmp_path / "float").stat().st_size
    assert 0.125 < ratio <= 0.14


# -- what else a model may be -----------------------------------------------------------------------------------------


def test_a_model_of_another_float_dtype_keeps_its_own(tmp_path: Path, network: Network) -> None:
    model = network(a_bit=None, g_bit=None)
    save(model, tmp_path / "m")
    for other in (network(seed=1, a_bit=None, g_bit=None).bfloat16(), network(seed=1, quantized=False).bfloat16()):
        load(other, tmp_path / "m")
        assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
        assert torch.equal(other[0].weight.codes, model[0].weight.codes)
        assert torch.equal(outputs(other, X.bfloat16()), outputs(copy.deepcopy(model).bfloat16(), X.bfloat16()))


class Tied(nn.Module):
    """Two layers with one weight, one layer under two names, one buffer under two names."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.register_buffer("x", torch.randn(5))
        self.register_buffer("y", torch.randn(5))
        self.again: nn.Module = nn.Conv2d(4, 4, 3, padding=1)
        if tied:
            self.b.weight, self.again, self.y = self.a.weight, self.c, self.x

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.c(self.b(self.a(x)))) + self.x.sum() - 2 * self.y.sum()


@pytest.mark.parametrize("quantized", [False, True], ids=["float target", "converted target"])
def test_what_is_shared_is_stored_once_and_stays_shared(tmp_path: Path, quantized: bool) -> None:
    model, other, apart = Tied(), Tied(), Tied(tied=False)
    quantize_(model, w_bit=4, a_bit=6)
    outputs(model, x := torch.randn(1, 4, 5, 5))
    if quantized:
        quantize_(other, w_bit=4, a_bit=6)
        quantize_(apart, w_bit=4, a_bit=6)
    save(model, tmp_path / "m")
    assert {
        name for name in safetensors.torch.load_file(tmp_path / "m") if name.startswith(("b.w", "again", "y"))
    } == set()
    load(other, tmp_path / "m")
    assert other.b.weight is other.a.weight
    assert isinstance(other.a.weight, nBitConvParameter)
    load(apart, tmp_path / "m")
    assert apart.b.weight is not apart.a.weight
    assert torch.equal(outputs(other, x), outputs(model, x))
    assert torch.equal(outputs(apart, x), outputs(model, x))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_shared_tensor_does_not_take_two_values(tmp_path: Path, bits_of: Bits, quantized: bool) -> None:
    apart, tied = Tied(tied=False), Tied()
    if quantized:
        quantize_(apart)
    save(apart, tmp_path / "m")
    before = bits_of(tied)
    with pytest.raises(CheckpointError, match="x and y are one tensor in the model, and two that differ"):
        load(tied, tmp_path / "m")
    assert bits_of(tied) == before


def test_views_of_one_memory_are_stored_each(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    whole = torch.arange(6.0)
    for name, part in {"all": whole, "left": whole[:4], "right": whole[2:]}.items():
        model.register_buffer(name, part)
        other.register_buffer(name, torch.zeros_like(part))
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    assert other.right.equal(torch.arange(2.0, 6.0))


class WithExtraState(nn.Conv2d):
    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_of_modules_comes_along(tmp_path: Path) -> None:
    model, other = WithExtraState(1, 1, 1), WithExtraState(1, 1, 1)
    model.extra, other.extra = {"seen": (1, torch.arange(3))}, None
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    assert other.extra["seen"][0] == 1
    assert other.extra["seen"][1].equal(torch.arange(3))
    model.extra = print
    with pytest.raises(TypeError, match="_extra_state is a builtins.builtin_function_or_method"):
        save(model, tmp_path / "m")


def test_a_name_that_two_tensors_would_have_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.conv = nBitConv2d(1, 1, 1)
    model.conv._parameters["weight.packed"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="two tensors of the model would be stored as conv.weight.packed; rename one"):
        save(model, tmp_path / "m")


def test_a_model_without_tensors_can_be_saved(tmp_path: Path) -> None:
    save(nn.ReLU(), tmp_path / "m", metadata={"empty": True})
    assert load(nn.ReLU(), tmp_path / "m")["metadata"] == {"empty": True}


def test_equal_models_give_equal_files(tmp_path: Path, network: Network) -> None:
    save(network(), tmp_path / "a")
    save(network(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_metadata_tells_about_the_file_and_comes_back(tmp_path: Path, network: Network) -> None:
    metadata = {"name": "µ", "scores": [1, 2.5, None, True], "nested": {"a": "\n\0"}}
    save(network(w_bit=2, a_bit=None), tmp_path / "m", metadata=metadata)
    stored = read_metadata(tmp_path / "m")
    assert stored["metadata"] == metadata
    assert (stored["kind"], stored["format_version"]) == ("deployment", 1)
    assert isinstance(stored["library_version"], str)
    assert stored["weights"]["5.weight"] == {
        "shape": (12, 2, 3, 3),
        "w_bit": 2,
        "dtype": "float32",
        "transposed_groups": 3,
        "learn_scale": False,
        "a_bit": None,
        "g_bit": 8,
    }
    assert list(stored["weights"]) == ["0.weight", "4.weight", "5.weight"]
    assert load(network(quantized=False), tmp_path / "m") == stored


@pytest.mark.parametrize(
    "metadata", [{"a": (1, 2)}, {1: 2}, {"a": math.nan}, {"a": torch.zeros(1)}, [1], {"a": {1}}], ids=str
)
def test_metadata_that_json_does_not_keep_is_refused(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(TypeError, match="metadata must be a dict that JSON"):
        save(nn.ReLU(), tmp_path / "m", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


# -- what does not fit ------------------------------------------------------------------------------------------------


def untouched(model: nn.Module, path: Path, message: str, bits_of: Bits, **options: Any) -> None:
    """Assert that the file is refused with this message and the model stays as it is, to the bit."""
    train(model, 1) if any(isinstance(p, PackedParameter) for p in model.parameters()) else None
    before, objects = bits_of(model), {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(model, path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(" The model is unchanged.")
    assert bits_of(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def _replace(index: int, layer: nn.Module) -> Callable[[nn.Sequential], None]:
    return lambda model: model.__setitem__(index, layer)


class OwnConvolution(nn.Conv2d):
    pass


NOT_FITTING = {
    "w_bit": (
        lambda m: quantize_(m, 2, 8, skip="7"),
        "0.weight is stored with w_bit=4, the model has w_bit=2; convert .* w_bit=4, or",
    ),
    "a_bit": (lambda m: quantize_(m, 4, skip="7"), "0.weight is stored with a_bit=8, the model has a_bit=None"),
    "missing": (lambda m: m.append(nn.Linear(2, 2)), "the file lacks 8.bias, 8.weight; build .* or pass strict=False"),
    "unexpected": (lambda m: m.pop(7), "the file has, where the model has not, 7.bias, 7.weight; build"),
    "both": (
        _replace(1, nn.ParameterDict({"a": nn.Parameter(torch.zeros(1))})),
        "lacks 1.a and has, .*, 1.bias, 1.num_batches_tracked, 1.running_mean, .*",
    ),
    "plain shape": (
        _replace(7, nn.Linear(216, 4)),
        r"7.\w+ is stored as float32 of shape .* the model wants float32 of",
    ),
    "plain dtype": (lambda m: m[1].register_buffer("running_var", torch.ones(8).long()), "wants int64 of shape"),
    "shape": (
        _replace(0, nn.Conv2d(3, 8, 1)),
        r"0.weight is stored with shape \(8, 3, 3, 3\), the model's has \(8, 3, 1, 1\)",
    ),
    "layer": (
        _replace(0, nn.Embedding(8, 3)),
        "0.weight is stored with 4 bits, .* cannot be converted: it is neither a conv",
    ),
    "own layer": (
        _replace(0, OwnConvolution(3, 8, 3)),
        "cannot be converted: it is a subclass of Conv2d with its own code",
    ),
    "groups": (
        _replace(5, nn.ConvTranspose2d(12, 2, 3, groups=1)),
        "5.weight is stored with the layout of a transposed convolution of groups=3, the model's is of a .* groups=1",
    ),
    "transposed": (_replace(5, nn.Conv2d(2, 12, 3)), "the model's is of a layer that is not transposed"),
    "meta": (lambda m: m.to("meta"), "is on the meta device, without memory; call model.to_empty"),
    "lazy": (_replace(7, nn.LazyLinear(5)), "7.weight has no shape yet; run one batch"),
    "lazy layer": (_replace(0, nn.LazyConv2d(8, 3)), "it is lazy and has no weight yet"),
}


@pytest.mark.parametrize(("change", "message"), NOT_FITTING.values(), ids=NOT_FITTING)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, network: Network, bits_of: Bits, change: Callable[[Any], Any], message: str
) -> None:
    save(network(), tmp_path / "m")
    model = network(seed=1, quantized=False)
    change(model)
    if model[0].weight.is_meta or any(nn.parameter.is_lazy(p) for p in model.parameters()):
        with pytest.raises(CheckpointError, match=message):
            load(model, tmp_path / "m")
        assert type(model[4]) is nn.Conv2d
    else:
        untouched(model, tmp_path / "m", message, bits_of)


def test_a_float_file_is_refused_by_a_packed_model(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    save(network(quantized=False), tmp_path / "m")
    message = r"0.weight is stored as float32 of shape \(8, 3, 3, 3\), the model's has 4 bits"
    untouched(network(a_bit=None), tmp_path / "m", message, bits_of)


def test_a_training_checkpoint_is_refused(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    bitorch_engine.checkpoint.save_training(tmp_path / "m", network())
    untouched(network(seed=1), tmp_path / "m", "a training checkpoint, wanted a deployment one; read it with", bits_of)


def test_strict_false_loads_what_both_have(tmp_path: Path, network: Network) -> None:
    model, other = network(), network(seed=1)
    other[7] = nn.Linear(216, 3)
    other.append(nn.Linear(3, 2))
    save(model[:6], tmp_path / "m")
    head = other[7].weight.clone()
    load(other, tmp_path / "m", strict=False)
    assert torch.equal(outputs(other[:6]), outputs(model[:6]))
    assert torch.equal(other[7].weight, head)


@pytest.mark.parametrize("folded", ["file", "model"])
def test_strict_false_warns_where_a_batch_norm_is_folded_on_one_side_only(
    tmp_path: Path, network: Network, folded: str
) -> None:
    model, other = network().eval(), network(seed=1).eval()
    report = fuse_batch_norm_(model if folded == "file" else other)
    assert [entry.name for entry in report.fused] == ["1"]
    save(model, tmp_path / "m")
    with pytest.warns(UserWarning, match="1.running_var: .*fold the model with fuse_batch_norm_ if") as caught:
        load(other, tmp_path / "m", strict=False)
    assert caught[0].filename == __file__
    if folded == "file":
        fuse_batch_norm_(other)
        load(other, tmp_path / "m", strict=False)
        assert torch.equal(outputs(other), outputs(model))


def test_a_model_that_nans_have_reached_can_be_replaced(tmp_path: Path, network: Network) -> None:
    model, broken = network(), network(seed=1, quantized=False)
    with torch.no_grad():
        broken[0].weight.fill_(math.nan)
    save(model, tmp_path / "m")
    load(broken, tmp_path / "m")
    assert torch.equal(outputs(broken), outputs(model))


class Refusing(nn.Linear):
    """A module whose own code fails while it is loaded."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        raise RuntimeError("not today")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_module_that_fails_half_way_leaves_no_half(
    tmp_path: Path, network: Network, bits_of: Bits, quantized: bool
) -> None:
    save(network(), tmp_path / "m")
    model = network(seed=1, quantized=quantized)
    model[7] = Refusing(216, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    untouched(
        model, tmp_path / "m", r"the model does not take it \(RuntimeError: not today\); build the model", bits_of
    )
    optimizer.zero_grad()
    model[7] = nn.Linear(216, 5)
    load(model, tmp_path / "m")


def test_an_optimizer_of_the_float_model_is_told_that_its_weights_are_others(tmp_path: Path, network: Network) -> None:
    save(network(), tmp_path / "m")
    model = network(seed=1, quantized=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load(model, tmp_path / "m")
    with pytest.raises(RuntimeError, match="make the optimizer after quantize_ or load"):
        optimizer.step()


@given(data=st.data())
def test_a_damaged_file_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m"
    model = nBitConv2d(2, 3, 3, w_bit=3)
    save(model, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(whole)[: data.draw(st.integers(0, len(whole)))]
    if damaged == path.read_bytes():
        return
    path.write_bytes(damaged)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_saving_replaces_a_file_in_one_step(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) & 0o400
    train(model)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save(model, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_of_a_model_leave_no_trace_in_the_names(wrap: Callable[..., Any], tmp_path: Path) -> None:
    model, other = (nn.Sequential(nBitConv2d(3, 4, 3, a_bit=8), nn.ReLU()) for _ in range(2))
    expected = outputs(model)
    save(model, tmp_path / "plain")
    save(wrap(model), tmp_path / "wrapped")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "wrapped").read_bytes()
    load(wrap(other), tmp_path / "wrapped")
    assert torch.equal(outputs(other), expected)
    bitorch_engine.save_training(tmp_path / "training", wrap(model), optimizer := torch.optim.SGD(model.parameters()))
    bitorch_engine.load_training(tmp_path / "training", model, optimizer)


@pytest.mark.parametrize("write", [safetensors.torch.save_file, lambda state, path: safetensors.torch.save(state)])
def test_safetensors_own_writers_name_ours(tmp_path: Path, write: Callable[[Any, Path], Any]) -> None:
    with pytest.raises(TypeError, match=r"call bitorch_engine.save\(model, path\)"):
        write(nBitConv2d(3, 4, 3).state_dict(), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
