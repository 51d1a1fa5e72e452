"""What can go wrong for a user: shown as one clear line, with an exit code for scripts."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType


class UsageError(ValueError):
    """What was asked for cannot be done as asked (bad data, unknown model, a folder in the way): exit code 2."""


class RunError(RuntimeError):
    """What was asked for correctly did not succeed (loss not finite, damaged file, missing package): exit code 1."""


def end_command_line(error: Exception) -> None:
    """Show an error of importing ``bitorch_engine``, which comes before any command, and end the process with exit code
    2; where the process is not the command line, do nothing."""
    program = Path(*sys.argv[:1]).name
    as_module = program == "-m" and "bitorch_engine.cli" in sys.orig_argv
    if as_module or re.fullmatch(r"bitorch-engine(\.exe|-script\.pyw?)?", program):
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def optional(module: str) -> ModuleType:
    """The named module of an optional package. Raises RunError that says how to install it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise RunError(f"this needs {package}, which is not installed: pip install 'bitorch_engine[train]'") from None
