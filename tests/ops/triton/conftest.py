"""Where the GPU's kernels are tested: on a GPU if there is one, otherwise in Triton's interpreter."""

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Triton has wheels for Linux alone.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """Infinities are no news on a GPU; numpy, with which the interpreter computes, would warn of them."""
    with np.errstate(all="ignore"):
        yield
