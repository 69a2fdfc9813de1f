"""Damaged and hostile files: each is refused in one sentence, before anything is read or written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.random_weights import write_random_checkpoint
from metaembed.export.safetensors_header import read_header
from metaembed.runtime.errors import BundleError


def write_raw(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping offsets": ({"a": entry(0, 12), "b": entry(8, 16)}, "overlaps"),
    "the same bytes twice": ({"a": entry(0, 16), "b": entry(0, 16)}, "overlaps"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 16)}, "gap"),
    "bytes left over": ({"a": entry(0, 12)}, "the file has"),
    "offsets out of the file": ({"a": entry(0, 32)}, "the file has"),
    "negative offsets": ({"a": entry(-4, 12, [4])}, "data_offsets"),
    "shape of another size": ({"a": entry(0, 16, [5])}, "data_offsets"),
    "shape that overflows": ({"a": entry(0, 16, [2**32, 2**32, 4])}, "data_offsets"),
    "negative shape": ({"a": entry(0, 16, [-2, -2])}, "data_offsets"),
    "fractional shape": ({"a": entry(0, 16, [4.0])}, "data_offsets"),
    "unknown dtype": ({"a": entry(0, 16, dtype="F31")}, "malformed"),
    "entry that is a list": ({"a": [0, 16]}, "malformed"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "malformed"),
    "a list": ([1, 2], "not an object"),
    "no JSON": (b"{'a': 1}", "cannot be read"),
    "no UTF-8": (b'{"\xff": 1}', "cannot be read"),
    "a name twice": (b'{"a": 1, "a": 2}', "twice"),
    "nesting without end": (b"[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header_is_one_sentence(tmp_path, case):
    header, words = HEADERS[case]
    path = tmp_path / "x.safetensors"
    write_raw(path, header)
    with pytest.raises(BundleError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**40, 200])
def test_header_longer_than_the_file_is_one_sentence(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(BundleError, match=str(length)):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_file_too_short_for_a_header_is_one_sentence(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * size)
    with pytest.raises(BundleError, match="cut short"):
        read_header(path)


def test_empty_tensors_are_allowed(tmp_path):
    """The format permits zero-sized tensors anywhere; safetensors itself writes them."""
    path = tmp_path / "x.safetensors"
    write_raw(path, {"b": entry(16, 16, [0]), "a": entry(0, 16), "__metadata__": {"format": "pt"}})
    assert [(name, ref.nbytes) for name, ref in read_header(path).items()] == [("b", 0), ("a", 16)]


@pytest.fixture
def sharded(tmp_path, tiny_config):
    write_random_checkpoint(tiny_config, 0, tmp_path / "model", shard_bytes=60_000)
    return tmp_path / "model"


def test_truncated_shard_is_one_sentence(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BundleError, match="cut short"):
        Checkpoint.open(sharded)


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BundleError, match=f"{shard.name}, which is missing"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"])
def test_shard_outside_the_folder_is_refused(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["visual.merger.ln_q.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="outside its folder"):
        Checkpoint.open(sharded)


def test_index_that_places_a_tensor_wrongly_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["visual.merger.ln_q.weight"] = min(content["weight_map"].values())
    index.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"visual\.merger\.ln_q\.weight"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{}", "[]", "{"])
def test_damaged_index_is_one_sentence(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BundleError, match=r"index\.json"):
        Checkpoint.open(sharded)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_random_checkpoint(tiny, 0, folder)
    return (folder / "model.safetensors").read_bytes()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_of_a_header_is_read_or_refused(tmp_path_factory, one_file, data):
    """Whatever a damaged header says, the answer is tensors inside the file or a BundleError, never another error."""
    changed = bytearray(one_file)
    header_end = 8 + int.from_bytes(changed[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, header_end - 1))] = data.draw(st.sampled_from(b'0159-+.eE"{}[],:\\nF\x00\xff'))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(changed[: data.draw(st.integers(0, len(changed))) or None])
    try:
        refs = read_header(path)
    except BundleError:
        return
    assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= path.stat().st_size for ref in refs.values())
