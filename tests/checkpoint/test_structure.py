"""Nested values come back from JSON and tensors as they were, types included."""

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitorch_engine import nBitConvParameter
from bitorch_engine.checkpoint.structure import decode, encode

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_KEYS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
_NESTED = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


def through_json(value: Any) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    form = json.loads(json.dumps(encode(value, "value", tensors), allow_nan=False))
    return decode(form, tensors), tensors


@given(value=_NESTED)
def test_nested_values_come_back_the_same(value: Any) -> None:
    assert repr(through_json(value)[0]) == repr(value)  # repr: NaN equals NaN, 1 is not 1.0, -0.0 is not 0.0


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        math.nan,
        -0.0,
        5e-324,
        2**80,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.Size([2, 3]),
        Counter({3: 1, 7: 2}),
        OrderedDict([("b", 1), ("a", (2,))]),
        {0: {"step": 1}, "0": [()], None: {}, True: ""},
        {"tensor": {"float": "inf"}, "dict": [["tuple", 1]]},
    ],
    ids=repr,
)
def test_types_and_values_that_json_has_not_come_back_the_same(value: Any) -> None:
    back, _ = through_json(value)
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_a_numpy_float_comes_back_as_the_same_number() -> None:
    assert repr(through_json(np.float64(0.1))[0]) == "0.1"


def test_tensors_are_named_by_their_place_and_come_back_as_they_are() -> None:
    value = {"state": {0: {"m": torch.arange(3)}}, "list": [torch.ones(2, dtype=torch.bfloat16)]}
    back, tensors = through_json(value)
    assert set(tensors) == {"value.state.0.m", "value.list.0"}
    assert back["state"][0]["m"].equal(torch.arange(3))
    assert back["list"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5)])
def test_tensors_keep_the_order_of_their_memory(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for value in (x, x.transpose(0, 1), x[:, ::2], x.transpose(0, 1)[::2], x.expand(2, *shape)):
        back, _ = through_json(value)
        assert back.equal(value)
        assert back.stride() == value.clone().stride()


def test_places_with_one_name_get_names_of_their_own() -> None:
    back, tensors = through_json(
        {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 0: torch.ones(2), "0": torch.ones(3)}
    )
    assert set(tensors) == {"value.a.b", "value.a.b~2", "value.0", "value.0~2"}
    assert [back["a.b"].item(), back["a"]["b"].item()] == [0, 1]
    assert [len(back[0]), len(back["0"])] == [2, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, print]}, r"value.a.1 is a builtins.builtin_function_or_method, which a checkpoint cannot hold"),
        ({"net": nn.ReLU()}, r"value.net is a torch.nn.modules.activation.ReLU"),
        ({"x": np.zeros(2)}, r"value.x is a numpy.ndarray"),
        ({"x": {1, 2}}, r"value.x is a builtins.set"),
        ({"p": nn.Parameter(torch.zeros(1))}, r"value.p is a torch.nn.parameter.Parameter"),
        ({"q": nBitConvParameter(torch.zeros(1, 1, 1, 1))}, r"value.q is a .*nBitConvParameter"),
        ({"n": np.int64(1)}, r"value.n is a numpy.int64"),
        ({"d": {(1, 2): 3}}, r"value.d has a key of type tuple"),
    ],
)
def test_what_has_no_form_is_named(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        through_json(value)
