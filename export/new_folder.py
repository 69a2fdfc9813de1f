"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaembed.runtime.errors import UsageError


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write into, and rename it to ``path`` at the end; remove it when the work fails.

    Raises:
        UsageError: ``path`` exists; nothing is overwritten.
    """
    path = Path(path).absolute()
    if path.exists():
        raise UsageError(f"{path} already exists; remove it or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
