"""What memory this machine has left."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available_memory(*, swap: bool = False) -> int | None:
    """Bytes that programs can still have, with or without swapping; None where the system does not say (not Linux)."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemAvailable"] + (sizes.get("SwapFree", 0) if swap else 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
