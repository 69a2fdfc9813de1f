"""A file's old contents stay until the new ones are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metaembed.runtime import staged_file as staged_file_module
from metaembed.runtime.staged_file import staged_file


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("before")
    path.chmod(0o640)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(page: Path, error: type[BaseException]):
    with pytest.raises(error), staged_file(page) as part:
        part.write_text("half a te")
        raise error
    assert page.read_text() == "before"
    assert names(page.parent) == ["page.md"]


def test_what_cannot_be_flushed_replaces_nothing(page: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(staged_file_module, "sync", full)
    with pytest.raises(OSError, match="full"), staged_file(page) as part:
        part.write_text("after")
    assert page.read_text() == "before"
    assert names(page.parent) == ["page.md"]


def test_it_is_replaced_with_its_permissions_and_through_a_link_where_asked(page: Path):
    link, linked = page.with_name("link.md"), page.with_name("linked.md")
    link.symlink_to(page)
    os.link(page, linked)
    with staged_file(link.resolve()) as part:
        part.write_text("after")
    assert (page.read_text(), page.stat().st_mode & 0o777, link.is_symlink()) == ("after", 0o640, True)
    assert linked.read_text() == "before", "another name of the old file still has it"
    with staged_file(link) as part:
        part.write_text("own")
    assert (page.read_text(), link.read_text(), link.is_symlink()) == ("after", "own", False)


def test_a_new_file_is_made(tmp_path: Path):
    with staged_file(tmp_path / "new") as part:
        part.write_bytes(b"\0")
    assert ((tmp_path / "new").read_bytes(), names(tmp_path)) == (b"\0", ["new"])
