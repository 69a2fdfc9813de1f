"""CONTRIBUTING.md's import rules, read from the syntax tree, and proved by importing with the heavy packages blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGES = ("runtime", "export", "calibration", "bench", "commands")
RUNTIME_MAY_IMPORT = {"numpy", "ml_dtypes", "safetensors", "PIL", "tokenizers", "tqdm", "metaembed"}
ONE_FILE_EACH = {"onnxruntime": "session_ort.py", "tensorrt": "session_trt.py", "tensorrt_rtx": "session_trt.py",
                 "usearch": "ann_usearch.py"}  # fmt: skip
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "tensorrt", "tensorrt_rtx", "peft",
         "usearch")  # fmt: skip
SESSIONS = {"session_ort", "session_ort_gpu", "session_trt", "ann_usearch"}  # the only modules that need what they run
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name + " is blocked", name=name)
sys.meta_path.insert(0, Block())
"""


def sources(package: str) -> list[Path]:
    return sorted(path for path in Path(str(files(f"metaembed.{package}"))).glob("*.py"))


def imported(path: Path, package: str) -> Iterator[str]:
    """Full names of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"metaembed.{package}" if node.level == 1 else "metaembed" if node.level == 2 else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_sources(package: str):
    """So that the rules below are not satisfied by finding nothing."""
    assert "__init__.py" in [path.name for path in sources(package)]


def test_runtime_imports_what_a_device_has_and_no_more():
    strange = {
        (path.name, top(name))
        for path in sources("runtime")
        for name in imported(path, "runtime")
        if top(name) not in RUNTIME_MAY_IMPORT | sys.stdlib_module_names and ONE_FILE_EACH.get(top(name)) != path.name
    }
    assert not strange


@pytest.mark.parametrize("package", PACKAGES[:3])
def test_packages_import_runtime_and_no_other(package: str):
    """A command file may call another package's public verb; runtime's may not. bench may import anything."""
    others = {f"metaembed.{other}" for other in PACKAGES[1:] if other != package}
    wrong = {
        (path.name, name)
        for path in sources(package)
        for name in imported(path, package)
        if any(name == other or name.startswith(f"{other}.") for other in others)
        and not (path.name.startswith("cli") and package != "runtime")
    }
    assert not wrong


def test_the_way_in_imports_nothing_slow():
    """An interrupt is a sentence only once `metaembed.commands` has been imported."""
    names = {name for path in sources("commands") for name in imported(path, "commands")}
    assert {top(name) for name in names} <= sys.stdlib_module_names


def test_no_package_imports_a_heavy_one_of_itself():
    """An ``__init__.py`` that imports torch makes every file of the package need torch."""
    heavy = {
        (package, name)
        for package in PACKAGES
        for name in imported(Path(str(files(f"metaembed.{package}"))) / "__init__.py", package)
        if top(name) in HEAVY
    }
    assert not heavy


def test_no_file_shadows_the_package_it_uses():
    names = {path.stem for package in PACKAGES for path in sources(package)}
    assert not names & set(HEAVY)


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_runtime_imports_with_every_heavy_package_blocked(tmp_path: Path):
    """One process imports all modules of the runtime but the two session files."""
    modules = [path.stem for path in sources("runtime") if path.stem not in SESSIONS | {"__init__"}]
    code = f"{BLOCK}\nimport importlib\nimport metaembed.runtime\n" + "\n".join(
        f"importlib.import_module('metaembed.runtime.{module}')" for module in modules
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_without_onnxruntime_an_encoder_says_what_to_install(demo_bundle: Path, tmp_path: Path):
    code = f"{BLOCK}\nfrom metaembed.runtime.cli_check import main\nsys.exit(main([{str(demo_bundle)!r}]))"
    result = run_python(code, tmp_path)
    assert result.returncode == 1
    assert "pip install 'metaembed-export[runtime]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imported_under_another_name_is_refused(package: str):
    """From the repository's root ``import runtime`` would make a second copy of every module."""
    root = Path(__file__).parents[2]
    assert (root / package / "__init__.py").is_file()
    result = run_python(f"import {package}", root)
    assert result.returncode == 1
    assert f"ImportError: import metaembed.{package}" in result.stderr
