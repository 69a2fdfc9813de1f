"""Weights arrive once: a hard link where possible, and the same bytes in any case."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from metaembed.runtime import weights
from metaembed.runtime.weights import place_file

CONTENT = bytes(range(256)) * 200


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(CONTENT)
    return path


def refuse(*_: object) -> None:
    raise OSError(errno.EXDEV, "another file system")


def test_a_hard_link_costs_no_space(source: Path, tmp_path: Path):
    seen = []
    assert place_file(source, tmp_path / "target.bin", seen.append) == "linked"
    assert os.path.samefile(source, tmp_path / "target.bin")
    assert seen == [len(CONTENT)]


def test_a_symbolic_link_is_followed(source: Path, tmp_path: Path):
    """A hub cache is made of them, and ONNX Runtime refuses them as external data."""
    (tmp_path / "link.bin").symlink_to(source)
    place_file(tmp_path / "link.bin", tmp_path / "target.bin")
    assert not (tmp_path / "target.bin").is_symlink()
    assert (tmp_path / "target.bin").read_bytes() == CONTENT


def test_another_file_system_gets_a_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(weights, "_reflink", refuse)
    monkeypatch.setattr(weights, "BLOCK", 1000)
    seen = []
    assert place_file(source, tmp_path / "target.bin", seen.append) == "copied"
    assert (tmp_path / "target.bin").read_bytes() == CONTENT
    assert not os.path.samefile(source, tmp_path / "target.bin")
    assert sum(seen) == len(CONTENT)


def test_a_missing_source_leaves_no_target(tmp_path: Path):
    with pytest.raises(OSError, match="No such file"):
        place_file(tmp_path / "nowhere.bin", tmp_path / "target.bin")
    assert not (tmp_path / "target.bin").exists()


def test_values_are_counted_whatever_their_type(tmp_path: Path):
    """float32 graphs widen stored bf16: memory was once judged by stored bytes, and a 3B export took 23 GB."""
    save_file({"a": np.zeros((3, 5), ml_dtypes.bfloat16), "b": np.zeros(7, np.float32)}, tmp_path / "one.safetensors")
    save_file({"c": np.zeros((), np.float16)}, tmp_path / "two.safetensors", metadata={"format": "np"})
    assert weights.count_values(tmp_path) == 15 + 7 + 1


def test_a_target_that_exists_is_kept(source: Path, tmp_path: Path):
    (tmp_path / "target.bin").write_bytes(b"another shard")
    with pytest.raises(FileExistsError):
        place_file(source, tmp_path / "target.bin")
    assert (tmp_path / "target.bin").read_bytes() == b"another shard"
