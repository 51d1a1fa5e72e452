"""The layout of docs/layout.md holds: imports run downhill, importing is silent and light, every named path exists."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bitorch_engine"
LAYOUT = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")

# docs/layout.md is where the order is written; the tests read it from there: "1. `bits/` what a code is".
ORDER = re.findall(r"^\d+\. `(\w+)/`", LAYOUT, flags=re.MULTILINE)


def test_the_order_of_the_document_is_the_one_agreed_on() -> None:
    agreed = ["bits", "ops", "quantizers", "parameters", "layers", "optim", "convert", "checkpoint", "export", "cli"]
    assert [folder for folder in agreed if folder in ORDER] == ORDER


def test_imports_run_from_later_folders_to_earlier_ones_only() -> None:
    assert list(uphill_imports(PACKAGE, ORDER)) == []


UPHILL = {
    "absolute": ("ops/conv.py", "import bitorch_engine.layers"),
    "from": ("ops/conv.py", "from bitorch_engine.layers import nBitConv2d"),
    "from the root": ("ops/conv.py", "from bitorch_engine import layers"),
    "a name of the root": ("ops/conv.py", "from bitorch_engine import quantize_"),
    "relative": ("ops/cpu/conv.py", "from ...layers.qconv import nBitConv2d"),
    "relative in an __init__": ("ops/__init__.py", "from ..layers import nBitConv2d"),
    "under a function": ("ops/conv.py", "def conv():\n    from bitorch_engine.layers import nBitConv2d"),
    "for annotations": ("ops/conv.py", "if TYPE_CHECKING:\n    from bitorch_engine.layers import nBitConv2d"),
    "by name": ("ops/conv.py", "importlib.import_module('bitorch_engine.layers')"),
    "compat": ("layers/conv.py", "from bitorch_engine.compat import qconv"),
    "compat from the root": ("__init__.py", "from bitorch_engine import compat"),
}


@pytest.mark.parametrize(("path", "source"), UPHILL.values(), ids=UPHILL)
def test_an_uphill_import_is_caught(tmp_path: Path, path: str, source: str) -> None:
    write(tmp_path, path, source)
    (found,) = uphill_imports(tmp_path, ["bits", "ops", "layers"])
    line = 1 + source.count("\n")
    assert found.startswith(f"{path}:{line} imports bitorch_engine")


DOWNHILL = {
    "from below": ("layers/conv.py", "from bitorch_engine.bits import pack"),
    "relative from below": ("layers/qconv/conv.py", "from ...bits import pack"),
    "a neighbour": ("layers/conv.py", "from .linear import nBitLinear"),
    "a neighbour, absolute": ("layers/conv.py", "from bitorch_engine.layers.linear import nBitLinear"),
    "someone else": ("bits/formats.py", "import torch.nn.functional as layers"),
    "the root sees everything": ("__init__.py", "from bitorch_engine.layers import nBitConv2d"),
    "compat sees everything": ("compat/__init__.py", "from bitorch_engine import layers, quantize_"),
    "the last folder sees the root": ("layers/conv.py", "from bitorch_engine import quantize_"),
}


@pytest.mark.parametrize(("path", "source"), DOWNHILL.values(), ids=DOWNHILL)
def test_a_downhill_import_passes(tmp_path: Path, path: str, source: str) -> None:
    write(tmp_path, path, source)
    assert list(uphill_imports(tmp_path, ["bits", "ops", "layers"])) == []


def test_importing_the_package_prints_nothing_and_loads_no_tool_of_the_command_line() -> None:
    heavy = ["bitorch_engine.cli", "click", "rich", "matplotlib", "sklearn", "PIL"]
    code = f"""if True:
        import sys, torch, bitorch_engine
        loaded = [name for name in {heavy} if name in sys.modules]
        if torch.cuda.is_initialized():
            loaded.append("the GPU")
        sys.exit(f"importing bitorch_engine loaded {{loaded}}" if loaded else 0)
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)


def test_the_library_prints_nothing_and_never_ends_the_process() -> None:
    assert list(print_and_exit_calls(PACKAGE, ["cli"])) == []


@pytest.mark.parametrize("call", ["print(1)", "exit(1)", "quit()", "sys.exit(1)", "os._exit(1)", "raise SystemExit(1)"])
def test_a_print_or_exit_call_is_caught(tmp_path: Path, call: str) -> None:
    write(tmp_path, "ops/conv.py", f"def conv():\n    {call}")
    write(tmp_path, "cli/main.py", call)
    (found,) = print_and_exit_calls(tmp_path, ["cli"])
    assert found.startswith("ops/conv.py:2 calls ")


def test_every_folder_of_the_package_is_in_the_document_and_the_reverse() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders - {"compat"} == set(ORDER)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_every_folder_with_code_is_a_package() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel, and nobody notices in an editable install.
    folders = {path.parent for path in PACKAGE.glob("**/*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_folder_or_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [str(path) for path in PACKAGE.glob("**/*") if path.stem in drawers] == []


@pytest.mark.parametrize("document", ["docs/layout.md", "CONTRIBUTING.md"])
def test_every_path_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()] == []


def uphill_imports(package: Path, order: list[str]) -> Iterator[str]:
    """One line for each import of a folder that the importing one must not see; ``package`` is bitorch_engine's folder.

    Imports under functions count: late is still uphill. So do those under TYPE_CHECKING: a signature that names a later
    folder's class ties the two together for whoever reads it.
    """
    for path in sorted(package.glob("**/*.py")):
        here = path.relative_to(package)
        importer = here.parts[0] if len(here.parts) > 1 else ""
        for line, name in imported_names(path, package):
            top, _, rest = name.partition(".")
            folder = rest.split(".")[0]
            # A name that is no folder is one of the root's own.
            imported = folder if folder in (*order, "compat") else ""
            if top == "bitorch_engine" and imported not in visible(importer, order):
                yield f"{here.as_posix()}:{line} imports {name}"


def visible(importer: str, order: list[str]) -> set[str]:
    """The folders that a folder may import; "" is the root, bitorch_engine/__init__.py, which re-exports the others."""
    if importer == "":
        return {*order}
    if importer == "compat":  # old names: it sees everything, and nothing sees it
        return {*order, "", "compat"}
    if importer not in order:
        return set()
    return {*order[: order.index(importer) + 1]} | ({""} if importer == order[-1] else set())


def imported_names(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module imports, wherever in it the import stands."""
    here = ("bitorch_engine", *path.relative_to(package).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                # a/b.py and a/__init__.py are both in package a: level 1 drops the last part of either
                start = ".".join([*(here[: len(here) - level] if level else ()), *([module] if module else ())])
                yield from ((node.lineno, f"{start}.{name.name}") for name in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).split(".")[-1] in ("import_module", "__import__"):
                    yield node.lineno, name


def print_and_exit_calls(package: Path, allowed: list[str]) -> Iterator[str]:
    """One line for each call that prints or ends the process, outside the folders in ``allowed``."""
    calls = {"print", "exit", "quit", "sys.exit", "os._exit", "os.abort", "SystemExit"}
    for path in sorted(package.glob("**/*.py")):
        here = path.relative_to(package)
        if here.parts[0] not in allowed:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                    yield f"{here.as_posix()}:{node.lineno} calls {ast.unparse(node.func)}"


def write(package: Path, path: str, source: str) -> None:
    """A file of a made-up package."""
    file = package / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
