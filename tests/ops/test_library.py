"""An op called for plain CPU tensors takes the short way; whatever has to hear of an op hears of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bitorch_engine as be
from bitorch_engine import ops
from bitorch_engine.ops import library
from bitorch_engine.ops.reference import bits as reference

VALUES = torch.arange(16, dtype=torch.uint8)


class Heard(TorchDispatchMode):
    """Lists the ops that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class HeardFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def short_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that took the short way, in their order."""
    taken: list[str] = []

    def recorder(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (taken.append(name), function(*args, **kwargs))[1]

    for name in library.defined():
        op = getattr(torch.ops.bitorch_engine, name).default
        function = library._on_cpu.get(name, op)
        monkeypatch.setitem(library._on_cpu, name, recorder(name, function))
    return taken


def layer() -> nn.Module:
    module = be.nBitConv2d(4, 8, 3, padding=1, w_bit=4, a_bit=8)
    with torch.no_grad():
        module(torch.randn(2, 4, 5, 5))
    return module.eval()


def test_plain_tensors_take_the_short_way(short_ways: list[str]) -> None:
    with torch.no_grad():
        assert torch.equal(ops.pack(VALUES, 4), reference.pack(VALUES, 4))
        assert short_ways == ["pack"]
        layer()(torch.randn(2, 4, 5, 5))
        assert short_ways[-1] == "conv"
    short_ways.clear()
    ops.pack(VALUES, 4)
    assert short_ways == []  # not where gradients are recorded


def test_a_negative_view_is_read_as_what_it_stands_for(short_ways: list[str]) -> None:
    x = torch.randn(2, 4, 5, 5)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    module = layer()
    short_ways.clear()
    with torch.no_grad():
        y = module(negative)
        assert short_ways == []
        assert torch.equal(y, module(x))


def test_modes_hear_of_the_op(short_ways: list[str]) -> None:
    module, x = layer(), torch.randn(2, 4, 5, 5)
    short_ways.clear()
    with torch.no_grad():
        with Heard() as heard:
            module(x)
        assert "bitorch_engine::conv" in heard.names
        with HeardFunctions() as functions:
            module(x)
        assert any("conv" in name for name in functions.names)
        with torch.profiler.profile() as profile:
            module(x)
        assert "bitorch_engine::conv" in {event.key for event in profile.key_averages()}
    assert short_ways == []


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.15 says it of every op in a vmap
def test_transforms_and_tracers_see_the_op(short_ways: list[str]) -> None:
    rows = torch.stack([VALUES, VALUES.flip(0)])
    with torch.no_grad():
        mapped = torch.vmap(lambda row: ops.pack(row, 4))(rows)
        assert torch.equal(mapped, torch.stack([reference.pack(row, 4) for row in rows]))
        traced = torch.jit.trace(lambda row: ops.pack(row, 4), (VALUES,), check_trace=False)
        assert "bitorch_engine::pack" in str(traced.graph)
        with torch._subclasses.FakeTensorMode() as mode:
            assert ops.pack(mode.from_tensor(VALUES), 4).shape == (8,)
        assert ops.pack(VALUES.to("meta"), 4).device.type == "meta"
    assert short_ways == []


def test_a_kind_is_what_one_call_repeats_for() -> None:
    x = torch.randn(2, 4, 5, 5)
    seen: list[bool] = []
    with torch.no_grad():
        alike = library.kind_of(x)
        assert alike(torch.randn(2, 4, 5, 5))
        negative = torch._neg_view(x)
        no_memory = torch._efficientzerotensor(x.shape)
        others = [x[:1], x.mT, x.double(), x.to("meta"), x.to_sparse(), nn.Parameter(x), negative, no_memory]
        assert [alike(other) for other in others] == [False] * len(others)
        assert not alike(torch.empty(2, 4, 5, 5).contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu"):
            seen.append(alike(x))
        with torch.inference_mode():
            seen += [alike(x), alike(x.clone())]
        with Heard():
            seen.append(alike(x))
        torch.vmap(lambda row: (seen.extend([alike(x), alike(row)]), row)[1])(torch.stack([x, x]))
        torch.func.grad(lambda value: (seen.append(alike(x)), value.sum())[1])(x)
        torch.func.functionalize(lambda value: (seen.append(alike(x)), value)[1])(x)
    assert seen == [False] * 8


@pytest.mark.parametrize("recorded", [torch.no_grad, torch.inference_mode])
def test_who_listens_is_heard_by_a_layer_with_plans(recorded: Any) -> None:
    module: Any = layer()
    x = torch.randn(2, 4, 5, 5)
    with recorded():
        module(x)
        expected = module(x)
        assert module._plans
        unheard = tuple((*kind, lambda *args: pytest.fail("planned")) for *kind, _ in module._plans)
        module.__dict__["_plans"] = unheard
        for mode in (Heard(), HeardFunctions(), torch.profiler.profile(), torch.autocast("cpu", enabled=True)):
            with mode:
                torch.testing.assert_close(module(x).float(), expected, rtol=2e-2, atol=2e-2)
        torch.vmap(lambda scale: module(x) * scale)(torch.ones(3))
        assert module._plans is unheard


def test_export_and_compile_see_the_op() -> None:
    module, x = layer(), torch.randn(2, 4, 5, 5)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x), expected)
        exported = torch.export.export(module, (x,))
        assert torch.equal(exported.module()(x), expected)
    assert "bitorch_engine.conv" in graphs[0]
    assert "bitorch_engine.conv" in str(exported.graph)
