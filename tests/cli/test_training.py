"""The loop learns, stops after any step, and resumed gives bit for bit what it would have given."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitorch_engine
from bitorch_engine.cli.data import ImageData, load_data
from bitorch_engine.cli.errors import RunError, UsageError
from bitorch_engine.cli.models import build_model
from bitorch_engine.cli.replica import Replica
from bitorch_engine.cli.training import Epoch, Recipe, Trainer, accuracy, packed_parameters

ALONE = Replica(0, 1, torch.device("cpu"))


@pytest.fixture
def data(tiny: Path) -> ImageData:
    return load_data("tiny.npz")


def make_trainer(data: ImageData, seed: int = 0, **recipe: object) -> Trainer:
    torch.manual_seed(seed)
    model = build_model("tiny_model:net", data.input_shape, len(data.classes))
    bitorch_engine.quantize_(model, w_bit=3, a_bit=4, g_bit=8)
    return Trainer(model, data, replace(Recipe(epochs=3, batch_size=16, lr=3e-2), seed=seed, **recipe), ALONE)


def train(trainer: Trainer) -> list[Epoch]:
    epochs = []
    while not trainer.finished:
        epoch = trainer.train_epoch()
        assert epoch is not None
        epochs.append(epoch)
    return epochs


def everything(trainer: Trainer) -> list[Tensor]:
    """All tensors that decide what comes next: parameters with residuals, buffers, moments."""
    found = [tensor for _, tensor in sorted(trainer.model.state_dict().items()) if type(tensor) is Tensor]
    for parameter in packed_parameters(trainer.model):
        found += [parameter.packed, parameter.scale, parameter.residual]
    for state in trainer.optimizer.state.values():
        found += [value for _, value in sorted(state.items()) if isinstance(value, Tensor)]
    return found


def assert_equal(first: Trainer, second: Trainer) -> None:
    pairs = list(zip(everything(first), everything(second), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(one, other) for one, other in pairs)


def test_it_learns_and_its_learning_rate_falls_to_zero(data: ImageData) -> None:
    trainer = make_trainer(data, epochs=15, augment=False)
    epochs = train(trainer)
    assert epochs[-1].accuracy == 1
    assert epochs[-1].loss < 0.7 * epochs[0].loss
    assert [epoch.epoch for epoch in epochs] == list(range(1, 16))
    assert epochs[-1].lr == pytest.approx(0, abs=1e-9)
    assert epochs[0].flipped > epochs[-1].flipped


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(data: ImageData) -> None:
    first, second, third = make_trainer(data), make_trainer(data), make_trainer(data, seed=1)
    for trainer in (first, second, third):
        torch.rand(trainer.recipe.seed + 3)  # what was drawn before does not matter
        train(trainer)
    assert_equal(first, second)
    assert not torch.equal(packed_parameters(first.model)[0].packed, packed_parameters(third.model)[0].packed)


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 8])
def test_stopped_and_resumed_is_bit_for_bit_the_same_as_uninterrupted(
    data: ImageData, tmp_path: Path, steps: int
) -> None:
    whole = make_trainer(data)
    epochs = train(whole)
    stopped = make_trainer(data)
    left = iter(range(steps))
    results = []
    while (epoch := stopped.train_epoch(stop=lambda: next(left, None) is None)) is not None:
        results.append(epoch)
    stopped.save(tmp_path / "checkpoint")
    torch.manual_seed(99)
    resumed = make_trainer(data, seed=0)
    resumed.resume(tmp_path / "checkpoint")
    assert (resumed.progress.epoch, resumed.progress.step) == divmod(steps, resumed.steps_per_epoch)
    results += train(resumed)
    assert_equal(whole, resumed)
    assert [replace(epoch, seconds=0) for epoch in results] == [replace(epoch, seconds=0) for epoch in epochs]


def test_flipped_is_the_share_of_codes_that_changed(data: ImageData) -> None:
    trainer = make_trainer(data)
    before = torch.cat([parameter.codes.flatten() for parameter in packed_parameters(trainer.model)])
    epoch = trainer.train_epoch()
    after = torch.cat([parameter.codes.flatten() for parameter in packed_parameters(trainer.model)])
    assert epoch is not None
    assert 0 < epoch.flipped == float((before != after).double().mean())


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_a_weight_changes(data: ImageData, broken: str) -> None:
    trainer = make_trainer(data)
    head = trainer.model[-1].bias
    if broken == "loss":
        nn.init.constant_(head, torch.inf)
    else:
        head.register_hook(lambda gradient: gradient * torch.inf)
    before = [parameter.packed.clone() for parameter in packed_parameters(trainer.model)]
    with pytest.raises(RunError, match=rf"{broken}.*; choose a lower --lr \(=0.03\) or --float-lr"):
        trainer.train_epoch()
    after = [parameter.packed for parameter in packed_parameters(trainer.model)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_batch_larger_than_the_data_is_the_data(data: ImageData) -> None:
    trainer = make_trainer(data, batch_size=1000)
    assert (trainer.batch_size, trainer.steps_per_epoch) == (60, 1)


def test_a_batch_smaller_than_the_number_of_processes_is_refused(data: ImageData) -> None:
    model = build_model("tiny_model:net", data.input_shape, len(data.classes))
    with pytest.raises(UsageError, match="1 images cannot be shared by 2 processes"):
        Trainer(model, data, Recipe(batch_size=1), Replica(0, 2, torch.device("cpu")))


def test_processes_share_each_batch_evenly() -> None:
    batch = torch.arange(12)
    parts = [Replica(rank, 3, torch.device("cpu")).shard(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts).sort().values, batch)
    assert {len(part) for part in parts} == {4}


def test_a_float_model_trains_with_an_optimizer_of_its_own(data: ImageData) -> None:
    model = build_model("tiny_model:net", data.input_shape, len(data.classes))
    trainer = Trainer(model, data, Recipe(epochs=1), ALONE, torch.optim.AdamW(model.parameters(), lr=1e-2))
    (epoch,) = train(trainer)
    assert epoch.flipped == 0


def test_accuracy_is_the_share_of_right_answers_in_evaluation_mode() -> None:
    class Brightest(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x.flatten(1)

    images = torch.eye(4).view(4, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 0])
    assert accuracy(Brightest(1, 1), images, labels, batch_size=3) == 0.75
