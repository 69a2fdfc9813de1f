"""Random checkpoints: real layout, sensible scale, reproducible, nothing for an engine builder to de-duplicate."""

from __future__ import annotations

import numpy as np
import pytest

from metaembed.export import random_weights
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.runtime.errors import UsageError


@pytest.fixture
def wide(tiny_config):
    """Large enough for tensors of several pieces, and for several shards."""
    return tiny_config | {"vocab_size": 5003, "intermediate_size": 1307}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(random_weights, "BLOCK_VALUES", 1 << 18)
    monkeypatch.setattr(random_weights, "PIECE_VALUES", 1 << 14)


def values(checkpoint):
    return {name: np.array(checkpoint.read(name), np.float32) for name in checkpoint.tensors}


def test_scale_is_that_of_a_fresh_qwen(tmp_path, wide):
    """Expected: initializer_range 0.02 for matrices and biases, ones for norms (transformers' _init_weights)."""
    for name, tensor in values(write_random_checkpoint(wide, 0, tmp_path / "model")).items():
        is_norm = tensor.ndim == 1 and name.endswith("weight")
        error = 4 * 0.02 / np.sqrt(tensor.size)
        assert abs(tensor.mean() - (1 if is_norm else 0)) < error + 0.004, name  # bf16 near 1 has steps of 0.004
        assert abs(tensor.std() / 0.02 - 1) < 4 / np.sqrt(2 * tensor.size) + 0.1, name


def test_no_two_tensors_and_no_two_rows_are_equal(tmp_path, wide):
    tensors = values(write_random_checkpoint(wide, 0, tmp_path / "model"))
    assert len({tensor.tobytes() for tensor in tensors.values()}) == len(tensors)
    table = tensors["language_model.embed_tokens.weight"]
    assert len({row.tobytes() for row in table}) == len(table)


def test_bytes_follow_from_the_seed_alone(tmp_path, wide):
    first = values(write_random_checkpoint(wide, 7, tmp_path / "first"))
    shards = write_random_checkpoint(wide, 7, tmp_path / "shards", shard_bytes=200_000)
    other = values(write_random_checkpoint(wide, 8, tmp_path / "other"))
    assert len(shards.files) > 3
    for name, tensor in values(shards).items():
        np.testing.assert_array_equal(tensor, first[name], name)
        assert not np.array_equal(tensor, other[name]), name


@pytest.mark.parametrize(("dtype", "name", "size"), [("bf16", "BF16", 2), ("fp16", "F16", 2), ("fp32", "F32", 4)])
def test_every_float_type_can_be_written(tmp_path, tiny_config, dtype, name, size):
    written: list[int] = []
    checkpoint = write_random_checkpoint(tiny_config, 0, tmp_path / "model", dtype=dtype, advance=written.append)
    assert {ref.dtype for ref in checkpoint.tensors.values()} == {name}
    assert sum(written) == checkpoint.nbytes == size * sum(checkpoint.read(n).size for n in checkpoint.tensors)
    checkpoint.check_finite()


def test_mistakes_are_explained(tmp_path, tiny_config):
    with pytest.raises(UsageError, match="int8"):
        write_random_checkpoint(tiny_config, 0, tmp_path / "model", dtype="int8")
    write_random_checkpoint(tiny_config, 0, tmp_path / "model")
    with pytest.raises(UsageError, match="exists"):
        write_random_checkpoint(tiny_config, 0, tmp_path / "model")
