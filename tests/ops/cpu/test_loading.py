"""Which library and instruction set are used, as the environment asks, and what is said where that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitorch_engine.ops import cpu
from bitorch_engine.ops.cpu import loading

ROOT = Path(__file__).resolve().parents[3]
compiled = pytest.mark.skipif(not cpu.available_isas(), reason="the kernels are not compiled")

LAYER = """
import torch, bitorch_engine
from bitorch_engine.ops import cpu
torch.manual_seed(0)
layer = bitorch_engine.nBitConv2d(5, 6, 3, padding=1, w_bit=3, a_bit=8)
print(cpu.current_isa() if cpu.available_isas() else "none", layer(torch.ones(2, 5, 4, 4)).double().sum().item())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, away from the source tree: the environment is read when the library loads.

    Without ``site`` no editable installation puts itself before PYTHONPATH.
    """
    ruled = (
        "BITORCH_ENGINE_BACKEND",
        "BITORCH_ENGINE_CPU",
    )  # not BITORCH_ENGINE_LIBRARY: `make sanitize` names its own
    ours = {name: value for name, value in os.environ.items() if name not in ruled}
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    more["PYTHONPATH"] += os.pathsep + str(Path(torch.__file__).parents[1])
    command = [sys.executable, "-S", "-W", "error", "-c", code]
    return subprocess.run(command, env=ours | more, cwd=Path(__file__).parent, capture_output=True, text=True)


def test_every_backend_and_every_cap_gives_the_same_result() -> None:
    reference = run(LAYER, BITORCH_ENGINE_BACKEND="reference")
    assert reference.returncode == 0, reference.stderr
    expected = reference.stdout.split()[1]
    settings = [{"BITORCH_ENGINE_CPU": isa} for isa in cpu.available_isas()]
    settings += [{"BITORCH_ENGINE_BACKEND": "cpu"}] if settings else []
    for setting in settings:
        done = run(LAYER, **setting)
        assert done.returncode == 0, done.stderr
        isa, value = done.stdout.split()
        assert isa == setting.get("BITORCH_ENGINE_CPU", cpu.available_isas()[-1])
        assert float(value) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"BITORCH_ENGINE_BACKEND": "fpga"},
            "BITORCH_ENGINE_BACKEND must be one of reference, cpu, triton, got 'fpga'.",
        ),
        ({"BITORCH_ENGINE_LIBRARY": "/nowhere.so"}, "BITORCH_ENGINE_LIBRARY=/nowhere.so: there is no such file."),
        ({"BITORCH_ENGINE_LIBRARY": __file__}, f"BITORCH_ENGINE_LIBRARY={__file__} does not load: "),
        pytest.param(
            {"BITORCH_ENGINE_CPU": "bogus"}, "BITORCH_ENGINE_CPU must be one of scalar", marks=compiled, id="cpu"
        ),
    ],
)
def test_what_is_not_there_is_refused_when_it_is_asked_for(setting: dict[str, str], message: str) -> None:
    done = run("import bitorch_engine", **setting)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]


@compiled
def test_a_library_of_other_sources_is_refused_with_what_to_do() -> None:
    other = Path(torch.__file__).parent / "lib" / "libc10.so"  # any library that loads
    if not other.exists():
        pytest.skip("this torch has no libc10.so")
    done = run("import bitorch_engine", BITORCH_ENGINE_LIBRARY=str(other))
    assert done.returncode != 0
    assert "was compiled from other sources. Compile it again: `make kernels`" in done.stderr.splitlines()[-1]


def test_without_the_library_everything_runs_in_plain_pytorch(tmp_path: Path) -> None:
    # A copy of the package without the library, as an installation without a compiler leaves it.
    for path in (ROOT / "bitorch_engine").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    code = LAYER + "print(cpu.why_not_loaded(), cpu.kernels())"
    done = run(code, PYTHONPATH=str(tmp_path), BITORCH_ENGINE_LIBRARY="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("none ")
    assert "a C++17 compiler is needed" in done.stdout
    refused = run(
        "import bitorch_engine", PYTHONPATH=str(tmp_path), BITORCH_ENGINE_LIBRARY="", BITORCH_ENGINE_BACKEND="cpu"
    )
    assert "BITORCH_ENGINE_BACKEND=cpu, but the CPU kernels are not there: " in refused.stderr


@compiled
def test_a_cap_holds_for_its_block_only() -> None:
    before = cpu.current_isa()
    with cpu.cap_isa("scalar"):
        assert cpu.current_isa() == "scalar"
        with pytest.raises(RuntimeError, match="the instruction set must be one of scalar"), cpu.cap_isa("neon512"):
            pass
        assert cpu.current_isa() == "scalar"
    assert cpu.current_isa() == before


@compiled
def test_every_kernel_is_written_for_scalar_first() -> None:
    assert cpu.kernels()
    assert all(isas[0] == "scalar" for isas in cpu.kernels().values())


def test_sources_that_are_newer_than_the_library_are_named(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    files = {name: sources / name / "file.cpp" for name in ("linear", "tests")}
    library = tmp_path / "library.so"
    assert loading._changed_since(Path(__file__), sources) is None  # an installation has none
    for seconds, path in enumerate((files["linear"], library, files["tests"])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert loading._changed_since(library, sources) is None  # tests are no part of it
    os.utime(files["linear"], (2, 2))
    assert loading._changed_since(library, sources) == files["linear"]
