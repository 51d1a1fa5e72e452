"""The built-in networks have the stated shape; a callable of the user's is imported, tried and checked."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bitorch_engine.cli.errors import UsageError
from bitorch_engine.cli.models import build_model


def test_the_cnn_has_the_weights_that_the_published_figures_are_for() -> None:
    model = build_model("cnn", (1, 8, 8), 10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in convolutions] == [(32, 1, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)]
    assert sum(conv.weight.numel() for conv in convolutions) == 55_584


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 17)])
def test_built_in_models_take_any_image(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(name, shape, 7)
    assert model.training
    assert model(torch.randn(2, *shape)).shape == (2, 7)


USER_CODE = """
from torch import nn
def net(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def wrong_output(in_channels, num_classes): return nn.Conv2d(in_channels, num_classes, 3)
def wrong_input(in_channels, num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(5, num_classes))
def no_arguments(): return nn.ReLU()
def no_module(in_channels, num_classes): return 3
number = 5
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_nets.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_nets", raising=False)


@pytest.mark.usefixtures("user_module")
def test_a_callable_from_the_current_folder_is_used() -> None:
    assert build_model("user_nets:net", (3, 8, 8), 4)(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "must be cnn, resnet or package.module:callable, got vgg"),
        ("missing_package:net", "cannot be imported: No module named"),
        ("user_nets:missing", "cannot be imported: .*no attribute"),
        ("user_nets:number", "must be callable, got int"),
        ("user_nets:no_arguments", "must accept in_channels= and num_classes="),
        ("user_nets:no_module", "must return a torch.nn.Module, got int"),
        ("user_nets:wrong_output", r"must return \(N, 10\), got \(1, 10, 6, 6\)"),
        ("user_nets:wrong_input", r"cannot take images of shape \(1, 8, 8\)"),
    ],
)
def test_models_that_do_not_fit_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, (1, 8, 8), 10)
