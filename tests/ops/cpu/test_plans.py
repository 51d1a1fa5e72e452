"""A plan of an op is the op, for as long as its tensors are those of which it was made."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitorch_engine import ops
from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import linear
from bitorch_engine.ops.reference.linear import linear_weight_only as linear_reference

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")

GEOMETRY = ops.Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
X = torch.randn(2, 8, 5, 5)
SCALE, LOW = torch.tensor(0.05), torch.tensor(-128.0)
PACKED, CHANNEL_SCALE, BIAS = ops.pack(torch.randint(0, 16, (16 * 8 * 9,)), 4), torch.rand(16), torch.randn(16)
SOURCES = (SCALE, LOW)
LAYER: tuple[Any, ...] = (SOURCES, PACKED, CHANNEL_SCALE, BIAS)


def conv_arguments(x: Tensor = X, layer: tuple[Any, ...] = LAYER) -> tuple[object, ...]:
    (scale, low), packed, channel_scale, bias = layer
    return (x, scale, low, 8, packed, channel_scale, 4, bias, (16, 8, 3, 3), *GEOMETRY)


def conv_plan(x: Tensor = X, layer: tuple[Any, ...] = LAYER) -> ops.Plan | None:
    return ops.plan("conv", layer[0], *conv_arguments(x, layer))


def copied(layer: tuple[Any, ...] = LAYER) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, Tensor) else tuple(s.clone() for s in t) for t in layer)


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.no_grad():
        yield


def test_a_plan_is_the_op() -> None:
    plan = conv_plan()
    assert plan is not None
    for x in (X, torch.randn_like(X)):
        assert torch.equal(plan(x, *LAYER), ops.conv(*conv_arguments(x)))


@pytest.mark.parametrize("place", range(4))
def test_another_tensor_is_another_plan(place: int) -> None:
    plan = conv_plan()
    assert plan is not None
    layer = (*LAYER[:place], copied()[place], *LAYER[place + 1 :])
    assert plan(X, *layer) is None
    assert plan(X, *LAYER) is not None


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("unseen", [False, True])
def test_another_value_of_a_source_is_another_plan(place: int, unseen: bool) -> None:
    layer = copied()
    plan = conv_plan(layer=layer)
    assert plan is not None
    source = layer[0][place]
    (source.data if unseen else source).sub_(0.01)
    assert plan(X, *layer) is None
    (source.data if unseen else source).copy_(SOURCES[place])
    y = plan(X, *layer)
    assert y is not None
    assert torch.equal(y, ops.conv(*conv_arguments()))


def test_a_source_is_one_number() -> None:
    assert ops.plan("conv", (SCALE, torch.zeros(2)), *conv_arguments()) is None


@pytest.mark.skipif(len(cpu.available_isas()) < 2, reason="there is one instruction set")
def test_another_instruction_set_is_another_plan() -> None:
    plan = conv_plan()
    assert plan is not None
    with cpu.cap_isa("scalar"):
        assert plan(X, *LAYER) is None
    assert plan(X, *LAYER) is not None


def test_a_weight_that_moved_is_another_one() -> None:
    layer = copied()
    plan = conv_plan(layer=layer)
    assert plan is not None
    layer[1].share_memory_()  # no write, so no version; from now on others may write
    assert plan(X, *layer) is None
    assert conv_plan(layer=layer) is None


def test_it_keeps_what_its_kernel_reads() -> None:
    layer = copied()
    plan = conv_plan(layer=layer)
    assert plan is not None
    expected = ops.conv(*conv_arguments())
    for _ in range(100):
        torch.rand(16 * 8 * 9)  # would take the place of what was freed
    assert torch.equal(plan(X, *layer), expected)


@pytest.mark.parametrize(
    "layer",
    [
        ((SCALE.double(), LOW), PACKED, CHANNEL_SCALE, BIAS),
        (SOURCES, PACKED, CHANNEL_SCALE.half(), BIAS),
        (SOURCES, PACKED, CHANNEL_SCALE, BIAS.double()),
        (SOURCES, PACKED, CHANNEL_SCALE, torch.ones(1).expand(16)),
        (SOURCES, PACKED, torch.rand(32)[::2], BIAS),
    ],
    ids=["scale", "weight's scale", "bias", "expanded bias", "strided scale"],
)
def test_what_a_kernel_cannot_read_has_no_plan(layer: tuple[Tensor, ...]) -> None:
    assert conv_plan(layer=layer) is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_short_floats_is_read_by_every_call(dtype: torch.dtype, mode: Any) -> None:
    bias, exact = BIAS.to(dtype), BIAS.to(dtype).float()
    layer = (*LAYER[:3], bias)
    with mode():
        plan = conv_plan(layer=layer)
    assert plan is not None
    for called_in in (torch.inference_mode, torch.no_grad):
        for _ in range(2):
            with called_in():
                assert torch.equal(plan(X, *layer), ops.conv(*conv_arguments(layer=(*LAYER[:3], exact))))
            bias.mul_(2)
            exact.mul_(2)
    assert plan(X, *layer[:3], bias.clone()) is None
    bias.data = bias[:8]
    assert plan(X, *layer) is None


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_nothing_is_planned_where_something_listens() -> None:
    with torch.enable_grad():
        assert conv_plan() is None
    with torch.profiler.profile():
        assert conv_plan() is None
    assert conv_plan(X.double()) is None
    assert ops.plan("pack", None, PACKED, 4) is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [10, 101, 1001])
def test_rows_of_any_length_have_a_plan(columns: int, bits: int) -> None:
    index = torch.randint(0, 1 << bits, (7 * columns,), dtype=torch.uint8)
    x, packed, scale = torch.randn(3, columns), ops.pack(index, bits), torch.rand(7)
    plan = ops.plan("linear_weight_only", None, x, packed, scale, bits, None, columns)
    assert plan is not None
    y = plan(x, None, packed, scale, None)
    assert y is not None
    assert torch.equal(y, ops.linear_weight_only(x, packed, scale, bits, None, columns))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1 << 19, 1])  # rows of the weight at a time: all, or eight
def test_many_rows_have_a_plan(block: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK", block)
    index = torch.randint(0, 8, (21 * 45,), dtype=torch.uint8)
    x, packed, scale = torch.randn(70, 3, 45), ops.pack(index, 3), torch.rand(21)
    bias = None if dtype is None else torch.randn(21).to(dtype)
    plan = ops.plan("linear_weight_only", None, x, packed, scale, 3, bias, 45)
    assert plan is not None
    for _ in range(2):
        y = plan(x, None, packed, scale, bias)
        assert y is not None
        wide = None if bias is None else bias.float()
        torch.testing.assert_close(y, linear_reference(x, packed, scale, 3, wide, 45), rtol=1e-5, atol=1e-5)
        scale.mul_(2)
        if bias is not None:
            bias.mul_(2)
    packed.bitwise_not_()
    assert plan(x, None, packed, scale, bias) is None


def test_another_precision_of_float32_products_is_another_plan() -> None:
    x, packed, scale = torch.randn(1, 256), ops.pack(torch.randint(0, 16, (16 * 256,)), 4), torch.rand(16)
    arguments = (x, packed, scale, 4, None, 256)
    found = []
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            plan = ops.plan("linear_weight_only", None, *arguments)
            assert plan is not None
            found.append(plan(x, None, packed, scale, None))
            assert found[-1] is not None
            assert torch.equal(found[-1], ops.linear_weight_only(*arguments))
            torch.set_float32_matmul_precision("high" if setting == "highest" else "highest")
            assert plan(x, None, packed, scale, None) is None
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
