"""What this processor can do, where that decides which kernel is right."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}  # adds four products of 8 bits in 32: nothing saturates


@cache
def has_vnni(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every x86 core multiplies 8-bit numbers exactly at full speed; False where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return bool(flags) and all(core & VNNI for core in flags)
