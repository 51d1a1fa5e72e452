"""Loading of the compiled library, and which of its instruction sets are used."""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # first: the kernels then share the OpenMP threads of torch

ISAS = ("scalar", "neon", "avx2", "avx512", "amx")
"""Names of csrc/runtime/isa.h's numbers. avx512: with VNNI, VBMI and VPOPCNTDQ (Ice Lake, Zen 4 and later)."""

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_OTHER = os.environ.get("BITORCH_ENGINE_LIBRARY")
"""Path of another build of the kernels, such as the one with sanitizers. It must be there."""
_PATH = Path(_OTHER) if _OTHER else Path(__file__).with_name(f"libbitorch_engine_cpu{_SUFFIX}")


def _changed_since(library: Path, sources: Path) -> Path | None:
    """A source of the library that is newer, as after ``git pull``; None where there is none, or no sources."""
    compiled = library.stat().st_mtime
    folders = (p for p in sources.glob("*") if p.name not in ("emulation", "python", "tests"))
    return next((p for folder in folders for p in folder.glob("*.*") if p.stat().st_mtime > compiled), None)


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _PATH.exists():
        if _OTHER:
            raise RuntimeError(f"BITORCH_ENGINE_LIBRARY={_OTHER}: there is no such file.")
        return None, (
            "the installation did not compile them (a C++17 compiler is needed: then `pip install` again, or "
            "`make kernels` in the source tree)."
        )
    if not _OTHER and (changed := _changed_since(_PATH, Path(__file__).parents[3] / "csrc")):
        message = f"{changed} is newer than the compiled kernels, which may be wrong now: run `make kernels`."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    try:
        return ctypes.CDLL(str(_PATH)), ""
    except OSError as error:
        if _OTHER:
            raise RuntimeError(f"BITORCH_ENGINE_LIBRARY={_OTHER} does not load: {error}") from None
        return None, f"the library does not load: {error}"


LIBRARY, _WHY_NOT = _load()


def why_not_loaded() -> str:
    """Why the kernels are not there; empty where they are."""
    return _WHY_NOT


def of_other_sources(what: str) -> RuntimeError:
    """The error for something compiled that does not have what is called here."""
    return RuntimeError(
        f"{what} was compiled from other sources. Compile it again: `make kernels` in the source tree, or "
        "`pip install`."
    )


def function(name: str, *argument_types: Any, result: Any = None) -> Any:
    """A function of the library; where that is not loaded, one that must not be called."""
    if LIBRARY is None:
        return None
    try:
        found = getattr(LIBRARY, name)
    except AttributeError:
        raise of_other_sources(f"{_PATH} has no {name}: it") from None
    found.argtypes, found.restype = argument_types, result
    return found


POINTER, INT, INT64, FLOAT, FLOAT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""csrc/quantize/quantize.h's numbers of the float types that kernels read and write."""

_best = function("be_best_isa", result=INT)
_isa = "" if LIBRARY is None else ISAS[_best()]
_cap = function("be_cap_isa", INT, result=INT)
_count = function("be_kernel_count", result=INT)
_name = function("be_kernel_name", INT, result=ctypes.c_char_p)
_has = function("be_kernel_has", INT, INT, result=INT)


def available_isas() -> list[str]:
    """The instruction sets that this processor has and the library knows, the best one last."""
    if LIBRARY is None:
        return []
    arm = _best() == ISAS.index("neon")
    return [isa for i, isa in enumerate(ISAS) if i <= _best() and (isa == "scalar" or (isa == "neon") == arm)]


def current_isa() -> str:
    """The best instruction set that is used now. Only where the kernels are loaded."""
    return _isa


@contextlib.contextmanager
def cap_isa(isa: str) -> Iterator[None]:
    """Use no instruction set above that one. For tests and benchmarks; holds for the whole process."""
    before = current_isa()
    _set_cap(isa)
    try:
        yield
    finally:
        _set_cap(before)


def kernels() -> dict[str, list[str]]:
    """The instruction sets for which each kernel of the library is written, by the kernel's name."""
    count = 0 if LIBRARY is None else _count()
    return {_name(i).decode(): [isa for k, isa in enumerate(ISAS) if _has(i, k)] for i in range(count)}


def threads() -> int:
    """How many threads a kernel may use: torch's number."""
    return torch.get_num_threads()


def _set_cap(isa: str) -> None:
    if isa not in available_isas():
        raise RuntimeError(f"the instruction set must be one of {', '.join(available_isas())}, got {isa!r}.")
    _cap(ISAS.index(isa))
    global _isa
    _isa = isa


if LIBRARY is not None and (_wanted := os.environ.get("BITORCH_ENGINE_CPU")):
    if _wanted not in available_isas():
        raise RuntimeError(f"BITORCH_ENGINE_CPU must be one of {', '.join(available_isas())}, got {_wanted!r}.")
    _set_cap(_wanted)
