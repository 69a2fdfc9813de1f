"""Shared by all tests: the demo checkpoint, and one export of it at every budget."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint that the package ships."""
    return Path(str(files("metaembed.export") / "demo"))


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo exported at every budget, through the command itself. Read-only: copy it to change it."""
    from metaembed.export.cli import main

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    assert main(["--model", "demo", "--budget", "all", "-o", str(folder), "--quiet"]) == 0
    return folder
