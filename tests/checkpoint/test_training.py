"""Interrupted and resumed is uninterrupted: every code, residual, moment, buffer and random number, to the bit."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from bitorch_engine import quantize_
from bitorch_engine.checkpoint import CheckpointError, load_training, read_metadata, save, save_training
from bitorch_engine.checkpoint.rollback import rng_state
from bitorch_engine.optim import DiodeMix

Network = Callable[..., nn.Sequential]
Bits = Callable[[Any], Any]
Make = Callable[[nn.Module], torch.optim.Optimizer]


def galore(proj_type: str, memory: str) -> Make:
    def make(model: nn.Module) -> DiodeMix:
        group = {"params": model.parameters(), "rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": proj_type}
        return DiodeMix([group], memory=memory)

    return make


def two_groups(model: nn.Module) -> DiodeMix:
    packed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return DiodeMix([{"params": packed, "lr": 1e-2, "weight_decay": 0.1}, {"params": others}], dtype=torch.float64)


def plain(kind: Any, **options: Any) -> Make:
    return lambda model: kind(model.parameters(), foreach=False, **options)


OPTIMIZERS: dict[str, Make] = {
    **{f"DiodeMix {m}": lambda model, m=m: DiodeMix(model.parameters(), 1e-2, memory=m) for m in
       ("fp32", "bf16", "fp16", "8bit", "channel")},
    "DiodeMix in two groups": two_groups,
    "GaLore std": galore("std", "8bit"),
    "GaLore full": galore("full", "fp32"),
    "AdamW": plain(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad": plain(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "SGD": plain(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "SGD without momentum": plain(torch.optim.SGD, lr=1e-2),
    "RMSprop": plain(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "AdamW by name": lambda model: torch.optim.AdamW(model.named_parameters(), foreach=False),
}  # fmt: skip

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.LinearLR(o)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@dataclass
class Run:
    """A training run: all that it consists of, and what it does in a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    step: int = 0

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.step += 1
            x = torch.randn(4, 3, 8, 8) + random.random() + np.random.randn()  # and dropout, and gradient rounding
            self.optimizer.zero_grad()
            loss = self.model.train()(x).square().mean()
            loss.backward()
            self.optimizer.step()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            elif self.scheduler is not None:
                self.scheduler.step()

    def save(self, path: Path) -> None:
        save_training(path, self.model, self.optimizer, self.scheduler, {"step": self.step})

    def load(self, path: Path) -> None:
        self.step = load_training(path, self.model, self.optimizer, self.scheduler)["step"]

    def everything(self, bits_of: Bits) -> Any:
        parts = [self.model, self.optimizer, rng_state(), self.step]
        return bits_of([*parts, *([] if self.scheduler is None else [self.scheduler])])


def start(model: nn.Module, optimizer: Make = OPTIMIZERS["DiodeMix 8bit"], scheduler: Any = None) -> Run:
    made = optimizer(model)
    return Run(model, made, scheduler and scheduler(made))


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def assert_resumes_exactly(path: Path, run: Run, other: Run, bits_of: Bits) -> None:
    seed_everything(1)
    run.train(2)
    before = run.everything(bits_of)
    run.save(path)
    assert run.everything(bits_of) == before  # saving is no step of the run
    run.train(3)
    uninterrupted = run.everything(bits_of)
    seed_everything(2)
    other.load(path)
    assert other.everything(bits_of) == before
    other.train(3)
    assert other.everything(bits_of) == uninterrupted


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_resumes_exactly(tmp_path: Path, network: Network, bits_of: Bits, optimizer: Make) -> None:
    run, other = start(network(), optimizer), start(network(seed=1), optimizer)
    assert_resumes_exactly(tmp_path / "c", run, other, bits_of)


@pytest.mark.parametrize(
    "settings",
    [
        {"learn_scale": True},
        {"learn_scale": True, "w_bit": 1, "a_bit": 1},
        {"w_bit": 8, "g_bit": 2},
        {"w_bit": 3, "a_bit": None, "g_bit": None},
        {"overrides": {"0": {"w_bit": 8}, "4": {"w_bit": 2, "a_bit": None}}, "skip": "5"},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["DiodeMix 8bit", "AdamW"])
def test_a_run_resumes_exactly_with_other_bits(
    tmp_path: Path, network: Network, bits_of: Bits, settings: dict[str, Any], optimizer: str
) -> None:
    run, other = (start(network(seed, **settings), OPTIMIZERS[optimizer]) for seed in (0, 1))
    assert_resumes_exactly(tmp_path / "c", run, other, bits_of)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_run_with_a_scheduler_resumes_exactly(
    tmp_path: Path, network: Network, bits_of: Bits, scheduler: Any
) -> None:
    run, other = (start(network(seed), scheduler=scheduler) for seed in (0, 1))
    assert_resumes_exactly(tmp_path / "c", run, other, bits_of)


@pytest.mark.parametrize("optimizer", ["DiodeMix 8bit", "DiodeMix channel", "AdamW"])
def test_a_bfloat16_run_resumes_exactly(tmp_path: Path, network: Network, bits_of: Bits, optimizer: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        run, other = (start(network(seed, a_bit=None), OPTIMIZERS[optimizer]) for seed in (0, 1))
        assert_resumes_exactly(tmp_path / "c", run, other, bits_of)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_that_steps_in_backward_resumes_exactly(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    run, other = start(network()), start(network(seed=1))
    for each in (run, other):
        each.optimizer.step_in_backward()  # type: ignore[attr-defined]
    assert_resumes_exactly(tmp_path / "c", run, other, bits_of)


def test_a_run_resumes_exactly_from_its_first_step(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    run, other = start(network()), start(network(seed=1))
    run.save(tmp_path / "c")
    run.train()
    other.load(tmp_path / "c")
    other.train()
    assert other.everything(bits_of) == run.everything(bits_of)


def test_a_run_that_has_gone_on_can_go_back(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    run = start(network())
    run.train()
    run.save(tmp_path / "c")
    run.train()
    once = run.everything(bits_of)
    run.load(tmp_path / "c")
    run.train()
    assert run.everything(bits_of) == once


def test_a_run_of_shared_weights_resumes_exactly(tmp_path: Path, bits_of: Bits) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1))
        layers[1].weight = layers[0].weight
        quantize_(layers, a_bit=8)
        return nn.Sequential(layers, layers[2])

    run, other = start(model(0)), start(model(1))
    assert_resumes_exactly(tmp_path / "c", run, other, bits_of)
    assert other.model[0][0].weight is other.model[0][1].weight


def test_equal_runs_give_equal_files(tmp_path: Path, network: Network) -> None:
    for name in "ab":
        run = start(network())
        seed_everything(0)
        run.train()
        run.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_progress_comes_back(tmp_path: Path, network: Network) -> None:
    progress = {"epoch": 3, "best": float("-inf"), "order": torch.arange(3), "seen": {1: (2.5, None)}}
    save_training(tmp_path / "c", network(), progress=progress)
    back = load_training(tmp_path / "c", network(seed=1))
    assert back.pop("order").equal(progress.pop("order"))
    assert back == progress


def test_parts_that_were_not_given_are_passed_over(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    run = start(network(), scheduler=SCHEDULERS["LambdaLR"])
    run.train()
    run.save(tmp_path / "c")
    model = network(seed=1)
    assert load_training(tmp_path / "c", model) == {"step": 3}
    assert bits_of(model) == bits_of(run.model)
    save_training(tmp_path / "c", model)
    assert load_training(tmp_path / "c", network(seed=2)) == {}


def test_read_metadata_tells_a_training_checkpoint(tmp_path: Path, network: Network) -> None:
    save_training(tmp_path / "c", network())
    stored = read_metadata(tmp_path / "c")
    assert (stored["kind"], stored["metadata"], list(stored["weights"])) == (
        "training",
        {},
        ["0.weight", "4.weight", "5.weight"],
    )


def test_numpys_other_generators_come_back_too(tmp_path: Path, network: Network) -> None:
    previous = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(5))
        save_training(tmp_path / "c", network())
        drawn = np.random.rand(3)
        load_training(tmp_path / "c", network())
        assert (np.random.rand(3) == drawn).all()
    finally:
        np.random.set_bit_generator(previous)


def test_states_of_gpus_that_are_not_here_are_passed_over(
    tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16, dtype=torch.uint8)])
        save_training(tmp_path / "c", network())
    load_training(tmp_path / "c", network())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["DiodeMix 8bit", "GaLore std", "AdamW"])
def test_a_run_on_a_gpu_resumes_there_and_loads_on_the_cpu(
    tmp_path: Path, network: Network, bits_of: Bits, optimizer: str
) -> None:
    model = network().cuda()
    made = OPTIMIZERS[optimizer](model)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8, device="cuda")).square().mean().backward()
        made.step()
    save_training(tmp_path / "c", model, made)
    for device in ("cpu", "cuda"):
        other = network(seed=1).to(device)
        other_made = OPTIMIZERS[optimizer](other)
        load_training(tmp_path / "c", other, other_made)
        assert bits_of(other) == bits_of(model)
        assert bits_of(other_made) == bits_of(made)
        other(torch.randn(4, 3, 8, 8, device=device)).square().mean().backward()
        other_made.step()


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({"loss": print}, "progress.loss is a builtins.builtin_function_or_method"),
        ({"deep": [{"set": {1}}]}, "progress.deep.0.set is a builtins.set"),
    ],
)
def test_state_that_cannot_be_held_is_named(
    tmp_path: Path, network: Network, progress: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        save_training(tmp_path / "c", network(), progress=progress)
    assert list(tmp_path.iterdir()) == []


class Halving:
    """A learning rate as an object, which LambdaLR saves, with a function inside."""

    def __init__(self) -> None:
        self.rate = lambda step: 0.5**step

    def __call__(self, step: int) -> float:
        return self.rate(step)


def test_a_scheduler_that_holds_a_function_is_named(tmp_path: Path, network: Network) -> None:
    run = start(network(), scheduler=lambda o: lr_scheduler.LambdaLR(o, Halving()))
    with pytest.raises(TypeError, match="scheduler.lr_lambdas.0.rate is a builtins.function"):
        run.save(tmp_path / "c")


# -- what does not fit ------------------------------------------------------------------------------------------------


def assert_untouched(path: Path, run: Run, message: str, bits_of: Bits) -> None:
    """Assert that the file is refused with this message and the whole run stays as it is, to the bit."""
    run.train(1)
    before, objects = run.everything(bits_of), [id(p) for p in run.model.parameters()]
    state = {id(p): id(s) for p, s in run.optimizer.state.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        run.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(" Nothing was changed.")
    assert run.everything(bits_of) == before
    assert [id(p) for p in run.model.parameters()] == objects
    assert {id(p): id(s) for p, s in run.optimizer.state.items()} == state
    run.train(1)


def lambda_lr(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def reordered(model: nn.Module) -> DiodeMix:
    return DiodeMix(list(model.parameters())[::-1])


def of_something_else(model: nn.Module) -> DiodeMix:
    return DiodeMix([*list(model.parameters())[:-1], nn.Parameter(torch.zeros(5))])


NOT_FITTING = {
    "w_bit": (
        {"w_bit": 2},
        {},
        "0.weight is stored with w_bit=4, the model has w_bit=2; convert the model with w_bit=4.",
    ),
    "a_bit": ({"a_bit": None}, {}, "0.weight is stored with a_bit=8, the model has a_bit=None"),
    "g_bit": ({"g_bit": None}, {}, "0.weight is stored with g_bit=8, the model has g_bit=None"),
    "learn_scale": ({"learn_scale": True}, {}, "stored with learn_scale=False, the model has learn_scale=True"),
    "float": (
        {"quantized": False},
        {},
        "0.weight is stored with 4 bits, the model's is float; convert it with quantize_",
    ),
    "optimizer": (
        {},
        {"optimizer": OPTIMIZERS["SGD"]},
        "the file has the optimizer DiodeMix, got SGD; make the one that",
    ),
    "scheduler": (
        {},
        {"scheduler": SCHEDULERS["ExponentialLR"]},
        "has the scheduler LambdaLR, got ExponentialLR; make",
    ),
    "groups": (
        {},
        {"optimizer": two_groups},
        r"optimizer has groups of \[12\] parameters, got \[\d, \d\]; make the opt",
    ),
    "order": (
        {},
        {"optimizer": reordered},
        "the file's optimizer has 0.weight in group 0 where this one has 7.bias; make",
    ),
    "others": (
        {},
        {"optimizer": of_something_else},
        "has 7.bias in group 0 where .* a parameter that is not of the model",
    ),
}


@pytest.mark.parametrize(("settings", "parts", "message"), NOT_FITTING.values(), ids=NOT_FITTING)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, network: Network, bits_of: Bits, settings: dict[str, Any], parts: dict[str, Any], message: str
) -> None:
    run = start(network(), scheduler=lambda_lr)
    run.train(1)
    run.save(tmp_path / "c")
    other = start(network(1, **settings), **{"scheduler": lambda_lr} | parts)
    assert_untouched(tmp_path / "c", other, message, bits_of)


def test_a_model_of_another_dtype_is_refused(tmp_path: Path, network: Network) -> None:
    save_training(tmp_path / "c", network())
    with pytest.raises(CheckpointError, match="0.weight is stored with dtype=float32, the model has dtype=bfloat16"):
        load_training(tmp_path / "c", network().bfloat16())
    model = network()
    model[7].double()
    with pytest.raises(
        CheckpointError, match=r"7.weight is stored as float32 of shape \(5, 216\), the model wants float64"
    ):
        load_training(tmp_path / "c", model)


@pytest.mark.parametrize("part", ["optimizer", "scheduler"])
def test_a_part_that_the_file_has_not_is_refused(tmp_path: Path, network: Network, bits_of: Bits, part: str) -> None:
    run = start(network(), scheduler=lambda_lr)
    parts = {"optimizer": run.optimizer, "scheduler": run.scheduler} | {part: None}
    save_training(tmp_path / "c", run.model, **parts)
    assert_untouched(tmp_path / "c", run, f"there is no {part} in it; pass {part}=None", bits_of)


def test_names_that_differ_are_refused(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    save_training(tmp_path / "c", network())
    model = network()
    model.append(nn.ParameterDict({"more": nn.Parameter(torch.zeros(1))}))
    with pytest.raises(CheckpointError, match="the file lacks 8.more; build the model as it was saved. Nothing"):
        load_training(tmp_path / "c", model)


def test_a_deployment_file_is_refused(tmp_path: Path, network: Network, bits_of: Bits) -> None:
    save(network(), tmp_path / "c")
    assert_untouched(
        tmp_path / "c", start(network()), "a deployment checkpoint, wanted a training one; read it with", bits_of
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, network: Network, bits_of: Bits, damage: str) -> None:
    run = start(network(), scheduler=lambda_lr)
    run.train()
    run.save(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for place in {"flip": range(11, len(whole), len(whole) // 60), "truncate": [9, 3000, len(whole) - 1], "empty": [0]}[
        damage
    ]:
        flipped = whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]
        (tmp_path / "c").write_bytes(flipped if damage == "flip" else whole[:place])
        before = run.everything(bits_of)
        with pytest.raises(CheckpointError, match="damaged|empty|version"):
            run.load(tmp_path / "c")
        assert run.everything(bits_of) == before


@pytest.mark.parametrize("culprit", ["module", "optimizer", "scheduler", "generator"])
@pytest.mark.parametrize("error", [RuntimeError("not today"), KeyboardInterrupt()], ids=type)
def test_whatever_fails_half_way_leaves_no_half(
    tmp_path: Path,
    network: Network,
    bits_of: Bits,
    monkeypatch: pytest.MonkeyPatch,
    culprit: str,
    error: BaseException,
) -> None:
    def then_fail(function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            monkeypatch.undo()
            raise error

        return failing

    run = start(network(), OPTIMIZERS["AdamW"], SCHEDULERS["SequentialLR"])
    run.train()
    run.save(tmp_path / "c")
    other = start(network(seed=1), OPTIMIZERS["AdamW"], SCHEDULERS["SequentialLR"])
    other.train(5)
    before, objects = other.everything(bits_of), [id(p) for p in other.model.parameters()]
    target, name = {
        "module": (nn.Linear, "_load_from_state_dict"),
        "optimizer": (torch.optim.AdamW, "load_state_dict"),
        "scheduler": (lr_scheduler.SequentialLR, "load_state_dict"),
        "generator": (np.random, "set_state"),
    }[culprit]
    monkeypatch.setattr(target, name, then_fail(getattr(target, name)))
    wanted, message = (
        CheckpointError,
        "do not take it .RuntimeError: not today.; make them as they were saved. Nothing was",
    )
    if isinstance(error, KeyboardInterrupt):
        wanted, message = KeyboardInterrupt, "^$"  # type: ignore[assignment]
    with pytest.raises(wanted, match=message):
        other.load(tmp_path / "c")
    assert other.everything(bits_of) == before
    assert [id(p) for p in other.model.parameters()] == objects
    other.train(1)  # nothing is left in pieces


def test_all_of_a_run_is_in_the_file(tmp_path: Path, network: Network) -> None:
    """A list of what resuming needs: one that is forgotten would show as a missing name."""
    run = start(network(learn_scale=True), OPTIMIZERS["DiodeMix fp16"])
    run.train()
    run.save(tmp_path / "c")
    names = set(load_file(tmp_path / "c"))
    weights = itertools.product((0, 4, 5), ("packed", "scale", "residual", "scale_moments"))
    assert {f"model.{index}.weight.{part}" for index, part in weights} <= names
    assert {f"optimizer.state.{i}.{part}" for i in range(11) for part in ("step", "exp_avg_s", "exp_avg_l")} <= names
    assert {"model.1.running_var", "model.0.activation.initial_scale", "rng.torch", "rng.numpy.state.key"} <= names
