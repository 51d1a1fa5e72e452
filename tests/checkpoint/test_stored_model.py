"""Contents that make no sense, in files whose digests are right, are refused: one error, nothing changed."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitorch_engine import nBitConv2d
from bitorch_engine.checkpoint import CheckpointError, load, load_training, read_metadata, save, save_training
from bitorch_engine.checkpoint.format import read, write
from bitorch_engine.optim import DiodeMix

Bits = Callable[[Any], Any]
JUNK = [None, 3, "junk", [1], {}, {"0.weight": None}, {"tensor": ["junk"]}]


def mutations(content: dict[str, Any]) -> Iterator[Any]:
    """Contents in which one value, at any depth of objects, is missing or something else."""
    for key, value in content.items():
        without = {k: v for k, v in content.items() if k != key}
        yield without
        yield from (without | {key: junk} for junk in JUNK)
        if isinstance(value, dict):
            yield from (without | {key: inner} for inner in mutations(value))


def count_refused(
    contents: Iterable[Any], change: Callable[[Any, list[Any]], Any], make: Callable[[], list[Any]], bits_of: Bits
) -> int:
    """How many contents ``change`` refuses. Asserts that it then leaves the parts alone, and fails in no other way."""
    refused, parts = 0, make()
    before = bits_of(parts)
    for content in contents:
        try:
            change(content, parts)
        except CheckpointError:
            refused += 1
        else:
            parts = make()
            before = bits_of(parts)
        assert bits_of(parts) == before
    return refused


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nBitConv2d(2, 4, 1, w_bit=3, a_bit=4))


@pytest.mark.parametrize(
    "make", [lambda: [small(1)], lambda: [nn.Sequential(nn.Conv2d(2, 4, 1))]], ids=["packed", "float"]
)
def test_deployment_contents_that_make_no_sense_are_refused(
    tmp_path: Path, bits_of: Bits, make: Callable[[], list[nn.Module]]
) -> None:
    def change(content: Any, parts: list[Any]) -> None:
        write(tmp_path / "x", "deployment", content, tensors)
        with suppress(CheckpointError):
            read_metadata(tmp_path / "x")
        load(parts[0], tmp_path / "x")

    save(small(0), tmp_path / "m", metadata={"a": 1})
    content, tensors = read(tmp_path / "m", "deployment")
    assert count_refused(mutations(content), change, make, bits_of) > 50


@pytest.mark.parametrize("name", ["0.weight.packed", "0.weight.scale"])
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.to(torch.int16), lambda x: x[None], None])
def test_codes_and_scales_of_another_size_are_refused(
    tmp_path: Path, bits_of: Bits, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    save(small(0), tmp_path / "m")
    content, tensors = read(tmp_path / "m", "deployment")
    wrong = copy.copy(tensors)
    wrong.pop(name) if change is None else wrong.update({name: change(tensors[name])})
    write(tmp_path / "x", "deployment", content, wrong)
    model = small(1)
    before = bits_of(model)
    with pytest.raises(
        CheckpointError, match="what it says of its model makes no sense .*; save it again with this lib"
    ):
        load(model, tmp_path / "x")
    assert bits_of(model) == before


def test_training_contents_that_make_no_sense_are_refused(tmp_path: Path, bits_of: Bits) -> None:
    def run() -> list[Any]:
        model = small(0)
        optimizer = DiodeMix(model.parameters())
        model(torch.randn(1, 2, 2, 2)).sum().backward()
        optimizer.step()
        return [model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)]

    def change(content: Any, parts: list[Any]) -> None:
        write(tmp_path / "x", "training", content, tensors)
        load_training(tmp_path / "x", *parts)

    save_training(tmp_path / "c", *run(), progress={"a": (1, torch.ones(1))})
    content, tensors = read(tmp_path / "c", "training")
    assert count_refused(mutations(content), change, run, bits_of) > 100
