"""Every kernel is compiled for a GPU, ptxas included, where there is none too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitorch_engine.ops import triton

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    more["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, str(program)], env=os.environ | more, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def test_every_kernel_compiles(launches: list[dict[str, Any]]) -> None:
    stems = ("bits", "activation", "gradient", "update")
    source = "".join(Path(triton.__file__).with_name(f"{stem}.py").read_text(encoding="utf-8") for stem in stems)
    launched = re.findall(r"\b_?(\w+)\[_?grid\b.*?\]\(", source, flags=re.MULTILINE)
    assert set(launched) == {launch["kernel"] for launch in launches}, "compile_kernels.py must call each"


def test_what_is_rounded_by_the_reference_is_neither_fused_nor_flushed(launches: list[dict[str, Any]]) -> None:
    exact = [launch for launch in launches if launch["kernel"] in ("update", "advance_rows", "quantize", "round")]
    assert len(exact) >= 8
    assert [launch for launch in exact if launch["fused"] or launch["flushes"]] == []


def test_nothing_is_compiled_anew_for_another_rate_or_step(launches: list[dict[str, Any]]) -> None:
    steps = [launch["number"] for launch in launches if launch["kernel"] == "update"]
    assert steps[::2] == steps[1::2] and len(set(steps)) == 3
