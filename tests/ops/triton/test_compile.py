"""Every kernel is compiled for a GPU, ptxas included, where there is none too."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bitorch_engine.ops import triton

of_its_triton = pytest.mark.skipif(
    not version("triton").startswith("3.6."), reason="looks at the machine code of Triton 3.6"
)

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
    source = "".join(path.read_text(encoding="utf-8") for path in Path(triton.__file__).parent.glob("*.py"))
    launched = re.findall(r"\b_?(\w+)\[_?grid\b.*?\]\(", source, flags=re.MULTILINE)
    assert set(launched) == {launch["kernel"] for launch in launches}, "compile_kernels.py must call each"


def test_what_is_rounded_by_the_reference_is_neither_fused_nor_flushed(launches: list[dict[str, Any]]) -> None:
    names = {"update", "mean_squares", "quantize", "values", "round", "convolve", "convolve_directly"}
    exact = [launch for launch in launches if launch["kernel"] in names]
    assert {launch["kernel"] for launch in exact} == names
    assert [launch for launch in exact if launch["fused"] or launch["flushes"]] == []


def test_nothing_is_compiled_anew_for_another_rate_or_step(launches: list[dict[str, Any]]) -> None:
    steps = [launch["number"] for launch in launches if launch["kernel"] == "update"]
    assert steps[::2] == steps[1::2] and len(set(steps)) == 3


PRODUCTS = {
    "conv": ("convolve", "s32.s8.s8"),
    "conv of few channels": ("convolve", "s32.s8.s8"),
    "conv of odd channels": ("convolve", "s32.s8.s8"),
    "conv of one tap": ("convolve", "s32.s8.s8"),
    "conv of codes": ("convolve", "s32.s8.s8"),
    "grad input": ("convolve", "s32.s8.s8"),
    "grad weight": ("sum_products", "f32.f16.f16"),
    "grad weight of few channels": ("sum_products", "f32.f16.f16"),
    "linear": ("multiply", "f32.bf16.bf16"),
    "linear in groups": ("multiply", "f32.bf16.bf16"),
}


@of_its_triton
@pytest.mark.parametrize("part", PRODUCTS)
def test_matrix_products_are_those_of_the_tensor_cores(part: str, launches: list[dict[str, Any]]) -> None:
    kernel, types = PRODUCTS[part]
    found = [launch for launch in launches if (launch["part"], launch["kernel"]) == (part, kernel)]
    assert found
    assert all(launch["products"] == [types] for launch in found)
    if kernel == "convolve":  # tiles come in words, and while others are multiplied
        assert all(launch["fetches asynchronously"] and not launch["loads single bytes"] for launch in found)


@of_its_triton
def test_no_product_spills_registers(launches: list[dict[str, Any]]) -> None:
    assert [(launch["part"], launch["kernel"]) for launch in launches if launch["part"] and launch["stack"]] == []
