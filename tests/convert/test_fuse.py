"""fuse_batch_norm_: the same outputs with fewer layers, the same codes, and no pair that is not certain."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitorch_engine as be
from bitorch_engine.convert import FusionReport

CONVOLUTIONS = [
    (nn.Conv1d, nn.BatchNorm1d, (2, 6, 9)),
    (nn.Conv2d, nn.BatchNorm2d, (3, 6, 7, 5)),
    (nn.Conv3d, nn.BatchNorm3d, (1, 6, 3, 5, 4)),
    (nn.ConvTranspose1d, nn.BatchNorm1d, (2, 6, 9)),
    (nn.ConvTranspose2d, nn.BatchNorm2d, (3, 6, 7, 5)),
    (nn.ConvTranspose3d, nn.BatchNorm3d, (1, 6, 3, 5, 4)),
]


def randomize_(model):
    """Statistics and weights as after some training: some gammas negative, and of each BatchNorm one exactly 0."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if norm.running_mean is not None:
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.2, 3)
                if norm.affine:
                    norm.weight.uniform_(-1.5, 1.5)[0] = 0
                    norm.bias.normal_()
    return model.eval()


def assert_folded(model, x, expected_norms, tolerance=1e-5):
    """Fold a copy: the outputs must be those of the model, but for rounding, and the codes those that it has."""
    model(x)  # sets the scales of the activations
    folded = copy.deepcopy(model)
    report = be.fuse_batch_norm_(folded)
    assert [entry.name for entry in report.fused] == expected_norms
    want, got = model(x), folded(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    before, after = dict(model.named_parameters()), dict(folded.named_parameters())
    for name, weight in before.items():
        if isinstance(weight, be.nBitConvParameter | be.nBitLinearParameter | be.BinaryConvParameter):
            assert torch.equal(after[name].packed, weight.packed), name
    return folded, report


@pytest.mark.parametrize(("kind", "norm", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("w_bit", "a_bit"), [(None, None), (1, 1), (2, None), (3, 8), (8, 4)])
def test_a_convolution_takes_its_batch_norm(kind, norm, shape, groups, w_bit, a_bit):
    net = nn.Sequential(kind(6, 10, 3, stride=2, padding=1, groups=groups, bias=groups == 2), norm(10))
    if w_bit is not None:
        be.quantize_(net, w_bit, a_bit)
    with torch.no_grad():
        folded, _ = assert_folded(randomize_(net), torch.randn(shape), ["1"])
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("w_bit", range(1, 9))
@pytest.mark.parametrize("a_bit", [None, 1, 2, 8])
def test_every_width_folds_in_convolutions_and_linear_layers(w_bit, a_bit):
    net = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=24),
        nn.BatchNorm2d(24, affine=False),
        nn.Flatten(),
        nn.Linear(24 * 15, 40, bias=False),
        nn.BatchNorm1d(40),
    )
    be.quantize_(net, w_bit, a_bit)
    for batch in (1, 11):  # a linear layer's few rows have a kernel of their own
        with torch.no_grad():
            # Where an input is quantized, one that lies between two codes may be rounded to the other one.
            tolerance = 1e-5 if a_bit is None else 0.05
            assert_folded(randomize_(net), torch.randn(batch, 16, 5, 7), ["1", "4", "7"], tolerance)


def test_the_folded_weight_is_the_old_one_times_the_factor_and_the_bias_is_the_shift():
    net = randomize_(nn.Sequential(be.nBitConv2d(3, 5, 3, w_bit=2), nn.BatchNorm2d(5, eps=0.1)))
    conv, norm = net
    old, bias = conv.weight.dequantize().double(), conv.bias.double()
    factor = norm.weight.double() / (norm.running_var.double() + 0.1).sqrt()
    shift = norm.bias.double() + (bias - norm.running_mean.double()) * factor
    be.fuse_batch_norm_(net)
    assert net[0] is conv
    torch.testing.assert_close(conv.weight.dequantize().double(), old * factor.view(-1, 1, 1, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(conv.bias.double(), shift, rtol=1e-6, atol=1e-6)
    assert (conv.weight.channel_scale < 0).any() and conv.weight.channel_scale[0] == 0


@pytest.mark.parametrize("x", [torch.randn(4, 6), torch.randn(1, 6)])
def test_a_linear_layer_of_any_kind_folds_for_rows(x):
    for linear in (nn.Linear(6, 7), be.nBitLinear(6, 7, bias=False), be.BinaryLinear(6, 7), be.nBitLinearBase(6, 7)):
        with torch.no_grad():
            folded, _ = assert_folded(randomize_(nn.Sequential(linear, nn.BatchNorm1d(7))), x, ["1"])
    # (N, 7, 7): BatchNorm1d would have normalized dimension 1, which is not the layer's channels.
    with pytest.raises(AssertionError, match="for inputs of 2 dimensions.*pairs="):
        folded(torch.randn(2, 7, 6))
    assert be.fuse_batch_norm_(folded) == FusionReport([])


class Block(nn.Module):
    """A residual block; the shortcut is a convolution of its own, or the input."""

    def __init__(self, channels=8, *, project=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if project:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Preactivation(Block):
    """Here norm2 gets a sum, and what norm1 gets is used for the sum, too."""

    def forward(self, x):
        x = self.conv1(x)
        return self.norm2(self.conv2(F.relu(self.norm1(x))) + x)


def test_a_residual_network_folds_whole_and_keeps_its_names():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(project=False), nn.Flatten()
    )
    be.quantize_(net, 4, skip="0")
    norms = ["1", "3.norm1", "3.norm2", "3.shortcut.1", "4.norm1", "4.norm2"]
    with torch.no_grad():
        folded, report = assert_folded(randomize_(net), torch.randn(2, 3, 9, 8), norms)
    assert type(folded[3].norm1) is nn.Identity and not folded[3].norm1.training
    assert str(report).splitlines() == [
        "1             BatchNorm2d  into 0",
        "3.norm1       BatchNorm2d  into 3.conv1",
        "3.norm2       BatchNorm2d  into 3.conv2",
        "3.shortcut.1  BatchNorm2d  into 3.shortcut.0",
        "4.norm1       BatchNorm2d  into 4.conv1",
        "4.norm2       BatchNorm2d  into 4.conv2",
        "6 folded, 0 kept",
    ]


def assert_kept(net, x, reasons):
    """All stays as it is, for these reasons."""
    randomize_(net)
    want, state = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    report = be.fuse_batch_norm_(net)
    assert {entry.name: entry.kept for entry in report.norms} == reasons
    assert torch.equal(net(x), want)
    assert net.state_dict().keys() == state.keys()
    return report


@torch.no_grad()
def test_a_layer_whose_output_is_used_twice_is_not_folded():
    net = Preactivation()
    be.quantize_(net, 3, overrides={"conv1": {"w_bit": 8}})
    reasons = {
        "norm1": "the output of conv1 is used elsewhere too",
        "norm2": "does not directly follow a convolution or linear layer",
        "shortcut.1": "is not called by itself",
    }
    report = assert_kept(net, torch.randn(1, 8, 5, 5), reasons)
    assert str(report).splitlines()[0] == "norm1       BatchNorm2d  kept: the output of conv1 is used elsewhere too"
    assert (len(report.fused), len(report.kept)) == (0, 3)


class Twice(nn.Module):
    def __init__(self, *, layer):
        super().__init__()
        self.conv, self.other = be.nBitConv2d(4, 4, 1), be.nBitConv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.layer = layer

    def forward(self, x):
        if self.layer:
            return self.norm2(self.conv(F.relu(self.norm1(self.conv(x)))))
        return self.norm1(self.other(self.norm1(self.conv(x))))


class Reads(Twice):
    def forward(self, x):
        return self.norm1(self.conv(x)) + self.conv.weight.sum()


@torch.no_grad()
def test_modules_that_are_called_twice_or_read_elsewhere_are_not_folded():
    x = torch.randn(2, 4, 3, 3)
    assert_kept(Twice(layer=True), x, dict.fromkeys(["norm1", "norm2"], "conv is called 2 times"))
    reasons = {"norm1": "is called 2 times", "norm2": "is not called by itself"}
    assert_kept(Twice(layer=False), x, reasons)
    reasons = {"norm1": "tensors of conv are used elsewhere too", "norm2": "is not called by itself"}
    assert_kept(Reads(layer=False), x, reasons)


@torch.no_grad()
def test_what_cannot_be_folded_stays_and_the_report_says_why():
    x = torch.randn(2, 4, 3, 3)
    conv = be.nBitConv2d(4, 4, 1)
    assert_kept(
        nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False)),
        x,
        {"1": "it has no running statistics (track_running_stats=False)"},
    )
    assert_kept(nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(4)), x, {
        "2": "does not directly follow a convolution or linear layer"
    })  # fmt: skip
    tied = nn.Sequential(conv, nn.BatchNorm2d(4), be.nBitConv2d(4, 4, 1))
    tied[2].weight = conv.weight
    assert_kept(tied, x, {"1": "the layer before it shares its weight"})
    hooked = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    assert_kept(hooked, x, {"1": "it or the layer before it has forward hooks"})
    spectral = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    hooks = "it or the layer before it has forward hooks"
    assert_kept(spectral, x, {"1": hooks})
    square = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm2d(4))
    assert_kept(square, x, {"1": "it does not take the 4 channels that the Linear gives"})


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class DoubledLowBit(be.nBitConv2d):
    def forward(self, input):
        return 2 * super().forward(input)


@torch.no_grad()
def test_layers_with_code_of_their_own_are_not_folded():
    x = torch.randn(2, 4, 3, 3)
    follows = "does not directly follow a convolution or linear layer"
    assert_kept(nn.Sequential(Doubled(4, 4, 1), nn.BatchNorm2d(4)), x, {"1": follows})
    own = "DoubledLowBit or BatchNorm2d is a subclass with its own code"
    assert_kept(nn.Sequential(DoubledLowBit(4, 4, 1), nn.BatchNorm2d(4)), x, {"1": own})


class Untraceable(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_pairs_that_are_named_are_folded_where_the_model_cannot_be_traced():
    net = Untraceable()
    be.quantize_(net, 2, 8)
    randomize_(net)
    x = torch.randn(2, 8, 5, 6)
    want = net(x)
    with pytest.raises(ValueError, match=r"torch.fx cannot trace the model \(TraceError.*pairs=\[\('conv1', 'bn1'\)"):
        be.fuse_batch_norm_(net)
    report = be.fuse_batch_norm_(net, pairs=[("conv1", "norm1"), ("shortcut.0", "shortcut.1")])
    assert [(entry.name, entry.layer) for entry in report.fused] == [("norm1", "conv1"), ("shortcut.1", "shortcut.0")]
    assert [(entry.name, entry.kept) for entry in report.kept] == [("norm2", "is not among the pairs")]
    with torch.no_grad():
        assert (net(x) - want).abs().max() <= 0.05 * want.abs().max()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("conv1", "norm1"), "list of pairs of names.*'conv1' is no pair"),
        ([("conv1", "norm9")], "'norm9' is no module of the model"),
        ([("conv1", "conv2")], "a Conv2d is no BatchNorm"),
        ([("norm1", "norm2")], "a BatchNorm2d is neither a convolution nor a linear layer"),
        ([("conv1", "norm1"), ("conv1", "norm2")], "names what another pair has"),
        ([("conv1", "norm1"), ("conv2", "norm1")], "names what another pair has"),
    ],
)
def test_wrong_pairs_are_refused_and_nothing_is_changed(pairs, message):
    net = Block().eval()
    with pytest.raises(ValueError, match=message):
        be.fuse_batch_norm_(net, pairs=pairs)
    assert type(net.norm1) is nn.BatchNorm2d and net.conv1.bias is None


def test_a_model_in_training_mode_or_with_broken_statistics_is_refused_and_unchanged():
    net = Block()
    with pytest.raises(ValueError, match=r"'the model' is in training mode.*call model.eval\(\) first"):
        be.fuse_batch_norm_(net)
    net.eval().norm2.train()
    with pytest.raises(ValueError, match="'norm2' is in training mode"):
        be.fuse_batch_norm_(net)
    net.eval().norm2.running_var[3] = torch.nan
    with pytest.raises(ValueError, match="'norm2' has statistics or weights that are not finite"):
        be.fuse_batch_norm_(net)
    assert type(net.norm1) is nn.BatchNorm2d and net.conv1.bias is None


@torch.no_grad()
def test_a_module_with_two_names_is_replaced_under_both():
    net = nn.Sequential(be.nBitConv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity())
    net.add_module("alias", net[1])
    net.forward = lambda x: net[1](net[0](x))
    randomize_(net)
    x = torch.randn(2, 4, 3, 3)
    want = net(x)
    be.fuse_batch_norm_(net, pairs=[("0", "alias")])
    assert net[1] is net.alias and type(net[1]) is nn.Identity
    torch.testing.assert_close(net(x), want)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), be.nBitConv2d(6, 4, 3), nn.BatchNorm2d(4))
    net.to(dtype)
    folded, _ = assert_folded(randomize_(net), torch.randn(2, 4, 9, 7, dtype=dtype), ["1", "3"], 0.05)
    assert {value.dtype for value in folded.state_dict().values()} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_a_stored_folded_model_loads_into_one_that_is_folded(tmp_path, quantized):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(), nn.ConvTranspose2d(8, 4, 2))

    net, x = make(), torch.randn(2, 3, 7, 8)
    be.quantize_(net, 3, 8, overrides={"0": {"a_bit": None}})
    randomize_(net)(x)
    be.fuse_batch_norm_(net)
    be.save(net, tmp_path / "model.safetensors")
    fresh = make()
    if quantized:
        be.quantize_(fresh, 3, 8, overrides={"0": {"a_bit": None}})
    with pytest.raises(
        ValueError, match="build the model as it was saved, with fuse_batch_norm_ if it was called then"
    ):
        be.load(fresh, tmp_path / "model.safetensors")
    be.fuse_batch_norm_(fresh.eval())
    be.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(x), net(x))
    assert (net[3].conv1.weight.channel_scale < 0).any()
    for name, value in net.state_dict().items():
        if hasattr(value, "packed"):
            assert torch.equal(fresh.state_dict()[name].packed, value.packed)


@torch.no_grad()
def test_a_folded_model_is_copied_and_pickled():
    net, x = Block(), torch.randn(2, 8, 5, 5)
    be.quantize_(net, 1, 1)
    randomize_(net)(x)
    be.fuse_batch_norm_(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), net(x))


@torch.no_grad()
def test_what_inference_kept_of_the_weight_before_is_not_used_any_more():
    net, x = nn.Sequential(be.BinaryConv2d(32, 8, 3), nn.BatchNorm2d(8)), torch.randn(1, 32, 6, 6)
    randomize_(net)
    for _ in range(3):
        want = net(x)
    be.fuse_batch_norm_(net)
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
