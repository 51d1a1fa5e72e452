import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bitorch_engine.quantizers.saved_tensors import SavedBytes, compress_saved_tensors


class Save(torch.autograd.Function):
    """Saves a tensor and computes nothing."""

    @staticmethod
    def forward(ctx, weight, tensor):
        ctx.save_for_backward(tensor)
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def saved_and_loaded(tensor: Tensor, bits: int = 8, **settings) -> tuple[Tensor, SavedBytes]:
    """What backward sees of a tensor, and the count of its bytes."""
    with compress_saved_tensors(bits, **settings) as saved:
        out = Save.apply(torch.ones((), requires_grad=True), tensor)
    return out.grad_fn.saved_tensors[0], saved


def gradients(model: nn.Module, *inputs: Tensor, **settings) -> tuple[list[Tensor], SavedBytes | None]:
    """Gradients of the sum of squares of the model's output, with compression where there are settings for it."""
    model.zero_grad()
    if settings:
        with compress_saved_tensors(**settings) as saved:
            loss = model(*inputs).square().sum()
    else:
        saved, loss = None, model(*inputs).square().sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], saved


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 36, 10),
    )


# Values --------------------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": _channels_last,
    "transposed": lambda x: x.transpose(0, -1),
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: x[x.shape[0] // 2 :],
}


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda s: torch.Size(s).numel() < 20000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.integers(1, 8),
    group_size=st.sampled_from([8, 31, 256]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    values=st.sampled_from(["signed", "relu", "positive", "offset", "constant", "zero", "mostly zero"]),
    seed=st.integers(0, 99),
)
def test_what_backward_sees_is_within_a_step_in_the_same_strides(shape, dtype, bits, group_size, layout, values, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape)
    x = {
        "signed": x,
        "relu": x.relu(),
        "positive": x.abs() + 0.01,
        "offset": x + 100,
        "constant": torch.full_like(x, 0.1),
        "zero": torch.zeros_like(x),
        "mostly zero": (x - 2).relu(),
    }[values]
    x = LAYOUTS[layout](x.to(dtype))
    loaded, saved = saved_and_loaded(x, bits, group_size=group_size, min_numel=0)
    assert loaded.shape == x.shape and loaded.stride() == x.stride() and loaded.dtype == dtype
    assert saved.saved_bytes <= saved.original_bytes
    x, loaded = x.float(), loaded.float()
    signed = bool(x.min() < 0)  # a few random numbers may all be positive
    if not signed:
        assert torch.equal(loaded > 0, x > 0) and torch.equal(loaded == 0, x == 0)
    step = 1.01 * float(x.max() - x.min()) / (2**bits - 1)
    bound = step / 2 if signed else step
    assert float((loaded - x).abs().max()) <= bound + float(x.abs().max()) * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_signed_values_are_off_by_a_uniform_error_that_does_not_depend_on_them(bits):
    x = torch.rand(4, 1 << 16) - 0.5
    x[:, 0], x[:, 1] = -0.5, 0.5
    error = (saved_and_loaded(x, bits, group_size=1 << 16)[0] - x) * (2**bits - 1)  # in steps
    assert float(error.mean()) == pytest.approx(0, abs=0.003)
    assert float(error.var()) == pytest.approx(1 / 12, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([error.flatten(), x.flatten()]))[0, 1])) < 0.01


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("make", [torch.Tensor.relu, torch.sigmoid, torch.clone], ids=["relu", "sigmoid", "signed"])
def test_rounding_is_unbiased_for_every_value(bits, make):
    x = make(torch.randn(8, 300))
    runs = 150
    mean = torch.stack([saved_and_loaded(x, bits)[0] for _ in range(runs)]).mean(0)
    step = (x.amax() - x.amin()) / (2**bits - 1)
    error = (mean - x) / step
    # A single rounding is off by half a step of standard deviation at most.
    assert float(error.abs().max()) < 5 * 0.5 / runs**0.5
    assert float(error.mean()) == pytest.approx(0, abs=4 * 0.5 / (runs * x.numel()) ** 0.5)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_groups_of_equal_values_are_exact(bits):
    x = torch.randn(8, 3, 1, 1).expand(8, 3, 16, 16).contiguous()
    loaded, _ = saved_and_loaded(x, bits)
    assert torch.equal(loaded, x)


@pytest.mark.parametrize("size", [7, 16, 56])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_rounded_in_its_own_range(size, memory_format):
    scales = 10.0 ** torch.arange(-3, 3).view(1, -1, 1, 1)
    x = (torch.randn(2, 6, size, size) * scales).to(memory_format=memory_format)
    loaded, _ = saved_and_loaded(x, 8, min_numel=0)
    span = x.amax((2, 3)) - x.amin((2, 3))
    assert bool(((loaded - x).abs().amax((2, 3)) <= 1.01 * span / 255 / 2).all())


@pytest.mark.parametrize("magnitude", [1e-34, 1e-20, 1e20, 1e38])
def test_ranges_of_any_magnitude_are_kept(magnitude):
    x = torch.rand(2000) * magnitude
    loaded, saved = saved_and_loaded(x, 8)
    assert saved.saved_bytes < 0.3 * saved.original_bytes
    assert float(((loaded.double() - x.double()) / magnitude).abs().max()) < 0.01


def test_positive_values_stay_in_their_range():
    x = torch.randn(5000).exp()
    loaded, _ = saved_and_loaded(x, 2)
    assert float(loaded.min()) >= float(x.min()) and float(loaded.max()) <= 1.01 * float(x.max())


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_mean_gradient_is_the_exact_gradient(bits):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(3 * 36, 2))
    x = torch.randn(4, 2, 10, 10)
    exact, _ = gradients(model, x)
    runs = [gradients(model, x, bits=bits, min_numel=0)[0] for _ in range(100)]
    for index, true in enumerate(exact):
        samples = torch.stack([run[index] for run in runs])
        tolerance = 5 * samples.std(0) / 100**0.5 + 1e-5 * true.abs().max()
        assert bool(((samples.mean(0) - true).abs() <= tolerance).all())


def test_relu_passes_exactly_the_gradients_that_it_passes_without_compression():
    x = torch.randn(4, 8, 20, 20, requires_grad=True)
    weight = torch.randn(4, 8, 20, 20)
    with compress_saved_tensors(2) as saved:
        y = x.relu()
    (grad,) = torch.autograd.grad(y, x, weight)
    assert saved.saved_bytes < 0.1 * saved.original_bytes
    assert torch.equal(grad, weight * (x > 0))


@pytest.mark.parametrize(("bits", "error", "least_cosine"), [(8, 0.01, 0.999), (4, 0.1, 0.9)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_a_conv_net_are_close(bits, error, least_cosine, memory_format):
    model = conv_net().to(memory_format=memory_format)
    x = torch.randn(8, 3, 16, 16).to(memory_format=memory_format)
    exact, _ = gradients(model, x)
    rough, _ = gradients(model, x, bits=bits)
    assert min(cosine(a, b) for a, b in zip(exact, rough, strict=True)) > least_cosine
    exact, rough = (torch.cat([grad.flatten() for grad in grads]) for grads in (exact, rough))
    assert float((rough - exact).norm() / exact.norm()) < error


def test_more_bits_are_closer():
    model, x = conv_net(), torch.randn(8, 3, 16, 16)
    exact, _ = gradients(model, x)
    error = [
        sum(float((a - b).norm() / a.norm()) for a, b in zip(exact, gradients(model, x, bits=bits)[0], strict=True))
        for bits in (2, 4, 6, 8)
    ]
    assert error == sorted(error, reverse=True) and error[-1] < 0.05 * error[0]


def test_gradcheck_passes_as_double_is_left_alone():
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    with compress_saved_tensors(1, min_numel=0):
        assert torch.autograd.gradcheck(lambda t: (t.exp() * t).tanh(), x)


def test_backward_may_run_twice_and_inside_the_block():
    model, x = conv_net(), torch.randn(4, 3, 16, 16)
    with compress_saved_tensors(4):
        loss = model(x).square().sum()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_from_a_compressed_input(reentrant):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Tanh())
    x = torch.randn(64, 64, requires_grad=True)

    def grad(keep: list[Tensor]) -> Tensor:
        torch.manual_seed(1)
        x.grad = None
        hidden = x * 1
        with compress_saved_tensors(8, keep=[hidden, *keep]) if keep else compress_saved_tensors(8):
            loss = checkpoint(model, hidden, use_reentrant=reentrant).square().sum()
        loss.backward()
        return x.grad

    exact, rough = grad([x]), grad([])
    assert not torch.equal(exact, rough)  # it was compressed ...
    assert cosine(exact, rough) > 0.9999  # ... and the same units were dropped


def test_autocast_weights_keep_their_values():
    model = nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16), compress_saved_tensors(2, min_numel=0):
        y = model(torch.randn(128, 64).requires_grad_() * 1)
    loaded = y.grad_fn._saved_mat2
    assert torch.equal(loaded, model.weight.detach().bfloat16().t())


def test_half_precision_models_train():
    model = conv_net().bfloat16()
    x = torch.randn(8, 3, 16, 16, dtype=torch.bfloat16)
    exact, _ = gradients(model, x)
    rough, saved = gradients(model, x, bits=8)
    assert min(cosine(a.float(), b.float()) for a, b in zip(exact, rough, strict=True)) > 0.99
    assert saved.saved_bytes < 0.55 * saved.original_bytes


def test_compiled_model_is_compressed_too():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(256, 64)
    exact, _ = gradients(model, x)
    rough, saved = gradients(torch.compile(model, backend="aot_eager"), x, bits=8)
    assert saved.saved_bytes < 0.3 * saved.original_bytes
    assert all(cosine(a, b) > 0.999 for a, b in zip(exact, rough, strict=True))


# Integers ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    width=st.sampled_from([1, 2, 9, 256, 257, 30000, 1 << 20, 1 << 62]),
    low=st.sampled_from([0, -3, -(1 << 62), 1 << 61]),
    transposed=st.booleans(),
)
def test_integers_come_back_exactly(shape, dtype, width, low, transposed):
    limits = torch.iinfo(dtype)
    low = min(max(low, limits.min), limits.max - 1)
    index = torch.randint(low, min(low + width, limits.max), shape, dtype=torch.int64).to(dtype)
    index = index.transpose(0, -1) if transposed else index
    loaded, saved = saved_and_loaded(index, 2, min_numel=0)
    assert torch.equal(loaded, index) and loaded.stride() == index.stride() and loaded.dtype == dtype
    assert saved.saved_bytes <= saved.original_bytes


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_whose_distance_overflows_come_back_exactly(dtype):
    index = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype).repeat(1024)
    assert torch.equal(saved_and_loaded(index)[0], index)


@pytest.mark.parametrize(("kernel", "bits"), [(2, 2), (3, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_indices_of_max_pooling_take_as_many_bits_as_the_window_has_cells(kernel, bits, memory_format):
    x = torch.randn(8, 32, 24, 24, dtype=torch.double).to(memory_format=memory_format)
    x.requires_grad_()
    with compress_saved_tensors(2) as saved:
        y = F.max_pool2d(x, kernel, 2, kernel // 2)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, kernel, 2, kernel // 2).square().sum(), x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, expected)
    assert saved.original_bytes == y.numel() * 8
    assert saved.saved_bytes <= y.numel() * bits / 8 + y[0, 0].numel() * 2


# Memory --------------------------------------------------------------------------------------------------------------


def storage_bytes() -> int:
    """Bytes of all storages that a tensor in Python can be reached with."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("bits", "share"), [(8, 0.22), (4, 0.13), (2, 0.09)])
def test_the_storages_that_are_held_are_as_small_as_counted(bits, share):
    x = torch.randn(16, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(16, 8, 3))
    saved_and_loaded(torch.randn(2000))  # the table of noise is made once
    before = storage_bytes()
    with compress_saved_tensors(bits, keep=[x]) as saved:
        loss = model(x).square().sum()
    held = storage_bytes() - before
    assert saved.saved_bytes < share * saved.original_bytes
    assert abs(held - saved.saved_bytes) < 0.02 * saved.original_bytes
    assert loss.requires_grad


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "groups"), [(1024, 4), (264, 2), (256, 1), (64, 1)])
def test_bytes_of_a_dense_tensor_are_its_bits_and_ranges(bits, columns, groups):
    _, saved = saved_and_loaded(torch.randn(64, columns), bits)
    assert saved == SavedBytes(64 * columns * 4, 64 * columns * bits // 8 + 64 * groups * 6)


def test_a_tensor_that_several_nodes_save_is_compressed_once():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kernel = torch.randn(8, 8, 3, 3, requires_grad=True)
    with compress_saved_tensors(4) as one:
        y = x.relu()
    with compress_saved_tensors(4) as several:
        y = x.relu()
        loss = F.conv2d(y, kernel).sum() + F.max_pool2d(y, 1).sum() + (y * y).sum()
    indices = y.numel() * 8
    assert several.original_bytes == one.original_bytes + indices
    assert several.saved_bytes - one.saved_bytes < 0.05 * indices
    loss.backward()


def test_an_address_that_is_used_again_is_not_taken_for_the_tensor_before():
    weights = [torch.full((), float(i), requires_grad=True) for i in range(20)]
    with compress_saved_tensors(8) as saved:
        losses = [(w * torch.full((4096,), float(i))).sum() for i, w in enumerate(weights)]
    assert saved.original_bytes == 20 * 4096 * 4
    sum(losses).backward()
    assert [float(w.grad) for w in weights] == [4096.0 * i for i in range(20)]


def test_a_tensor_that_was_written_to_is_another_one():
    weight = torch.ones((), requires_grad=True)
    x = torch.ones(4096)
    with compress_saved_tensors(8) as saved:
        first = weight * x
        x.add_(1)
        second = weight * x
    assert saved.saved_bytes > 0 and second.grad_fn._saved_other.eq(2).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_views_of_one_storage_count_as_the_storage():
    weight = torch.ones((), requires_grad=True)
    x = torch.randn(64, 64)
    with compress_saved_tensors(8) as saved:
        products = [weight * x, weight * x.view(16, 256), weight * x[:32]]
    assert saved.original_bytes == 64 * 64 * 4
    assert len(products) == 3


class LargestTemporary(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns and that is not a view of ``source``."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.source, self.nbytes = source.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.source:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1 << 22,), (3, 8, 250, 250), (1, 1, 1 << 10, 1 << 10)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_temporaries_are_bounded(dtype, shape, memory_format):
    x = (torch.randn(shape) * 9).to(dtype)
    x = x.to(memory_format=memory_format) if x.dim() == 4 else x
    saved_and_loaded(torch.randn(2000))  # the table of noise is made once
    with compress_saved_tensors(4) as saved, LargestTemporary(x) as largest:
        out = Save.apply(torch.ones((), requires_grad=True), x)
    assert 0 < largest.nbytes <= 4 * 1.25 * (1 << 18) < x.nbytes
    assert saved.saved_bytes < 0.3 * x.nbytes and out.requires_grad


@pytest.mark.parametrize("min_numel", [0, 1 << 20])
def test_a_graph_that_is_dropped_frees_what_it_saved(min_numel):
    x = torch.randn(64, 64, requires_grad=True)
    with compress_saved_tensors(8, min_numel=min_numel):
        y = x.exp()
    storage = weakref.ref(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert storage() is None
    finally:
        gc.enable()


def test_the_original_is_freed_once_it_is_compressed():
    weight = torch.ones((), requires_grad=True)
    with compress_saved_tensors(8):
        x = torch.randn(4096)
        product = weight * x
        storage = weakref.ref(x.untyped_storage())
        del x
        assert storage() is None
    product.sum().backward()


# What is left alone --------------------------------------------------------------------------------------------------


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4096).double(),
        torch.randint(0, 255, (4096,), dtype=torch.uint8),
        torch.rand(4096) > 0.5,
        torch.randn(4096, dtype=torch.complex64),
        torch.randn(100),
        torch.empty(0),
        torch.randn(4096).index_fill(0, torch.tensor([7]), float("nan")),
        torch.randn(4096).relu().index_fill(0, torch.tensor([7]), float("inf")),
        torch.randn(4096) * 2e38,
        torch.randn(4096).clamp(-1, 1).half() * 65504,
        torch.randn(2048).unfold(0, 16, 1),
    ],
    ids=["double", "uint8", "bool", "complex", "small", "empty", "nan", "inf", "overflow", "half overflow", "unfold"],
)
def test_left_alone_is(tensor):
    loaded, saved = saved_and_loaded(tensor, 2)
    assert loaded.data_ptr() == tensor.data_ptr() and loaded.stride() == tensor.stride()
    assert saved.saved_bytes == saved.original_bytes == min(tensor.nbytes, tensor.untyped_storage().nbytes())


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_and_their_views_stay_and_are_not_counted(frozen):
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=not frozen)
    x = torch.randn(4, 64, dtype=torch.float32, requires_grad=True)
    with compress_saved_tensors(2) as saved:
        y = F.linear(x, weight)
    assert y.grad_fn._saved_mat2.data_ptr() == weight.data_ptr()
    assert saved == SavedBytes(0, 0)


def test_kept_tensors_and_their_views_stay_and_are_not_counted():
    images = torch.randn(8, 3, 32, 32)
    loaded, saved = saved_and_loaded(images[4:], 2, keep=[images])
    assert loaded.data_ptr() == images[4:].data_ptr()
    assert saved == SavedBytes(0, 0)


def test_tensor_subclasses_stay_as_they_are():
    tensor = torch.randn(4096).as_subclass(_Subclass)
    loaded, saved = saved_and_loaded(tensor, 2)
    assert type(loaded) is _Subclass and torch.equal(loaded, tensor) and saved == SavedBytes(0, 0)


def test_nothing_happens_without_grad():
    model = conv_net().eval()
    with torch.no_grad(), compress_saved_tensors(4) as saved:
        model(torch.randn(2, 3, 16, 16))
    assert saved == SavedBytes(0, 0)


def test_nothing_is_compressed_after_the_block():
    with compress_saved_tensors(4):
        pass
    tensor = torch.randn(4096)
    product = torch.ones((), requires_grad=True) * tensor
    assert product.grad_fn._saved_other.data_ptr() == tensor.data_ptr()


# Errors and randomness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_numel", [0, 1 << 20])
def test_writing_in_place_after_saving_raises_in_backward(min_numel):
    x = torch.randn(64, 64, requires_grad=True)
    with compress_saved_tensors(8, min_numel=min_numel):
        y = x.exp()
    y.view(-1).add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1; expected version 0"):
        y.sum().backward()


def test_stepping_a_weight_before_backward_raises():
    model = nn.Linear(64, 64)
    with compress_saved_tensors(8):
        loss = model(torch.randn(64, 64, requires_grad=True)).sum()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_relu_is_fine():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 4, 3))
    x = torch.randn(4, 3, 16, 16)
    exact, _ = gradients(model, x)
    rough, _ = gradients(model, x, bits=8)
    assert all(cosine(a, b) > 0.999 for a, b in zip(exact[1:], rough[1:], strict=True) if a.norm() > 1e-3)


def test_the_same_seed_gives_the_same_gradients_and_another_one_others():
    model, x = conv_net(), torch.randn(4, 3, 16, 16)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return gradients(model, x, bits=3)[0]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True) if a.dim() == 4)


def test_compressing_draws_nothing_from_the_generator_of_the_model():
    def noise(compressed: bool) -> Tensor:
        torch.manual_seed(5)
        with compress_saved_tensors(4):
            if compressed:
                torch.ones((), requires_grad=True) * torch.ones(100_000)
            return torch.rand(4)

    assert torch.equal(noise(True), noise(False))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits must be 1 to 8, got 0"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8, got 9"),
        ({"bits": 4.0}, TypeError, "bits must be an int"),
        ({"group_size": 4}, ValueError, "group_size must be at least 8, got 4"),
    ],
)
def test_settings_that_make_no_sense_raise(settings, error, message):
    with pytest.raises(error, match=message), compress_saved_tensors(**settings):
        pass
