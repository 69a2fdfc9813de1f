"""What memory this process can still have: the machine's, or a container's where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GIB = 1 << 30
MEMINFO, MEMBERSHIP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_memory(*, swap: bool = False) -> int | None:
    """Bytes that programs can still have, with or without swapping; None where the system does not say (not Linux).

    Limits of control groups count, a container's for one (docs.kernel.org, admin-guide/cgroup-v2 and cgroup-v1/memory). What
    is only cached of files, mapped weights among it, is given back when it is needed, and counts as available.
    """
    try:
        sizes = _read_table(MEMINFO)
        free = sizes["MemAvailable:"] * 1024
        swappable = sizes.get("SwapFree:", 0) * 1024 if swap else 0
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return min([free + swappable, *_left_in_groups(swappable)])


def _left_in_groups(swappable: int) -> Iterator[int]:
    """Bytes left in each limited group that this process belongs to, itself or through a parent."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if not controllers:
            for folder in (*_parents(GROUPS, path), *_parents(GROUPS / "unified", path)):
                yield from _left_in_v2(folder, swappable)
        elif "memory" in controllers.split(","):
            for folder in _parents(GROUPS / "memory", path):
                yield from _left_in_v1(folder, swappable)


def _parents(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. A container may see its own group at the root, under the host's name."""
    folder = root
    yield folder
    for part in path.split("/"):
        if part not in ("", ".."):
            folder /= part
            yield folder


def _left_in_v2(folder: Path, swappable: int) -> Iterator[int]:
    limit, usage = _read_number(folder / "memory.max"), _read_number(folder / "memory.current")
    if limit is None or usage is None:
        return
    most, held = _read_number(folder / "memory.swap.max"), _read_number(folder / "memory.swap.current") or 0
    left_to_swap = swappable if most is None else min(swappable, max(0, most - held))
    yield max(0, limit - usage + _cached_files(folder, "")) + left_to_swap


def _left_in_v1(folder: Path, swappable: int) -> Iterator[int]:
    files = _cached_files(folder, "total_")
    for kind, more in (("memory", swappable), ("memory.memsw", 0)):  # memory, then memory and swap together
        limit, usage = (_read_number(folder / f"{kind}.{name}_in_bytes") for name in ("limit", "usage"))
        if limit is not None and usage is not None:
            yield max(0, limit - usage + files) + more


def _cached_files(folder: Path, prefix: str) -> int:
    try:
        table = _read_table(folder / "memory.stat")
    except (OSError, ValueError, IndexError):
        return 0
    return table.get(f"{prefix}inactive_file", 0) + table.get(f"{prefix}active_file", 0)


def _read_number(path: Path) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, and perhaps a unit."""
    words = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in words}
