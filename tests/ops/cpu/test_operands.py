"""Packed operands of a wrong length are refused by every op: a kernel would read beyond them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitorch_engine import ops

GEOMETRY = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1, ())
SHAPE, WEIGHT = (2, 8, 5, 5), (16, 8, 3, 3)
AS_FLOATS = (torch.float32, False)
ONE, LOW = torch.tensor(0.1), torch.tensor(-8.0)


def short(count: int, bits: int) -> Tensor:
    return torch.zeros((count * bits + 7) // 8 - 1, dtype=torch.uint8)


def whole(count: int, bits: int) -> Tensor:
    return torch.zeros((count * bits + 7) // 8, dtype=torch.uint8)


CALLS: dict[str, Callable[[], object]] = {
    "unpack": lambda: ops.unpack(short(40, 3), 3, 40),
    "dequantize": lambda: ops.dequantize(short(40, 3), torch.ones(4), 3, 10, torch.float32),
    "linear_weight_only": lambda: ops.linear_weight_only(
        torch.randn(1, 128), short(1024, 4), torch.ones(8), 4, None, 128
    ),
    "linear_weight_only of many rows": lambda: ops.linear_weight_only(
        torch.randn(99, 128), short(1024, 4), torch.ones(8), 4, None, 128
    ),
    "linear_grad_input": lambda: ops.linear_grad_input(torch.randn(2, 8), short(1024, 4), torch.ones(8), 4, 128),
    "activation_values": lambda: ops.activation_values(short(400, 4), ONE, LOW, 4, SHAPE, torch.float32, False),
    "activation_grads": lambda: ops.activation_grads(torch.randn(SHAPE), short(400, 4), whole(400, 1), LOW, 4),
    "activation_grads of the bits beyond": lambda: ops.activation_grads(
        torch.randn(SHAPE), whole(400, 4), short(400, 1), LOW, 4
    ),
    "conv of one row": lambda: ops.conv(
        torch.randn(1, 128), ONE, LOW, 4, short(1024, 4), torch.ones(8), 4, None, (8, 128), (), (), (), False, (), 1, ()
    ),
    **{
        f"conv of {bits} bits": lambda bits=bits: ops.conv(  # type: ignore[misc]
            torch.randn(SHAPE), ONE, LOW, bits, short(1152, bits), torch.ones(16), bits, None, WEIGHT, *GEOMETRY
        )
        for bits in (1, 2, 4)
    },
    **{
        f"conv_codes of {name}": lambda codes=codes, packed=packed: ops.conv_codes(  # type: ignore[misc]
            codes(400, 4),
            SHAPE,
            ONE,
            LOW,
            ONE,
            4,
            packed(1152, 4),
            torch.ones(16),
            4,
            WEIGHT,
            *GEOMETRY,
            torch.float32,
            False,
        )
        for name, codes, packed in (("the weight", whole, short), ("the activation", short, whole))
    },
    "conv_grad_input": lambda: ops.conv_grad_input(
        torch.zeros(2, 5, 5, 16, dtype=torch.int8),
        torch.ones(2, 1, 1, 1),
        short(1152, 4),
        4,
        SHAPE,
        WEIGHT,
        *GEOMETRY,
        torch.float32,
        False,
    ),
    "conv_grad_weight": lambda: ops.conv_grad_weight(
        torch.zeros(2, 5, 5, 16, dtype=torch.int8),
        torch.ones(1, 16, 1, 1),
        short(400, 4),
        ONE,
        LOW,
        4,
        SHAPE,
        WEIGHT,
        *GEOMETRY,
        torch.float32,
    ),
    "conv_grad_weight_float": lambda: ops.conv_grad_weight_float(
        torch.zeros(2, 16, 5, 5), short(400, 4), ONE, LOW, 4, SHAPE, WEIGHT, *GEOMETRY, torch.float32, False
    ),
    "add_": lambda: ops.add_(short(40, 3), whole(40, 5), torch.ones(4), torch.zeros(4, 10), bits=3, key=1),
    "add_ of the residual": lambda: ops.add_(
        whole(40, 3), short(40, 5), torch.ones(4), torch.zeros(4, 10), bits=3, key=1
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_short_one_is_refused(call: Callable[[], object]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"values of \d bits are packed in \d+ bytes, got \d+ bytes"):
        call()
