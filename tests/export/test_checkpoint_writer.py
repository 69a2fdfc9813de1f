"""The streaming writer against the safetensors library, which must read back what was written."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from metaembed.export.safetensors_header import read_header
from metaembed.export.safetensors_writer import TensorSpec, split_shards, write_checkpoint

ARRAYS = {
    "a": np.arange(3).astype(ml_dtypes.bfloat16),
    "b": np.arange(10, dtype=np.float32).reshape(2, 5),
    "c": np.arange(7).astype(np.float16),
    "d": np.zeros((0, 4), np.float32),
}
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
SPECS = {name: TensorSpec(array.shape, NAMES[array.dtype]) for name, array in ARRAYS.items()}


def halves(name):
    flat = ARRAYS[name].reshape(-1)
    return [flat[: flat.size // 2], flat[flat.size // 2 :]]


def test_one_shard_is_read_by_safetensors(tmp_path):
    write_checkpoint(tmp_path / "model", {"key": 1}, SPECS, halves)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    read = load_file(tmp_path / "model" / "model.safetensors")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    """Three bf16 values in front would put fp32 at an odd place; memory-mapped readers refuse or copy that."""
    write_checkpoint(tmp_path / "model", {}, SPECS, halves)
    for ref in read_header(tmp_path / "model" / "model.safetensors").values():
        assert ref.read().flags.aligned if ref.nbytes else True
        assert ref.offset % ref.read().dtype.itemsize == 0 if ref.nbytes else True


def test_shards_have_an_index_that_places_every_tensor(tmp_path):
    write_checkpoint(tmp_path / "model", {}, SPECS, halves, shard_bytes=20)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "model" / shard)[name], ARRAYS[name])
    assert len(set(index["weight_map"].values())) == 2


def test_a_tensor_larger_than_a_shard_has_one_for_itself():
    specs = {"a": TensorSpec((1,), "F32"), "b": TensorSpec((9,), "F32"), "c": TensorSpec((1,), "F32")}
    assert [list(shard) for shard in split_shards(specs, 8).values()] == [["a"], ["b"], ["c"]]
    assert list(split_shards(specs, 1000)) == ["model.safetensors"]


def test_too_little_data_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="b: "):
        write_checkpoint(tmp_path / "model", {}, SPECS, lambda name: halves(name)[:1])
    assert not list(tmp_path.iterdir())
