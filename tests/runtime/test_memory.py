"""Free memory, against what the kernel's files say, and against a real control group where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaembed.runtime import memory

MIB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 7,000 kB left and 5 kB of swap, on which this process is in no group."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:  24000 kB\nMemFree:  12 kB\nMemAvailable:   7000 kB\nSwapFree:  5 kB\nHugePages_Free:    0\n"
    )
    for name, file in (("MEMINFO", "meminfo"), ("MEMBERSHIP", "membership"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / file)
    return tmp_path


def make_group(system: Path, folder: str, **files: object) -> None:
    place = system / "groups" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / f"memory.{name.replace('__', '.')}").write_text(f"{text}\n")


def test_available_memory_is_read_from_the_system(system: Path):
    assert memory.available_memory() == 7000 * 1024
    assert memory.available_memory(swap=True) == 7005 * 1024


@pytest.mark.parametrize("text", [None, "", "MemFree: 1 kB\n", "MemAvailable:\n"])
def test_a_system_that_does_not_say_is_none(system: Path, text: str | None):
    (system / "meminfo").unlink()
    if text is not None:
        (system / "meminfo").write_text(text)
    assert memory.available_memory() is None


@pytest.mark.parametrize("path", ["/", "/a", "/a/b", "/../../host/name"])
def test_a_containers_limit_counts_and_cached_files_do_not(system: Path, path: str):
    """cgroup 2: at the root of what a container sees, or above the process's own group."""
    (system / "membership").write_text(f"0::{path}\n")
    make_group(system, "", max=5000, current=4000, stat="anon 2500\ninactive_file 700\nactive_file 300\nshmem 500")
    make_group(system, "a", max="max", current=4000)
    make_group(system, "a/b", max=9000, current=4000, stat="inactive_file 0")
    assert memory.available_memory() == 2000
    assert memory.available_memory(swap=True) == 2000 + 5 * 1024
    make_group(system, "", swap__max=300, swap__current=100)
    assert memory.available_memory(swap=True) == 2200


def test_the_older_groups_too(system: Path):
    (system / "membership").write_text("4:cpu,memory:/docker/x\n3:cpuset:/\n0::/\n")
    make_group(system, "memory", limit_in_bytes=9223372036854771712, usage_in_bytes=10)
    make_group(system, "memory/docker/x", limit_in_bytes=5000, usage_in_bytes=4500, stat="total_inactive_file 600")
    assert memory.available_memory() == 1100
    assert memory.available_memory(swap=True) == 1100 + 5 * 1024
    make_group(system, "memory/docker/x", memsw__limit_in_bytes=6000, memsw__usage_in_bytes=4900)
    assert memory.available_memory(swap=True) == 1700


@pytest.mark.parametrize("files", [{}, {"max": 5000}, {"max": "", "current": 4}, {"max": "max", "current": 4}])
def test_a_group_that_says_nothing_is_no_limit(system: Path, files: dict[str, object]):
    (system / "membership").write_text("0::/\nnonsense\n")
    make_group(system, "", **files)
    assert memory.available_memory() == 7000 * 1024


def test_more_than_its_limit_in_use_is_nothing_left(system: Path):
    (system / "membership").write_text("0::/\n")
    make_group(system, "", max=5000, current=6000)
    assert memory.available_memory() == 0


def test_in_a_real_group_its_limit_is_what_is_left():
    """The kernel's own files, in a group of 200 MiB: what is left is that, less what the child itself takes."""
    for parent, limit in ((Path("/sys/fs/cgroup/memory"), "limit_in_bytes"), (Path("/sys/fs/cgroup"), "max")):
        group = parent / f"metaembed-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            with (group / f"memory.{limit}").open("r+") as file:  # a plain folder has no such file
                file.write(str(200 * MIB))
            break
        except OSError:
            group.rmdir()
    else:
        pytest.skip("control groups cannot be made here")
    try:
        code = (
            f"open('{group}/cgroup.procs', 'w').write('0')\n"
            "from metaembed.runtime.memory import available_memory\nprint(available_memory())"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    finally:
        group.rmdir()
    assert 100 * MIB < int(said) <= 200 * MIB
