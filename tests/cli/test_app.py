"""The program as a script sees it: quick help, versions, exit codes, one line for each error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import bitorch_engine
from bitorch_engine.cli import errors
from bitorch_engine.cli.app import COMMANDS, app
from bitorch_engine.cli.errors import RunError, optional


def test_help_lists_all_commands_and_loads_none(environment: dict[str, str]) -> None:
    code = "import sys; from bitorch_engine.cli.app import app; app(['-h'], standalone_mode=False); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in run.stdout for name in COMMANDS)
    loaded = run.stdout.splitlines()[-1].split()
    assert not {"matplotlib", "sklearn", "PIL", "bitorch_engine.cli.training"} & set(loaded)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "Options:" in result.output


def test_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"bitorch-engine, version {bitorch_engine.__version__}\n"


def test_info_names_versions_and_devices() -> None:
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)
    assert facts["torch"] == torch.__version__
    assert facts["bitorch_engine"] == bitorch_engine.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert "cpu" in facts["devices"]
    assert facts["backends"][0] == "reference"
    assert torch.__version__ in CliRunner().invoke(app, ["info"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["train", "--w-bit", "9"], "9 is not in the range 1<=x<=8"),
        (["train", "--lr", "0"], "0.0 is not in the range x>0"),
        (["train", "--memory", "4bit"], "'4bit' is not one of"),
        (["train", "--data", "nowhere"], "Error: data must be 'digits', a folder"),
        (["train", "--model", "vgg"], "Error: model must be cnn, resnet or package.module:callable, got vgg"),
        (["train", "--device", "tpu"], "Error: cannot compute on the device tpu"),
        (["train", "--skip", "tail"], "Error: cnn cannot be converted as asked: 'tail' matches no layer"),
        (["train", "--skip", "conv*"], "Error: no layer of cnn is left to convert"),
        (["train", "--resume", "nowhere"], "Error: nowhere is not the folder of a run"),
        (["train", "--resume", "run", "--lr", "1"], "Error: a resumed run keeps its settings; leave --lr out"),
        (["train", "--resume", "run", "--no-augment"], "leave --augment out"),
        (["eval", "nowhere"], "Error: nowhere does not exist"),
        (["inspect", "nowhere"], "Error: nowhere does not exist"),
    ],
)
def test_what_cannot_be_asked_for_exits_with_2_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="sklearn")

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(RunError, match=r"needs sklearn.*pip install 'bitorch_engine\[train\]'"):
        optional("sklearn.datasets")
    with pytest.raises(ModuleNotFoundError):
        optional("matplotlib.figure")  # is there, but something that it needs is not


@pytest.mark.parametrize("started", ["as a module", "as the program", "as another program"])
@pytest.mark.parametrize(("variable", "value"), [("BACKEND", "fpga"), ("LIBRARY", "/nowhere.so")])
def test_an_environment_that_cannot_be_had_ends_the_command_line_alone_in_one_line(
    tmp_path: Path, environment: dict[str, str], started: str, variable: str, value: str
) -> None:
    program = tmp_path / ("bitorch-engine" if started == "as the program" else "train.py")
    program.write_text("from bitorch_engine.cli import main\nmain()")
    start = ["-m", "bitorch_engine.cli"] if started == "as a module" else [str(program)]
    environment[f"BITORCH_ENGINE_{variable}"] = value
    run = subprocess.run([sys.executable, *start, "info"], env=environment, capture_output=True, text=True)
    *before, error = run.stderr.splitlines()
    if started == "as another program":
        assert error.startswith(f"RuntimeError: BITORCH_ENGINE_{variable}") and run.returncode == 1
    else:
        assert error.startswith(f"Error: BITORCH_ENGINE_{variable}") and value in error and run.returncode == 2
        assert (before, run.stdout) == ([], "")
