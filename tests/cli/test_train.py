"""Whole runs: their files, their end in eval and inspect, interruption by a signal, and several processes."""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import bitorch_engine
from bitorch_engine.cli.app import app
from bitorch_engine.cli.run_folder import RunFolder

TINY = ["--data", "tiny.npz", "--model", "tiny_model:net", "--batch-size", "16", "--lr", "0.03"]
PROGRAM = [sys.executable, "-m", "bitorch_engine.cli"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def assert_same_model(first: Path, second: Path) -> None:
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_fills_its_folder_and_can_be_evaluated_and_inspected(tiny: Path) -> None:
    result = call(
        "train", *TINY, "--epochs", "2", "--w-bit", "2", "--a-bit", "4", "--g-bit", "8", "--memory", "channel"
    )
    assert result.exit_code == 0
    folder = RunFolder(Path("runs/tiny-net-w2a4g8"))
    files = {path.name for path in folder.path.iterdir()}
    assert files == {path.name for path in vars(folder).values() if path != folder.path}
    assert "epoch 2/2" in result.output
    assert "training state per packed weight" in result.output

    epochs = folder.epochs()
    assert [epoch.epoch for epoch in epochs] == [1, 2]

    facts = json.loads(call("eval", str(folder.path), "--model", "tiny_model:net", "--json").output)
    assert facts["accuracy"] == epochs[-1].accuracy
    assert facts["images"] == 15
    assert f"accuracy {epochs[-1].accuracy:.2%}" in call("eval", str(folder.model), "--model", "tiny_model:net").output

    layers = json.loads(call("inspect", str(folder.model), "--model", "tiny_model:net", "--json").output)["layers"]
    convs = [layer for layer in layers if layer["kind"] == "nBitConv2d"]
    assert [layer["bits"] for layer in convs] == [4, 2]  # the first convolution keeps 4 bits
    assert [len(layer["histogram"]) for layer in convs] == [16, 4]
    assert [layer["macs"] for layer in convs] == [4 * 9 * 36, 8 * 4 * 9 * 36]


MLP = """
from torch import nn
def mlp(in_channels, num_classes):
    hidden = [nn.Linear(36 * in_channels, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, num_classes))
"""


def test_a_network_of_linear_layers_is_converted_but_for_the_last(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tiny_mlp.py").write_text(MLP)
    monkeypatch.delitem(sys.modules, "tiny_mlp", raising=False)
    model = ["--model", "tiny_mlp:mlp"]
    options = ["--w-bit", "2", "--a-bit", "4", "--g-bit", "8"]
    assert call("train", "--data", "tiny.npz", *model, "--epochs", "2", *options, "--out", "run").exit_code == 0
    accuracy = json.loads(call("eval", "run", *model, "--json").output)["accuracy"]
    assert accuracy == RunFolder(Path("run")).epochs()[-1].accuracy
    layers = json.loads(call("inspect", "run", *model, "--json").output)["layers"]
    linear = [(layer["kind"], layer["bits"], layer["macs"]) for layer in layers if "Linear" in layer["kind"]]
    assert linear == [("nBitLinear", 4, 36 * 16), ("nBitLinear", 2, 16 * 16), ("Linear", 32, 16 * 3)]


def test_a_built_in_model_needs_no_name_to_be_rebuilt(tiny: Path) -> None:
    assert call("train", "--data", "tiny.npz", "--epochs", "1", "--out", "run").exit_code == 0
    assert call("eval", "run").exit_code == 0
    shown = call("inspect", "run").output
    assert "64x64x3x3" in shown
    assert "█" in shown


def test_code_that_a_file_names_is_run_only_when_the_user_names_it(tiny: Path) -> None:
    assert call("train", *TINY, "--epochs", "1", "--out", "run").exit_code == 0
    Path("tiny_model.py").write_text("raise SystemExit('was run')")
    for command in ("eval", "inspect"):
        result = call(command, "run")
        assert result.exit_code == 2
        assert "whose import runs code; pass --model tiny_model:net" in result.output


def test_a_file_that_train_did_not_write_needs_metadata_that_says_what_it_is_of(tiny: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bitorch_engine.quantize_(model)
    Path("other_model.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    bitorch_engine.save(model, "own.safetensors")
    arguments = ["inspect", "own.safetensors", "--model", "other_model:net"]
    for given in (arguments[:2], arguments):
        result = call(*given)
        assert result.exit_code == 1
        assert "Save it with metadata that has model, input_shape, classes, data, image_size; or" in result.output
    card = {"model": "net", "input_shape": [2, 5, 4], "classes": ["a", "b", "c"], "data": "", "image_size": None}
    bitorch_engine.save(model, "own.safetensors", metadata=card)
    (layer,) = json.loads(call(*arguments, "--json").output)["layers"]
    assert (layer["kind"], layer["bits"], layer["macs"]) == ("nBitConv2d", 4, 3 * 2 * 9 * 6)


def test_a_damaged_file_is_one_line_and_exit_code_1(tiny: Path) -> None:
    assert call("train", *TINY, "--epochs", "1", "--out", "run").exit_code == 0
    for name, arguments in (("model.safetensors", ["inspect", "run"]), ("checkpoint", ["train", "--resume", "run"])):
        file = Path("run", name)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        result = call(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ") or "\nError: " in result.output
        assert name in result.output


def test_data_that_does_not_fit_the_model_is_refused(tiny: Path) -> None:
    assert call("train", *TINY, "--epochs", "1", "--out", "run").exit_code == 0
    result = call("eval", "run", "--model", "tiny_model:net", "--data", "digits")
    assert result.exit_code == 2
    assert "is for images of shape (1, 6, 6)" in result.output


def test_images_of_a_folder_are_scaled_for_the_test_as_for_the_training(tiny: Path) -> None:
    for name in ("dark", "light"):
        Path("images", name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (8 + index, 9), (index * 5 + 150 * (name == "light"), 40, 40)).save(
                f"images/{name}/{index}.png"
            )
    options = ["--data", "images", "--image-size", "6", "--model", "tiny_model:net"]
    assert call("train", *options, "--epochs", "1", "--batch-size", "4", "--out", "run").exit_code == 0
    assert call("eval", "run", "--model", "tiny_model:net").exit_code == 0
    assert (
        "is for images of shape (3, 6, 6)"
        in call("eval", "run", "--model", "tiny_model:net", "--data", "digits").output
    )


def test_a_folder_in_use_is_refused_unless_overwritten(tiny: Path) -> None:
    assert call("train", *TINY, "--epochs", "2", "--out", "run").exit_code == 0
    result = call("train", *TINY, "--epochs", "1", "--out", "run")
    assert result.exit_code == 2
    assert "--overwrite" in result.output
    assert call("train", *TINY, "--epochs", "1", "--out", "run", "--overwrite").exit_code == 0
    assert len(RunFolder(Path("run")).epochs()) == 1


def test_a_run_whose_loss_is_not_finite_stops_with_1_and_keeps_its_checkpoint(tiny: Path) -> None:
    result = call("train", *TINY, "--epochs", "3", "--out", "run", "--float-lr", "1e38")
    assert result.exit_code == 1
    assert "choose a lower --lr" in result.output
    assert "run/checkpoint holds the run after" in result.output
    assert Path("run/checkpoint").exists()


def test_ctrl_c_saves_and_the_printed_command_goes_on_to_the_same_result(
    tiny: Path, environment: dict[str, str]
) -> None:
    settings = [*TINY, "--epochs", "20", "--w-bit", "3"]
    program = [*PROGRAM, "train", *settings, "--out", "stopped"]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch  3/20"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 130
    printed = rest.splitlines()[-1]
    assert "Interrupted, and saved. To go on:" in rest
    assert 3 <= len(RunFolder(Path("stopped")).epochs()) < 20
    with RunFolder(Path("stopped")).metrics.open("a") as file:
        file.write("a line that a killed run had begun")
    resumed = subprocess.run(shlex.split(printed), env=environment, capture_output=True, text=True, check=True)
    assert "epoch 20/20" in resumed.stdout

    assert call("train", *settings, "--out", "whole").exit_code == 0
    assert_same_model(Path("stopped"), Path("whole"))
    stopped, whole = ([replace(e, seconds=0) for e in RunFolder(Path(run)).epochs()] for run in ("stopped", "whole"))
    assert stopped == whole


CODES_OF_RANKS = """
import sys, torch, torch.distributed as dist
from bitorch_engine.cli import run, training
class Trainer(training.Trainer):
    def train_epoch(self, **how):
        epoch = super().train_epoch(**how)
        packed = torch.cat([parameter.packed for parameter in training.packed_parameters(self.model)])
        all_packed = [torch.empty_like(packed) for _ in range(2)]
        dist.all_gather(all_packed, packed)
        assert torch.equal(*all_packed), "ranks differ"
        print("ranks agree")
        return epoch
run.Trainer = Trainer
from bitorch_engine.cli import main
main()
"""


def test_two_processes_under_torchrun_keep_the_same_codes_and_one_of_them_writes(
    tiny: Path, environment: dict[str, str]
) -> None:
    Path("ranks.py").write_text(CODES_OF_RANKS)
    arguments = ["train", *TINY, "--epochs", "3", "--a-bit", "4", "--out", "run", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment["PYTHONWARNINGS"] = "default"
    run = subprocess.run(
        [*torchrun, "ranks.py", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ranks agree") == 6
    assert run.stdout.count("epoch 3/3") == 1
    assert len(RunFolder(Path("run")).epochs()) == 3
    assert call("eval", "run", "--model", "tiny_model:net").exit_code == 0
