"""Which INT8 kernel is exact, from lines as Linux writes them, and proved by the kernel that is then chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaembed.runtime.cpu import has_vnni


@pytest.mark.parametrize(
    ("cores", "found"),
    [
        (["fpu avx2 avx512f avx512_vnni"], True),
        (["fpu avx2 avx_vnni", "fpu avx2 avx_vnni"], True),
        (["fpu avx2 avx_vnni", "fpu avx2"], False),
        (["fpu avx2 avx512f"], False),
        ([], False),
    ],
)
def test_every_core_has_to_have_it(tmp_path: Path, cores: list[str], found: bool):
    path = tmp_path / "cpuinfo"
    path.write_text("".join(f"processor\t: {k}\nflags\t\t: {flags}\n\n" for k, flags in enumerate(cores)))
    assert has_vnni(path) is found


def test_a_system_that_does_not_tell_is_taken_not_to_have_it(tmp_path: Path):
    assert has_vnni(tmp_path / "missing") is False
