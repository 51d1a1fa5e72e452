"""Where the GPU's kernels are tested: on a GPU if there is one, otherwise in Triton's interpreter."""

import importlib.util

import pytest
import torch

# Triton has wheels for Linux alone.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
