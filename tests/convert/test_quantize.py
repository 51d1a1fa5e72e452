"""quantize_: what is converted, what is kept, what the report says."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bitorch_engine as be
from bitorch_engine.convert import convert_layer_


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.ConvTranspose2d(8, 4, 2, stride=2)),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 5),
    )


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Conv1d, (2, 4, 9)),
        (nn.Conv2d, (2, 4, 7, 5)),
        (nn.Conv3d, (2, 4, 5, 4, 3)),
        (nn.ConvTranspose1d, (2, 4, 9)),
        (nn.ConvTranspose2d, (2, 4, 7, 5)),
        (nn.ConvTranspose3d, (2, 4, 5, 4, 3)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_eight_bits_change_the_output_by_less_than_a_percent_and_the_root_itself_is_converted(kind, shape, groups):
    layer, x = kind(4, 6, 3, stride=2, padding=1, groups=groups), torch.randn(shape)
    before = layer(x)
    report = be.quantize_(layer, 8)
    assert type(layer).__name__ == "nBit" + kind.__name__
    assert [entry.name for entry in report.converted] == [""]
    assert isinstance(layer.weight, be.nBitConvParameter)
    assert (layer(x) - before).square().mean() < 1e-4 * before.square().mean()


def test_layers_are_converted_in_place_and_all_else_is_untouched():
    net = make_net()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    objects, linear = list(net.modules()), net[4].weight
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append("hook"))
    report = be.quantize_(net, 4, 8, 8, skip="4")
    assert list(net.modules())[: len(objects)] != [] and all(module in list(net.modules()) for module in objects)
    assert [entry.name for entry in report.converted] == ["0", "2.1", "2.2"]
    assert {entry.name: entry.skipped for entry in report.skipped} == {"4": "as asked"}
    assert net[4].weight is linear
    for name, value in net.state_dict().items():
        if name in kept and not name.endswith("weight"):
            assert torch.equal(value, kept[name]), name
    assert torch.equal(net[1].weight, kept["1.weight"])
    error = (net[0].weight.dequantize() - kept["0.weight"]).abs().max()
    assert error < net[0].weight.scale.max() * 2
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    assert seen == ["hook"] and net[0].weight.grad is not None and net[0].bias.grad is not None


def test_report_counts_real_bytes_and_prints_a_table():
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Embedding(4, 4))
    report = be.quantize_(net, 3)
    weights = 64 * 64 * 9
    assert report.bytes_before == 4 * (weights + 16)
    assert report.layers[0].bytes_after == weights * 3 // 8 + 4 * 64
    text = str(report)
    assert "skipped: is neither a convolution nor a linear layer" in text and "1 converted, 1 skipped" in text
    assert len({len(line.split("  ")) > 1 for line in text.splitlines()}) == 1


def test_overrides_and_skip_take_names_and_patterns():
    net = make_net()
    report = be.quantize_(
        net, 4, a_bit=4, overrides={"0": {"w_bit": 8, "a_bit": None}, "2.*": {"w_bit": 2}}, skip="2.2"
    )
    assert (net[0].w_bit, net[0].a_bit) == (8, None)
    assert (net[2][1].w_bit, net[2][1].a_bit) == (2, 4)
    assert type(net[2][2]) is nn.ConvTranspose2d
    assert {entry.name: entry.skipped for entry in report.skipped}["2.2"] == "as asked"
    again = make_net()
    be.quantize_(again, skip=["2"])  # a module that holds convolutions
    assert type(again[2][1]) is nn.Conv2d and isinstance(again[0], be.nBitConv2d)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w_bit": 9}, "bits must be 1 to 8, got 9"),
        ({"g_bit": 1}, "a gradient needs a zero"),
        ({"skip": "layer9.*"}, "'layer9.*' matches no layer"),
        ({"overrides": {"1": {"w_bit": 3}}}, "'1' matches no layer; to convert there are '0', '2.1', '2.2', '4'"),
        ({"overrides": {"0": {"bits": 3}}}, "overrides may set w_bit, a_bit, g_bit, learn_scale, got bits"),
        ({"overrides": {"0": {"w_bit": 0}}}, "bits must be 1 to 8, got 0"),
    ],
)
def test_bad_settings_raise_and_leave_the_model_as_it_was(arguments, message):
    net = make_net()
    with pytest.raises(ValueError, match=message):
        be.quantize_(net, **arguments)
    assert not any(isinstance(module, be.nBitConv2d) for module in net.modules())


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_converted():
    net = make_net()
    with torch.no_grad():
        net[2][1].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'2\.1' has NaN or Inf"):
        be.quantize_(net)
    assert type(net[0]) is nn.Conv2d


def test_shared_modules_and_shared_weights_stay_shared():
    conv = nn.Conv2d(4, 4, 3)
    other = nn.Conv2d(4, 4, 3)
    other.weight = conv.weight
    net = nn.ModuleDict({"a": conv, "b": conv, "c": other})
    report = be.quantize_(net)
    assert net["a"] is net["b"] and net["a"].weight is net["c"].weight
    assert [entry.name for entry in report.converted] == ["a", "c"]
    assert len(list(net.parameters())) == 3  # one weight, two biases


def test_what_cannot_be_converted_is_skipped_with_the_reason():
    class OwnConv(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(
        {
            "own": OwnConv(2, 2, 1),
            "lazy": nn.LazyConv2d(2, 1),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
            "done": be.nBitConv2d(2, 2, 1),
            "table": nn.Embedding(3, 3),
            "assigned": nn.Conv2d(2, 2, 1),
        }
    )
    net["assigned"].forward = functools.partial(checkpoint, net["assigned"].forward, use_reentrant=False)
    reasons = {entry.name: entry.skipped for entry in be.quantize_(net).layers}
    assert reasons["own"] == "is a subclass of Conv2d with its own code"
    assert reasons["lazy"].startswith("is lazy")
    assert reasons["normed"].startswith("is parametrized")
    assert reasons["done"] == "is low-bit already, and keeps its 4 bits"
    assert reasons["assigned"].startswith("has a forward of its own, assigned to it")
    assert reasons["table"] == "is neither a convolution nor a linear layer"


def test_training_mode_device_and_requires_grad_are_kept():
    layer = nn.Conv2d(2, 2, 3, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    be.quantize_(layer, 2, a_bit=2)
    assert not layer.training and not layer.weight.requires_grad and layer.weight.dtype == torch.bfloat16
    assert layer.activation.training is False


def test_convert_layer_refuses_what_has_no_low_bit_layer():
    with pytest.raises(TypeError, match="Embedding cannot be converted: it is neither a convolution nor"):
        convert_layer_(nn.Embedding(2, 2))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, be.optim.DiodeMix])
def test_an_optimizer_made_before_is_told_of_it(kind):
    net = make_net()
    old, optimizer = net[0].weight, kind(net.parameters(), lr=0.1)
    kept = old.detach().clone()
    be.quantize_(net)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    for use in (optimizer.step, optimizer.zero_grad):
        with pytest.raises(RuntimeError, match="make the optimizer after quantize_ or load"):
            use()
    assert torch.equal(old, kept)
    assert type(old + 1) is torch.Tensor
    kind(net.parameters(), lr=0.1).step()


def test_who_asks_whether_a_converted_weight_has_a_gradient_is_told_that_it_has_none():
    layer = nn.Linear(4, 6)
    old = layer.weight
    be.quantize_(layer)
    assert not hasattr(old, "grad") and getattr(old, "grad", None) is None
    with pytest.raises(RuntimeError, match="was converted"):
        old.grad = None
    assert old.shape == (6, 4) and not old.is_sparse


def test_a_weight_that_stays_float_stays_with_its_optimizer():
    net = make_net()
    optimizer = torch.optim.SGD([net[4].weight, net[0].bias], lr=0.1)
    be.quantize_(net, skip="4")
    before = net[4].weight.detach().clone()
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[4].weight, before)


def test_a_deep_copy_is_independent():
    import copy

    net = make_net()
    be.quantize_(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert net[0].weight.codes.abs().sum() > 0


def test_the_error_of_each_width_is_near_the_best_for_normal_weights():
    """Mean squared errors of the optimal uniform quantizers of a unit normal variable (Max 1960, table II)."""
    optimal = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}
    weight = torch.randn(16, 400, 3, 3)
    for bits, best in optimal.items():
        layer = nn.Conv2d(400, 16, 3)
        layer.weight = nn.Parameter(weight.clone())
        be.quantize_(layer, bits)
        error = (layer.weight.dequantize() - weight).square().mean()
        # Codes such as -2 .. 1 are not symmetric as the table is, which costs the more the fewer they are.
        assert error < best * (1.25 if bits in (2, 3) else 1.05)


# -- linear layers ----------------------------------------------------------------------------------------------------


def test_linear_layers_are_converted_the_classifier_too_and_keep_what_they_compute():
    net, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), torch.randn(3, 4, 20)
    before = net(x)
    report = be.quantize_(net, 8)
    assert [(entry.name, entry.w_bit) for entry in report.converted] == [("0", 8), ("2", 8)]
    assert type(net[0]) is be.nBitLinear and type(net[2].weight) is be.nBitLinearParameter
    assert (net(x) - before).square().mean() < 1e-4 * before.square().mean()


def test_a_second_call_keeps_bits_and_says_so():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    be.quantize_(net, 3, 5, skip="1")
    weight, codes = net[0].weight, net[0].weight.codes
    report = be.quantize_(net, 8)
    assert net[0].weight is weight and torch.equal(weight.codes, codes)
    first, second = report.layers
    assert first.skipped == "is low-bit already, and keeps its 3 bits" and second.skipped is None
    assert (first.w_bit, first.a_bit, second.w_bit) == (3, 5, 8)
    assert first.bytes_after == first.bytes_before == 4 * 4 * 3 // 8 + 4 * 4


def test_a_weight_tied_to_an_embedding_stays_float_and_tied():
    net = nn.ModuleDict({"emb": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    net["head"].weight = net["emb"].weight
    reasons = {entry.name: entry.skipped for entry in be.quantize_(net).layers}
    assert reasons["head"] == "shares its weight with emb.weight, which stays as it is" and reasons["body"] is None
    assert net["head"].weight is net["emb"].weight


def test_a_weight_that_a_skipped_layer_shares_stays_shared():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert not be.quantize_(net, skip="1").converted
    assert net[1].weight is net[0].weight
    assert len(be.quantize_(net).converted) == 2
    assert net[1].weight is net[0].weight


def test_weight_norm_and_parametrizations_of_linear_layers_are_skipped():
    net = nn.ModuleDict(
        {
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
            "lazy": nn.LazyLinear(2),
        }
    )
    reasons = {entry.name: entry.skipped or "" for entry in be.quantize_(net).layers}
    assert reasons["normed"].startswith("is parametrized") and reasons["orthogonal"].startswith("is parametrized")
    assert reasons["lazy"].startswith("is lazy")


def test_attention_keeps_its_float_projections():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    report = be.quantize_(attention)
    assert [entry.name for entry in report.skipped] == ["", "out_proj"] and not report.converted
    assert all("attention code" in (entry.skipped or "") for entry in report.layers)
    assert report.bytes_before == 4 * (3 * 8 * 8 + 8 * 8)
    assert torch.equal(attention(x, x, x)[0], before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("a_bit", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_computes_in_evaluation_what_it_does_in_training(a_bit, padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 4, 8)
    mask = torch.tensor([[False] * 4, [False] * 2 + [True] * 2, [False] * 3 + [True]]) if padded else None
    report = be.quantize_(model, 4, a_bit)
    assert [entry.name.rpartition(".")[2] for entry in report.converted] == ["linear1", "linear2"] * 2
    trained = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(evaluated[kept], trained.detach()[kept])


@pytest.mark.parametrize(
    "part",
    [lambda w: w[:4], lambda w: w.data[:4], lambda w: w.dequantize()[:4]],
    ids=["indexed", "data", "dequantized"],
)
@pytest.mark.parametrize("make", [lambda: be.nBitConv2d(3, 8, 3, w_bit=3, a_bit=8), lambda: be.BinaryConv2d(3, 8, 3)])
def test_a_low_bit_layer_with_a_float_weight_shows_it_and_gets_its_bits_again(make, part):
    layer, x = make(), torch.randn(1, 3, 5, 5)
    layer(x)
    scale, w_bit = layer.activation.initial_scale.clone(), layer.w_bit
    layer.weight, layer.bias = nn.Parameter(part(layer.weight)), None
    values = layer.weight.detach().clone()
    assert "float weight" in repr(layer) and "w_bit" not in repr(layer)
    report = be.quantize_(layer, w_bit=2)
    assert [(entry.w_bit, entry.skipped) for entry in report.layers] == [(w_bit, None)]
    assert type(layer.weight) is layer.parameter_class and layer.w_bit == w_bit and f"w_bit={w_bit}" in repr(layer)
    expected = layer.parameter_class(values + 0, w_bit=w_bit)
    assert torch.equal(layer.weight.codes, expected.codes)
    assert layer.activation.initial_scale == scale and layer(x).shape == (1, 4, 3, 3)


def test_a_float_weight_is_converted_to_the_bits_of_the_packed_one_that_it_replaced():
    layer = be.nBitLinear(4, 6, w_bit=4)
    layer.weight = be.nBitLinearParameter(torch.randn(6, 4), w_bit=2)
    layer.weight = nn.Parameter(layer.weight.dequantize() * 1.5)
    assert layer.w_bit == 2
    be.quantize_(layer, w_bit=8)
    assert layer.w_bit == layer.weight.w_bit == 2 and set(layer.weight.codes.unique().tolist()) <= {-2, -1, 0, 1}
    layer.load_state_dict(
        {"weight": be.nBitLinearParameter(torch.randn(6, 4), w_bit=3), "bias": layer.bias}, assign=True
    )
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(torch.randn(6, 4)))
    be.quantize_(layer)
    assert layer.weight.w_bit == 3


def test_a_parametrized_low_bit_layer_is_converted_after_it():
    layer = be.nBitLinear(4, 6, w_bit=5)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert "is parametrized" in be.quantize_(layer).layers[0].skipped
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    be.quantize_(layer)
    assert type(layer.weight) is be.nBitLinearParameter and layer.w_bit == 5


def test_a_file_loads_into_a_low_bit_layer_with_a_float_weight(tmp_path):
    source, target = be.nBitLinear(4, 6, w_bit=3, a_bit=8), be.nBitLinear(4, 6, w_bit=4)
    source(x := torch.randn(2, 4))
    be.save(source, tmp_path / "file.safetensors")
    target.weight = nn.Parameter(target.weight.dequantize())
    be.load(target, tmp_path / "file.safetensors")
    assert torch.equal(source(x), target(x)) and target.w_bit == 3


def test_a_model_without_memory_is_converted_and_loads_what_a_real_one_holds():
    real = make_net()
    with torch.device("meta"):
        net = make_net()
    for model in (real, net):
        be.quantize_(model, w_bit=3)
    net.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(net.eval()(x), real.eval()(x))


def test_layers_are_made_and_converted_under_fake_tensors():
    with FakeTensorMode():
        made, converted = be.nBitConv2d(3, 8, 3, a_bit=8), nn.Conv2d(3, 8, 3)
        be.quantize_(converted, a_bit=8)
        for layer in (made, converted):
            assert layer(torch.randn(2, 3, 6, 6)).shape == (2, 8, 4, 4)
