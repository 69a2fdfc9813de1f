"""Shared by all tests, in every process that runs them: the demo checkpoint, and exports of it; who runs which tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads and ours, in processes that tests start as well

# Files that take minutes go first, so that all processes end together; those that share the traces of ``deep``, in one.
DEEP = tuple(f"test_{name}.py" for name in ("attention_parts", "frozen", "opset_23", "precision", "repeat"))
LONGEST = (*DEEP, "test_engine.py")


class FileScheduling(LoadScopeScheduling):
    """A process takes whole files, for the fixtures of their modules. (Groups of pytest-xdist 3.8 fail on pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "deep" if file.endswith(DEEP) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _one_core_a_process(worker_id: str) -> Iterator[None]:
    """ONNX Runtime left to choose takes a thread for each core, whose waiting keeps the other processes from theirs."""
    if worker_id == "master":
        yield
        return
    from metaembed.runtime.session_ort import OrtSession

    begin = OrtSession.__init__

    def begin_with_one_thread(self: OrtSession, path: Path, *, threads: int = 0, **how: Any) -> None:
        begin(self, path, threads=threads or 1, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtSession, "__init__", begin_with_one_thread)
        yield


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint that the package ships."""
    return Path(str(files("metaembed.export") / "demo"))


@pytest.fixture(scope="session")
def export_demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Export the demo at every budget, through the command itself. Whichever process asks first does it for all."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def export(name: str, *options: str) -> Path:
        from metaembed.export.cli import main

        folder = root / f"demo-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                assert main(["--model", "demo", "--budget", "all", "-o", str(folder), "--quiet", *options]) == 0
        return folder

    return export


@pytest.fixture(scope="session")
def demo_bundle(export_demo: Callable[..., Path]) -> Path:
    """The demo in fp32, its parity judged. Read-only: copy it to change it."""
    return export_demo("fp32")


@pytest.fixture(scope="session")
def narrow_demo(export_demo: Callable[..., Path]) -> Callable[[str], Path]:
    """The demo in bf16 or fp16; its parity is the parity tests' business. Read-only."""
    return lambda precision: export_demo(precision, "--precision", precision, "--no-parity")
