"""The program's commands, each loaded when it is called, and what becomes of their errors."""

import importlib
from typing import Any

import click

from bitorch_engine import __version__
from bitorch_engine.checkpoint import CheckpointError
from bitorch_engine.cli.errors import RunError, UsageError

COMMANDS = {
    "train": ("bitorch_engine.cli.train", "Train a network whose weights are stored in a few bits."),
    "eval": ("bitorch_engine.cli.evaluate", "Measure the accuracy of a trained model."),
    "inspect": ("bitorch_engine.cli.inspect", "Show what a model file holds, layer by layer."),
    "info": ("bitorch_engine.cli.info", "Show versions, devices, and the kernels in use."),
    "bench": ("bitorch_engine.cli.bench", "Time the kernels on this computer against torch's."),
}


class LazyGroup(click.Group):
    """A group of the commands in COMMANDS. Importing none of them, ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _Refused(str(error)) from None
        except (RunError, CheckpointError) as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.filename is None:  # a closed pipe, for one, which click ends quietly
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}") from None


class _Refused(click.ClickException):
    """Shown as one line, without click's reminder of the usage."""

    exit_code = 2


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bitorch-engine")
def app() -> None:
    """Train and look at neural networks whose weights are stored in 1 to 8 bits."""
