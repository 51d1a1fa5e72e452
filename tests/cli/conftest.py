"""A tiny data set that a few steps learn, and a model for it."""

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

TINY_MODEL = """
from torch import nn
def net(in_channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with tiny.npz (60 training and 15 test images of 3 classes) and tiny_model.py."""
    generator = np.random.default_rng(0)
    labels = np.arange(75) % 3
    images = generator.random((75, 6, 6)).astype(np.float32) * 0.3
    images[labels == 1, ::2] += 0.7  # stripes one way, or the other, or none
    images[labels == 2, :, ::2] += 0.7
    np.savez(tmp_path / "tiny.npz", x_train=images[:60], y_train=labels[:60], x_test=images[60:], y_test=labels[60:])
    (tmp_path / "tiny_model.py").write_text(TINY_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "tiny_model", raising=False)
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a process that runs the program from the source tree, on one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
