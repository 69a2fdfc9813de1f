"""ONNX Runtime behind the session interface."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from metaembed.runtime import open_sessions, session_ort
from metaembed.runtime.errors import BundleError, UsageError
from metaembed.runtime.layout import lay_out_images
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle
from metaembed.runtime.session_ort import OrtSession


@pytest.fixture
def session(demo_bundle: Path) -> OrtSession:
    return OrtSession(demo_bundle / "vision.onnx", threads=1)


def feeds(grid: tuple[int, int]) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).standard_normal((grid[0] * grid[1], 1176)).astype(np.float32)
    return lay_out_images([pixels], [grid]).feeds()


def test_inputs_are_named_and_typed(session: OrtSession):
    """CONTRIBUTING.md's table."""
    assert dict(session.inputs) == {
        "patches": np.dtype(np.float32),
        "patch_positions": np.dtype(np.int64),
        "patch_mask": np.dtype(np.bool_),
    }


def test_the_description_is_what_was_got(session: OrtSession):
    assert session.description == f"ONNX Runtime {onnxruntime.__version__} (CPUExecutionProvider)"


@pytest.mark.parametrize(("grid", "windows"), [((2, 2), 1), ((10, 10), 4), ((2, 66), 9)])
def test_one_session_runs_every_shape(session: OrtSession, grid: tuple[int, int], windows: int):
    assert session.run(feeds(grid))["image_embeddings"].shape == (1, windows * 16, 128)


def test_outputs_belong_to_the_caller(session: OrtSession):
    first = session.run(feeds((2, 2)))["image_embeddings"]
    kept = first.copy()
    session.run(feeds((4, 4)))
    np.testing.assert_array_equal(first, kept)


def test_a_closed_session_says_so(session: OrtSession):
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(feeds((2, 2)))


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_graph_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.onnx") as error:
        OrtSession(tmp_path / "x.onnx")
    assert "\n" not in str(error.value)


def test_a_graph_without_its_weights_is_one_sentence(demo_bundle: Path, tmp_path: Path):
    (tmp_path / "vision.onnx").write_bytes((demo_bundle / "vision.onnx").read_bytes())
    with pytest.raises(BundleError, match="cannot load"):
        OrtSession(tmp_path / "vision.onnx")


@pytest.mark.parametrize(("free", "lean"), [(1 << 20, True), (1 << 40, False), (None, False)])
def test_large_weights_stay_on_disk_even_before_the_manifest_names_them(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, lean: bool
):
    """While an export judges its own bundle, bundle.json does not hold the weights yet; 3B then took 23 GB."""
    asked = []

    class Recorded(OrtSession):
        def __init__(self, path: Path, **options: bool) -> None:
            asked.append(options["lean"])
            super().__init__(path, **options)

    monkeypatch.setattr(session_ort, "OrtSession", Recorded)
    monkeypatch.setattr(open_sessions, "available_memory", lambda: free)
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    files = {name: record for name, record in manifest.files.items() if not name.startswith("weights/")}
    unfinished = Bundle(demo_bundle, replace(manifest, files=files))
    for session in open_sessions.open_ort_sessions(unfinished, (VISION, LANGUAGE)):
        session.close()
    assert asked == [lean, lean]
