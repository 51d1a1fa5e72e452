"""``bitorch-engine train``: its options, and what they make of a new run or of one that goes on."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bitorch_engine.cli.errors import UsageError
from bitorch_engine.cli.replica import join
from bitorch_engine.cli.run import begin, go_on
from bitorch_engine.cli.run_folder import RunFolder, Settings
from bitorch_engine.cli.training import Recipe

BITS = click.IntRange(1, 8)
COUNT = click.IntRange(1)
RATE = click.FloatRange(0, min_open=True)
DEFAULT = Recipe()


@click.command("train", context_settings={"show_default": True})
@click.option(
    "--data", default="digits", help="digits, a folder with a subfolder of images per class, or an .npz file."
)
@click.option("--image-size", type=COUNT, help="Cut and scale a folder's images to this square.")
@click.option("--model", default="cnn", help="cnn, resnet, or package.module:callable of in_channels and num_classes.")
@click.option("--w-bit", type=BITS, default=4, help="Bits of the weights of convolutions and linear layers.")
@click.option("--a-bit", type=BITS, help="Bits of what these layers take in; float if not given.")
@click.option("--g-bit", type=click.IntRange(2, 8), help="Bits of gradients in these layers; float if not given.")
@click.option("--first-w-bit", type=BITS, help="Bits of the first layer's weights.  [default: w-bit, at least 4]")
@click.option("--learn-scale", is_flag=True, help="Train the weights' scales too; for models without BatchNorm.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave layers of this name in float; repeatable.")
@click.option("--epochs", type=COUNT, default=DEFAULT.epochs, help="Passes over the training images.")
@click.option("--batch-size", type=COUNT, default=DEFAULT.batch_size, help="Images of a step, over all processes.")
@click.option("--lr", type=RATE, default=DEFAULT.lr, help="Learning rate of packed weights; falls to 0.")
@click.option("--float-lr", type=RATE, default=DEFAULT.float_lr, help="Learning rate of all other parameters.")
@click.option(
    "--memory",
    type=click.Choice(["fp32", "bf16", "fp16", "8bit", "channel"]),
    default=DEFAULT.memory,
    help="How the optimizer keeps its moments of packed weights; channel takes the least.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=DEFAULT.seed,
    help="Of the first weights and of everything that is drawn.",
)
@click.option("--augment/--no-augment", default=DEFAULT.augment, help="Warp training images, and add noise.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: a new one in runs/]")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in --out.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with the run in this folder.")
@click.pass_context
def command(
    ctx: click.Context, /, device: str, out: Path | None, overwrite: bool, resume: Path | None, **options: Any
) -> None:
    """Train a network whose weights are stored in a few bits, while it learns too.

    Ctrl-C saves the run and says how to go on. Under torchrun, several processes train one model.
    """
    if resume is not None:
        _refuse_changes(ctx)
    replica = join(device)
    try:
        if resume is not None:
            exit_code = go_on(RunFolder(resume), replica)
        else:
            settings = _settings(**options)
            # Other processes write nothing; to them the folder may look taken, by the first one.
            folder = RunFolder.choose(out, settings, overwrite=overwrite) if replica.leads else RunFolder(out or Path())
            exit_code = begin(folder, settings, replica)
    finally:
        replica.close()
    ctx.exit(exit_code)


def _settings(*, w_bit: int, first_w_bit: int | None, skip: tuple[str, ...], **options: Any) -> Settings:
    """Settings of the options, the recipe's among them."""
    recipe = Recipe(**{name: options.pop(name) for name in vars(DEFAULT)})
    return Settings(w_bit=w_bit, first_w_bit=first_w_bit or max(4, w_bit), skip=skip, recipe=recipe, **options)


def _refuse_changes(ctx: click.Context) -> None:
    """Raise UsageError where an option is given that would make a resumed run another one."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("resume", "device"):
            option = parameter.opts[0]
            raise UsageError(
                f"a resumed run keeps its settings; leave {option} out, or start a new run without --resume."
            )
