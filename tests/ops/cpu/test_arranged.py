"""What a kernel has arranged of a weight is made again once the weight is written to, in whatever way."""

import io
from collections.abc import Callable

import pytest
import torch

from bitorch_engine import nBitConv2d
from bitorch_engine.ops.cpu.arranged import arranged

X = torch.randn(2, 3, 6, 6)


def step(layer: nBitConv2d, optimizer: type[torch.optim.Optimizer]) -> None:
    with torch.enable_grad():
        layer(X).square().sum().backward()
    optimizer(layer.parameters(), lr=0.1).step()  # type: ignore[call-arg]


def load(layer: nBitConv2d) -> None:
    file = io.BytesIO()
    torch.save(nBitConv2d(3, 4, 3, a_bit=8, bias=False).state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file))


WRITES: dict[str, Callable[[nBitConv2d], object]] = {
    "an optimizer's step": lambda layer: step(layer, torch.optim.SGD),
    "AdamW's step": lambda layer: step(layer, torch.optim.AdamW),
    "copy_": lambda layer: layer.weight.copy_(torch.randn(4, 3, 3, 3)),
    "copy_ of codes": lambda layer: layer.weight.copy_(-layer.weight.dequantize()),
    "assigning data": lambda layer: setattr(layer.weight, "data", torch.randn(4, 3, 3, 3)),
    "quantize_": lambda layer: layer.weight.quantize_(torch.randn(4, 3, 3, 3)),
    "mul_": lambda layer: layer.weight.mul_(-1),
    "load_state_dict": load,
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_written_weight_is_arranged_anew(write: Callable[[nBitConv2d], object]) -> None:
    layer = nBitConv2d(3, 4, 3, a_bit=8, bias=False).eval()
    with torch.no_grad():
        before = layer(X)
        assert torch.equal(layer(X), before)
        write(layer)
        after = layer(X)
    with torch.enable_grad():
        assert torch.equal(after, layer(X))  # which keeps nothing
    assert not torch.equal(after, before)


def test_nothing_is_kept_of_what_others_can_write_unseen() -> None:
    with torch.inference_mode():
        inference = torch.zeros(8, dtype=torch.uint8)
    for packed in (inference, torch.zeros(8, dtype=torch.uint8).share_memory_()):
        first = arranged(packed, "key", object, keep=True)
        assert arranged(packed, "key", object, keep=True) is not first


def test_what_is_kept_is_forgotten_once_others_can_write_it() -> None:
    packed = torch.zeros(8, dtype=torch.uint8)
    first = arranged(packed, "key", object, keep=True)
    packed.share_memory_()
    second = arranged(packed, "key", object, keep=True)
    assert second is not first
    assert arranged(packed, "key", object, keep=True) is not second


def test_what_is_kept_goes_with_the_weight_and_with_a_write() -> None:
    packed = torch.zeros(8, dtype=torch.uint8)
    first = arranged(packed, "key", object, keep=True)
    assert arranged(packed, "key", object, keep=True) is first
    assert arranged(packed, "other", object, keep=True) is not first
    packed.add_(1)
    assert arranged(packed, "key", object, keep=True) is not first
