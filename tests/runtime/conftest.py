"""Bundles to break: copies of the demo's that share its files by hard link until they are replaced. And a graph in bf16."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from metaembed.runtime.manifest import MANIFEST, FileRecord


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle. Replace files in it (unlink first); never write into one."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder, copy_function=os.link)
    return folder


@pytest.fixture
def edit_manifest(bundle: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Change the copy's bundle.json in place with a function."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        data = json.loads((bundle / MANIFEST).read_bytes())
        change(data)
        (bundle / MANIFEST).unlink()
        (bundle / MANIFEST).write_text(json.dumps(data))
        return bundle

    return edit


@pytest.fixture
def replace_file(bundle: Path, edit_manifest: Any) -> Callable[[str, bytes], Path]:
    """Replace a file of the copy and vouch for it in bundle.json: a forger's bundle, or another version's."""

    def replace(name: str, content: bytes) -> Path:
        (bundle / name).unlink()
        (bundle / name).write_bytes(content)
        record = asdict(FileRecord.of(bundle / name))
        return edit_manifest(lambda data: data["files"].update({name: record}))

    return replace


@pytest.fixture
def bf16_identity(tmp_path: Path) -> Path:
    """A graph that gives back its input ``x`` (a, 3) as ``y``, in bf16, which numpy does not have."""
    onnx = pytest.importorskip("onnx")
    kind, helper = onnx.TensorProto.BFLOAT16, onnx.helper
    ends = [helper.make_tensor_value_info(name, kind, ["a", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    path = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
