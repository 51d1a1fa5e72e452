"""Which tensors meet the GPU's kernels, as the environment asks, and what is said where there are none."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitorch_engine.ops import triton
from bitorch_engine.ops.library import defined

ROOT = Path(__file__).resolve().parents[3]
no_gpu = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process: which kernels lie over which tensors is decided when bitorch_engine is imported."""
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=os.environ | more, cwd=ROOT, capture_output=True, text=True)


def test_every_kernel_is_one_of_a_defined_op() -> None:
    assert set(triton.IMPLEMENTATIONS) <= set(defined())
    for name, stem in triton.IMPLEMENTATIONS.items():
        found = triton._function(name, stem)
        assert (found.__module__, found.__name__) == (f"bitorch_engine.ops.triton.{stem}", name)


def test_nothing_but_an_op_on_a_gpu_loads_triton() -> None:
    code = """if True:
        import sys, torch
        from bitorch_engine import ops
        ops.pack(torch.zeros(8, dtype=torch.uint8), 3)
        print("triton" in sys.modules, torch.cuda.is_initialized())
    """
    done = run(code, TRITON_INTERPRET="1")
    assert (done.stdout, done.stderr) == ("False False\n", "")


@no_gpu
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITORCH_ENGINE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="BITORCH_ENGINE_BACKEND=triton, but torch finds no CUDA device. TRITON_INT"):
        triton.register()


def test_kernels_that_are_asked_for_without_triton_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITORCH_ENGINE_BACKEND", "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="BITORCH_ENGINE_BACKEND=triton, but Triton is not installed: pip install '"):
        triton.register()


def test_without_triton_a_gpu_runs_the_reference_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(triton, "_warned", False)
    pack, unpack = (triton._on_its_device(name, "bits") for name in ("pack", "unpack"))
    values = torch.arange(8, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="runs in plain PyTorch on this GPU, slowly. Triton is not installed: "):
        packed = pack(values, 3)
    assert torch.equal(unpack(packed, 3, 8), values)
    for name, stem in triton.IMPLEMENTATIONS.items():
        assert triton._function(name, stem).__module__.startswith("bitorch_engine.ops.reference."), name


NETWORK = """if True:
    import sys, torch, torch.nn.functional as F, bitorch_engine as be
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        be.nBitConv2d(3, 4, 3, padding=1, w_bit=3, a_bit=8, g_bit=8), torch.nn.ReLU(), torch.nn.Flatten(),
        be.nBitLinear(100, 3, w_bit=4),
    )
    optimizer = be.optim.DiodeMix(model.parameters(), lr=1e-2)
    x = torch.randn(2, 3, 5, 5)
    for step in range(2):
        optimizer.zero_grad()
        (model(x).square().sum()).backward()
        optimizer.step()
    print(model[0].weight.codes.flatten().tolist(), model[3].weight.codes.flatten().tolist())
"""


@no_gpu
def test_a_network_learns_the_same_codes_in_the_interpreter() -> None:
    loaded = NETWORK + "    print('bitorch_engine.ops.triton.bits' in sys.modules)\n"
    done = run(loaded, BITORCH_ENGINE_BACKEND="triton", TRITON_INTERPRET="1")
    with contextlib.redirect_stdout(io.StringIO()) as ours:
        exec(NETWORK, {})
    assert (done.stdout, done.stderr) == (ours.getvalue() + "True\n", "")
