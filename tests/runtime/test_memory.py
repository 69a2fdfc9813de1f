"""Free memory, against what the kernel's file says."""

from pathlib import Path

import pytest

from metaembed.runtime import memory


def test_available_memory_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "meminfo").write_text(
        "MemTotal:  24000 kB\nMemFree:  12 kB\nMemAvailable:   7000 kB\nSwapFree:  5 kB\nHugePages_Free:    0\n"
    )
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available_memory() == 7000 * 1024
    assert memory.available_memory(swap=True) == 7005 * 1024


@pytest.mark.parametrize("text", [None, "", "MemFree: 1 kB\n", "MemAvailable:\n"])
def test_a_system_that_does_not_say_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None):
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available_memory() is None
