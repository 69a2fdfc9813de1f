"""What is in a bundle: one set of weights, graphs without them, every file recorded."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from metaembed.export.bundle import ExportRequest, Silence, export_bundle, place_weights, write_manifest
from metaembed.export.checkpoint import Checkpoint
from metaembed.export.models import resolve_model
from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.manifest import MANIFEST, Bundle, Limits


def external(path: Path) -> dict[str, tuple[str, int, int]]:
    """Name to (location, offset, length) of each external tensor, read with the onnx package itself."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
    return found


def test_both_graphs_point_into_one_set_of_weights(demo_bundle: Path):
    vision, language = external(demo_bundle / "vision.onnx"), external(demo_bundle / "language.onnx")
    assert {location for location, _, _ in (vision | language).values()} == {"weights/model.safetensors"}
    assert not vision.keys() & language.keys()
    assert {name for name in vision if not name.startswith("visual.")} == set()
    assert os.listdir(demo_bundle / "weights") == ["model.safetensors"]


def test_graph_files_are_small(demo_bundle: Path):
    """Weights are 8.7 MB; a graph that inlined some would show."""
    for name in ("vision.onnx", "language.onnx"):
        assert (demo_bundle / name).stat().st_size < 1_000_000


def test_every_tensor_of_the_checkpoint_is_used_where_it_lies(demo_bundle: Path, demo_folder: Path):
    """Independent source: the safetensors header, and the bytes of both files."""
    checkpoint = Checkpoint.open(demo_folder)
    places = external(demo_bundle / "vision.onnx") | external(demo_bundle / "language.onnx")
    assert set(places) == set(checkpoint.tensors)
    weights = (demo_bundle / "weights" / "model.safetensors").read_bytes()
    for name, (_, offset, length) in places.items():
        assert weights[offset : offset + length] == checkpoint.read(name).tobytes()


def test_onnx_itself_accepts_the_graphs(demo_bundle: Path, tmp_path: Path):
    """A real copy: onnx's checker, unlike ONNX Runtime and TensorRT, takes a hard link for no regular file."""
    copy = shutil.copytree(demo_bundle, tmp_path / "copy")
    for name in ("vision.onnx", "language.onnx"):
        onnx.checker.check_model(str(copy / name), full_check=True)


def test_the_record_of_parity_covers_every_budget(demo_bundle: Path):
    record = json.loads((demo_bundle / MANIFEST).read_bytes())["parity"]
    assert [row["budget"] for row in record["rankings"]] == [[1, 1], [2, 4], [4, 8], [8, 16], [16, 64]]
    assert len(record["vectors"]) == 2 * 5 * 3, "sides, sizes, kinds of input"
    assert all(row["passed"] for row in record["rankings"] + record["vectors"])


def test_shards_of_one_name_from_two_folders_stay_apart(demo_folder: Path, tmp_path: Path):
    checkpoint = Checkpoint.open(demo_folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(checkpoint.files[0].read_bytes())
    name = "prompt_embed_tokens.weight"
    moved = replace(checkpoint.tensors[name], path=tmp_path / "other" / "model.safetensors")
    twice = replace(checkpoint, tensors={**checkpoint.tensors, name: moved})
    (tmp_path / "bundle").mkdir()
    refs = place_weights(twice, tmp_path / "bundle")
    assert len({ref.location for ref in refs.values()}) == 2
    for ref in refs.values():
        assert (tmp_path / "bundle" / ref.location).is_file()


@pytest.mark.parametrize("first", ["1-model", "2-model"])
def test_a_shard_is_never_placed_over_another(demo_folder: Path, tmp_path: Path, first: str):
    """A number put in front of one name may make another that is there. Expected: each file's own last byte."""
    checkpoint = Checkpoint.open(demo_folder)
    paths = [tmp_path / "a" / first, tmp_path / "b" / "model", tmp_path / "c" / "model"]
    names = dict(zip(list(checkpoint.tensors)[:3], paths, strict=True))
    for place, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes([place]))
    tensors = {name: replace(checkpoint.tensors[name], path=path) for name, path in names.items()}
    (tmp_path / "bundle").mkdir()
    refs = place_weights(replace(checkpoint, tensors=tensors), tmp_path / "bundle")
    assert [(tmp_path / "bundle" / ref.location).read_bytes() for ref in refs.values()] == [b"\0", b"\1", b"\2"]


def test_a_checkpoint_that_is_written_to_meanwhile_is_refused(demo_folder: Path, tmp_path: Path):
    """Found in review: weights are hard links; the bundle was called good, and failed its next check."""
    folder = shutil.copytree(demo_folder, tmp_path / "checkpoint")

    class Meddling(Silence):
        def stage(self, what: str) -> None:
            if what.startswith("tracing"):
                (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    request = ExportRequest(
        model=resolve_model(str(folder)), budgets=[Budget(1, 1)], limits=Limits(64, 64), parity=False
    )
    with pytest.raises(BundleError, match=r"model.safetensors was written to while it was exported"):
        export_bundle(request, tmp_path / "bundle", progress=Meddling())
    assert not (tmp_path / "bundle").exists()


def test_a_blob_gets_a_name_that_the_manifest_allows(demo_folder: Path, tmp_path: Path):
    """Some caches name blobs by their digest; a manifest takes no colon."""
    checkpoint, blob = Checkpoint.open(demo_folder), tmp_path / "sha256:0a\udcff"
    blob.write_bytes(b"x")
    name, ref = next(iter(checkpoint.tensors.items()))
    (tmp_path / "bundle").mkdir()
    refs = place_weights(replace(checkpoint, tensors={name: replace(ref, path=blob)}), tmp_path / "bundle")
    assert refs[name].location == "weights/sha256_0a_.safetensors"


def test_write_manifest_records_what_is_there(demo_bundle: Path, tmp_path: Path):
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a.plan").write_bytes(b"plan")
    written = write_manifest(tmp_path, replace(manifest, files={}))
    assert set(written.files) == {"engines/a.plan"}
    assert Bundle.open(tmp_path).manifest == written
    assert (tmp_path / MANIFEST).read_bytes().endswith(b"}\n")


def test_a_request_without_budgets_is_refused_before_any_work():
    with pytest.raises(UsageError, match="at least one budget"):
        ExportRequest(model=resolve_model("demo"), budgets=[])
