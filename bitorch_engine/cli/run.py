"""The course of a run: from settings through the epochs to its pictures and its page."""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bitorch_engine.cli.data import load_data
from bitorch_engine.cli.display import Display
from bitorch_engine.cli.errors import RunError
from bitorch_engine.cli.interrupt import Interrupt
from bitorch_engine.cli.layers import layer_rows
from bitorch_engine.cli.models import build_model
from bitorch_engine.cli.plots import draw_curves, draw_weights
from bitorch_engine.cli.replica import Replica
from bitorch_engine.cli.report import write_report
from bitorch_engine.cli.result import Result, float_file_bytes, measure
from bitorch_engine.cli.run_folder import RunFolder, Settings
from bitorch_engine.cli.stored_model import convert, store
from bitorch_engine.cli.training import Trainer

SMALL_STEP = 1_000_000_000
"""Multiply-adds of a step, forward only. The default one has 0.06e9 (digits, CNN, 64 images)."""

LEARNING = (
    "Codes changed: the share of the packed weights whose code at the end of the epoch is another one than at its "
    "start. Training images are warped anew at each step, unless --no-augment was given, so that their accuracy may "
    "be lower than that of the test images, which are not."
)


def begin(folder: RunFolder, settings: Settings, replica: Replica) -> int:
    """Do a new run and fill the folder. The exit code: 0, or that of the signal that stopped it."""
    trainer, float_bytes = _prepare(settings, replica)
    if replica.leads:
        folder.begin(settings)
        trainer.save(folder.checkpoint)
    return _train(trainer, folder, settings, float_bytes)


def go_on(folder: RunFolder, replica: Replica) -> int:
    """Go on with a run from its checkpoint; the exit code as ``begin``'s."""
    settings = folder.read_settings()
    trainer, float_bytes = _prepare(settings, replica)
    trainer.resume(folder.checkpoint)
    if replica.leads:
        folder.keep_epochs(trainer.progress.epoch)
    return _train(trainer, folder, settings, float_bytes)


def _prepare(settings: Settings, replica: Replica) -> tuple[Trainer, int]:
    """Data and converted model, ready for the first step, and the size of the model's float file."""
    data = load_data(settings.data, settings.image_size)
    torch.manual_seed(settings.recipe.seed)
    model = build_model(settings.model, data.input_shape, len(data.classes))
    float_bytes = float_file_bytes(model)
    _choose_threads(sum(row.macs for row in layer_rows(model, data.input_shape)) * settings.recipe.batch_size)
    convert(model, settings)
    return Trainer(model.to(replica.device), data, settings.recipe, replica), float_bytes


def _choose_threads(multiply_adds: int) -> None:
    """Let a step of little work run on one thread, unless the user has chosen: several wait for each other longer than
    they compute, and on a busy computer up to thirty times as long."""
    if multiply_adds < SMALL_STEP and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _train(trainer: Trainer, folder: RunFolder, settings: Settings, float_bytes: int) -> int:
    """Do the epochs that are left, and write what a run leaves behind. Only the leading process writes and shows."""
    replica, data = trainer.replica, trainer.data
    console = Console(quiet=not replica.leads, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{settings.title}: {len(data.train_labels)} images to train on, {len(data.test_labels)} to test on, "
        f"{len(data.classes)} classes, on {replica.world} x {replica.device.type}, into {folder.path}"
    )
    display = Display(console, settings.recipe.epochs, trainer.steps_per_epoch, trainer.progress)
    with display, Interrupt(patient=replica.world > 1) as interrupt:
        while not trainer.finished:
            try:
                epoch = trainer.train_epoch(on_step=display.step, stop=interrupt)
            except RunError as error:
                if not replica.leads:
                    raise
                done = trainer.progress.epoch
                raise RunError(f"{error}; {folder.checkpoint} holds the run after {done} epochs.") from None
            if epoch is not None and replica.leads:
                display.epoch(epoch)
                folder.append(epoch)
                store(folder.model, trainer.model, settings, data)
            if replica.leads:
                trainer.save(folder.checkpoint)
            if epoch is None:
                break
    if not trainer.finished:
        console.print(f"Interrupted, and saved. To go on:\n{_command_to_resume(folder, replica)}")
        return interrupt.exit_code
    if replica.leads:
        result = measure(trainer.model, trainer.optimizer, folder.epochs(), folder.model, float_bytes)
        _write_pages(trainer, folder, settings, result)
        console.print(_result_table(result), f"Report: {folder.report}")
    return 0


def _write_pages(trainer: Trainer, folder: RunFolder, settings: Settings, result: Result) -> None:
    rows = layer_rows(trainer.model, trainer.data.input_shape)
    draw_curves(folder.epochs(), folder.curves)
    draw_weights(rows, folder.weights)
    options = asdict(settings)
    options |= options.pop("recipe") | {"skip": ", ".join(settings.skip) or None}
    listed = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, value in options.items()
        if value is not None and value is not False
    ]
    pictures = [
        ("Learning", LEARNING, folder.curves),
        ("Use of the codes, layer by layer", "The share of a layer's weights that have each code.", folder.weights),
    ]
    write_report(folder.report, settings.title, result, rows, listed, pictures)


def _result_table(result: Result) -> Table:
    table = Table("", "this run", "float32 with AdamW")
    for row in result.rows():
        table.add_row(*row)
    return table


def _command_to_resume(folder: RunFolder, replica: Replica) -> str:
    """The line to type, which starts the program as it was started."""
    arguments = ["train", "--resume", str(folder.path)]
    if replica.world > 1:
        count = os.environ.get("LOCAL_WORLD_SIZE", str(replica.world))
        return shlex.join(["torchrun", "--nproc_per_node", count, "-m", "bitorch_engine.cli", *arguments])
    if Path(sys.argv[0]).name == "__main__.py":
        return shlex.join([sys.executable, "-m", "bitorch_engine.cli", *arguments])
    return shlex.join([sys.argv[0], *arguments])
