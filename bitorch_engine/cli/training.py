"""The training loop: a converted model and its data, step by step, so that it can stop anywhere and go on exactly."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_engine import ops
from bitorch_engine.checkpoint import load_training, save_training
from bitorch_engine.cli.augment import Augmentation
from bitorch_engine.cli.data import ImageData, as_float
from bitorch_engine.cli.errors import RunError, UsageError
from bitorch_engine.cli.replica import Replica
from bitorch_engine.optim import DiodeMix
from bitorch_engine.parameters import PackedParameter


@dataclass(frozen=True)
class Recipe:
    """How to train: with model and data, everything that decides the result."""

    epochs: int = 30
    batch_size: int = 64
    """Images of one step, over all processes."""
    lr: float = 1e-2
    """Of packed weights. Both learning rates fall to 0 along a cosine."""
    float_lr: float = 3e-3
    """Of all other parameters."""
    memory: str = "8bit"
    """What the optimizer keeps of packed weights (``DiodeMix``)."""
    seed: int = 0
    augment: bool = True


@dataclass
class Progress:
    """Where a run stands: epochs done, steps done of the one under way, and what these steps added up to."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    packed: list[Tensor] = field(default_factory=list)
    """The packed weights as they were at the start of the epoch under way."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: a line of metrics.jsonl. Loss and train_accuracy are averages over its augmented batches."""

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float
    """Share of the test images that are classified correctly."""
    flipped: float
    """Share of the packed weights whose code at the end of the epoch is another one than at its start."""
    lr: float
    """Of packed weights, at the end of the epoch."""
    seconds: float


def packed_parameters(model: nn.Module) -> list[PackedParameter]:
    """The parameters that are stored as codes."""
    return [parameter for parameter in model.parameters() if isinstance(parameter, PackedParameter)]


def make_optimizer(model: nn.Module, recipe: Recipe) -> DiodeMix:
    """DiodeMix with packed weights and float parameters in groups of their own."""
    packed = packed_parameters(model)
    others = [parameter for parameter in model.parameters() if not isinstance(parameter, PackedParameter)]
    groups = [{"params": packed, "lr": recipe.lr}, {"params": others, "lr": recipe.float_lr}]
    return DiodeMix([group for group in groups if group["params"]], lr=recipe.lr, memory=recipe.memory)


class Trainer:
    """Trains ``model`` on ``data``; stopped after any step and resumed, it gives bit for bit the same model.

    model: lies on ``replica.device``.  optimizer: ``make_optimizer``'s, unless another one is given.
    Every random choice is drawn from (seed, epoch, step, rank), so that nothing depends on what was drawn before.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        replica: Replica,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.data, self.recipe, self.replica = model, data, recipe, replica
        self.optimizer = optimizer or make_optimizer(model, recipe)
        self.batch_size = min(recipe.batch_size, len(data.train_labels)) // replica.world * replica.world
        if self.batch_size == 0:
            raise UsageError(f"{recipe.batch_size} images cannot be shared by {replica.world} processes; choose more.")
        self.steps_per_epoch = len(data.train_labels) // self.batch_size
        total = self.steps_per_epoch * recipe.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total))
        )
        self.progress = Progress()
        self._replicated = replica.wrap(model)
        self._augmentation = Augmentation()
        self._advice = f"choose a lower --lr (={recipe.lr:g}) or --float-lr (={recipe.float_lr:g})"

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.progress.epoch >= self.recipe.epochs

    def train_epoch(
        self, *, on_step: Callable[[Progress], None] = lambda _: None, stop: Callable[[], bool] = lambda: False
    ) -> Epoch | None:
        """Do the epoch under way from where it stands, and return what it gave; None where ``stop`` asked to leave it.

        Raises RunError, before that step has changed a parameter, where loss or gradient is not finite.
        """
        started, progress = time.perf_counter(), self.progress
        if progress.step == 0:
            progress.packed = [parameter.packed.clone() for parameter in packed_parameters(self.model)]
        order = torch.randperm(len(self.data.train_labels), generator=self._generator(progress.epoch))
        while progress.step < self.steps_per_epoch:
            if any(self.replica.sum(stop())):
                return None
            first = progress.step * self.batch_size
            loss, correct = self._step(order[first : first + self.batch_size])
            progress.step += 1
            progress.loss += loss
            progress.correct += correct
            on_step(progress)
        epoch = Epoch(
            epoch=progress.epoch + 1,
            loss=progress.loss / progress.step,
            train_accuracy=progress.correct / (progress.step * self.batch_size),
            accuracy=self._test_accuracy(),
            flipped=self._share_flipped(),
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )
        self.progress = Progress(epoch=progress.epoch + 1)
        return epoch

    def save(self, path: Path) -> None:
        """Write a checkpoint from which ``resume`` goes on exactly; an earlier one is replaced in one step."""
        save_training(path, self.model, self.optimizer, self.schedule, progress=asdict(self.progress))

    def resume(self, path: Path) -> None:
        """Go on from where ``save`` was called."""
        self.progress = Progress(**load_training(path, self.model, self.optimizer, self.schedule))

    def _step(self, index: Tensor) -> tuple[float, float]:
        """One step on the images at ``index``; their mean loss and the number classified correctly."""
        device, mine = self.replica.device, self.replica.shard(index)
        generator = self._generator(self.progress.epoch, self.progress.step, self.replica.rank)
        torch.manual_seed(generator.initial_seed())  # for dropout and the like
        images = as_float(self.data.train_images[mine].to(device))
        labels = self.data.train_labels[mine].to(device)
        if self.recipe.augment:
            images = self._augmentation(images, generator)
        output = self._replicated.train()(images)
        loss = F.cross_entropy(output, labels)
        correct = (output.argmax(1) == labels).sum()
        mean_loss, total_correct = self.replica.sum(loss.item() / self.replica.world, correct.item())
        if not math.isfinite(mean_loss):
            raise RunError(f"the loss became {mean_loss}; {self._advice}")
        self.optimizer.zero_grad()
        loss.backward()
        try:
            self.optimizer.step()
        except ValueError as error:  # a gradient that is not finite; nothing has changed
            raise RunError(f"{str(error).rstrip('.')}; {self._advice}") from error
        self.schedule.step()
        return mean_loss, total_correct

    def _generator(self, *key: int) -> torch.Generator:
        """A generator for this seed and key, unrelated to that of any other."""
        digest = blake2b(repr((self.recipe.seed, *key)).encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def _share_flipped(self) -> float:
        flips, packed = 0, packed_parameters(self.model)
        for parameter, before in zip(packed, self.progress.packed, strict=True):
            index = ops.unpack(before.to(parameter.device), parameter.w_bit, parameter.numel())
            flips += int((index != ops.unpack(parameter.packed, parameter.w_bit, parameter.numel())).sum())
        return flips / max(1, sum(parameter.numel() for parameter in packed))

    def _test_accuracy(self) -> float:
        """The first process's test accuracy: BatchNorm's running averages are its own."""
        own = accuracy(self.model, self.data.test_images, self.data.test_labels) if self.replica.leads else 0.0
        return self.replica.sum(own)[0]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of the images that the model, in evaluation mode, gives their label."""
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    for some, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        correct += int((model(as_float(some.to(device))).argmax(1).cpu() == wanted).sum())
    return correct / len(labels)
