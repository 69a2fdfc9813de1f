"""Golden vectors: they read back bit for bit, and a damaged file is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from metaembed.runtime.errors import BundleError
from metaembed.runtime.golden import GoldenItem, read_golden, write_golden

EMBEDDINGS = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
TEXTS = {"texts": json.dumps(["a", None, "b"])}


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_what_is_written_reads_back_exactly(tmp_path: Path):
    items = [GoldenItem("naïve ☂\n"), GoldenItem(image=noise((3, 5))), GoldenItem("both", noise((40, 2)))]
    write_golden(tmp_path / "golden" / "x.safetensors", items, EMBEDDINGS)
    read, embeddings = read_golden(tmp_path / "golden" / "x.safetensors")
    np.testing.assert_array_equal(embeddings, EMBEDDINGS)
    assert [item.text for item in read] == [item.text for item in items]
    assert [item.kind for item in read] == ["text", "image", "image + text"]
    for before, after in zip(items[1:], read[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(before.image), np.asarray(after.image))


WRONG = {
    "no texts": ({"embeddings": EMBEDDINGS}, {}),
    "no metadata": ({"embeddings": EMBEDDINGS}, None),
    "texts no JSON": ({"embeddings": EMBEDDINGS}, {"texts": "["}),
    "texts a number": ({"embeddings": EMBEDDINGS}, {"texts": "5"}),
    "texts a string": ({"embeddings": EMBEDDINGS}, {"texts": '"abc"'}),
    "texts an object": ({"embeddings": EMBEDDINGS}, {"texts": '{"a": 1, "b": 2, "c": 3}'}),
    "numbers for texts": ({"embeddings": EMBEDDINGS}, {"texts": "[1, 2, 3]"}),
    "too few texts": ({"embeddings": EMBEDDINGS}, {"texts": '["a"]'}),
    "empty": ({"embeddings": EMBEDDINGS[:0]}, {"texts": "[]"}),
    "two axes": ({"embeddings": EMBEDDINGS[0]}, TEXTS),
    "whole numbers": ({"embeddings": EMBEDDINGS.astype(np.int64)}, TEXTS),
    "no embeddings": ({"other": EMBEDDINGS}, TEXTS),
    "no image": ({"embeddings": EMBEDDINGS, "image.1": np.zeros(9, np.uint8)}, TEXTS),
    "unnumbered image": ({"embeddings": EMBEDDINGS, "image.one": np.zeros(9, np.uint8)}, TEXTS),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents_are_one_sentence(tmp_path: Path, name: str):
    tensors, metadata = WRONG[name]
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(BundleError, match=r"x\.safetensors") as error:
        read_golden(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 64, b"\0" * 64])
def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        read_golden(tmp_path / "x.safetensors")


def test_a_missing_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(BundleError, match="cannot be read"):
        read_golden(tmp_path / "x.safetensors")


def test_a_full_disk_is_an_os_error_which_commands_explain(tmp_path: Path):
    """safetensors' own writer reports it as a SafetensorError, which no command expects."""
    (tmp_path / "full.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_golden(tmp_path / "full.safetensors", [GoldenItem("a")], EMBEDDINGS[:1])
