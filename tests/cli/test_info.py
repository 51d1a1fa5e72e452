"""``bitorch-engine info`` says which kernels are in use, and why."""

import json

import pytest
import torch
from click.testing import CliRunner

from bitorch_engine.cli import info
from bitorch_engine.cli.app import app
from bitorch_engine.ops import cpu

compiled = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")


def facts() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)
    return found


@compiled
def test_each_kernel_is_listed_with_the_instruction_set_in_use() -> None:
    best = cpu.available_isas()[-1]
    found = facts()
    assert found["instruction set"] == f"{cpu.current_isa()}, the best that this processor has and the kernels know"
    assert set(found["kernels"]) == set(cpu.kernels())
    assert found["backends"] == ["reference", "cpu"]
    assert {found["ops"]["pack"], found["ops"]["conv"]} == {"kernels"}
    with cpu.cap_isa("scalar"):
        capped = facts()
    assert all(used.startswith("scalar of scalar") for used in capped["kernels"].values())
    if best != "scalar":
        assert capped["instruction set"] == f"scalar, capped by BITORCH_ENGINE_CPU; without it {best}"


@compiled
def test_calls_without_python_headers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.calls, "CALLS", None)
    assert "headers" in str(facts()["layers' calls"])


@compiled
def test_the_reference_is_named_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITORCH_ENGINE_BACKEND", "reference")
    found = facts()
    assert found["instruction set"].endswith("plain PyTorch: BITORCH_ENGINE_BACKEND=reference")
    assert set(found["ops"].values()) == {"plain PyTorch"}


def test_a_library_that_is_not_there_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.cpu, "why_not_loaded", lambda: "the library does not load: no such wind.")
    found = facts()
    assert found["instruction set"] == (
        "none, everything runs in plain PyTorch: the library does not load: no such wind."
    )
    assert (found["kernels"], found["backends"]) == ({}, ["reference"])
    assert "no such wind" in CliRunner().invoke(app, ["info"]).output


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_without_a_gpu_its_kernels_are_none_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts()
    assert found["GPU kernels"] == "none: torch finds no CUDA device"
    assert found["GPU ops"] == {}
    monkeypatch.setenv("BITORCH_ENGINE_BACKEND", "reference")
    assert facts()["GPU kernels"] == "none: BITORCH_ENGINE_BACKEND=reference"


def test_on_a_gpu_each_op_is_listed_with_what_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H200")
    monkeypatch.setattr(info.triton, "why_not_available", lambda: "")
    found = facts()
    assert found["devices"][1] == "cuda:0 H200"  # type: ignore[index]
    assert "triton" in found["backends"]
    assert found["GPU kernels"].startswith("Triton ")  # type: ignore[attr-defined]
    assert found["GPU ops"]["update_"] == "Triton"
    monkeypatch.setattr(info.triton, "why_not_available", lambda: "Triton is not installed: pip install it")
    found = facts()
    assert found["GPU kernels"] == "none: Triton is not installed: pip install it"
    assert set(found["GPU ops"].values()) == {"plain PyTorch"}
