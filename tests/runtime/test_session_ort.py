"""ONNX Runtime behind the session interface."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import save_file

from metaembed.runtime import memory, open_sessions, session_ort
from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError
from metaembed.runtime.layout import lay_out_images
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle, FileRecord
from metaembed.runtime.providers import CPU
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


def test_int8_products_do_not_saturate_on_this_processor(tmp_path: Path):
    """The largest codes side by side, where 16-bit sums of two products overflow; expected in exact int64."""
    onnx = pytest.importorskip("onnx")
    make, arrays = onnx.helper, onnx.numpy_helper.from_array
    weight = np.where(np.random.default_rng(0).random((48, 64)) < 0.5, 127, -127).astype(np.int8)
    x = np.vstack([np.where(weight[3] > 0, 127, -127), np.full(64, 127), np.arange(64)]).astype(np.float32)
    constants = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "w": weight,
        "ones": np.ones(48, np.float32),
        "zeros": np.zeros(48, np.int8),
    }
    nodes = [
        make.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
        make.make_node("DequantizeLinear", ["codes", "one", "zero"], ["rounded"]),
        make.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["wide"], axis=0),
        make.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        make.make_node("MatMul", ["rounded", "turned"], ["y"]),
    ]
    ends = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", k]) for name, k in (("x", 64), ("y", 48))]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], [arrays(np.asarray(v), k) for k, v in constants.items()])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    found = OrtSession(tmp_path / "g.onnx", threads=1, quantised=True).run({"x": x})["y"]
    np.testing.assert_array_equal(found, x.astype(np.int64) @ weight.T.astype(np.int64))


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


@pytest.fixture
def quantised(demo_bundle: Path, tmp_path: Path) -> Bundle:
    """2,048 KiB of INT8 codes, 256 Ki numbers in bf16, and what stays mapped: FP8 codes, float32 numbers, a token table."""
    (tmp_path / "weights").mkdir()
    high = {"table": np.zeros((256, 1024), ml_dtypes.bfloat16), "norm": np.zeros((512, 1024), np.float32)}
    table = {"language_model.embed_tokens.weight_quantised": np.zeros((1 << 12, 1 << 10), np.int8)}
    save_file({"codes": np.zeros((1024, 2048), np.int8), **table}, tmp_path / "weights" / "int8-01.safetensors")
    save_file(high | {"fp8": np.zeros(1 << 20, ml_dtypes.float8_e4m3fn)}, tmp_path / "weights" / "high-01.safetensors")
    manifest = replace(Bundle.open(demo_bundle, verify=False).manifest, quantization={"type": "int8"})
    return Bundle(tmp_path, manifest)


@pytest.mark.parametrize(("ram", "swap", "fits"), [(3071, 0, False), (3072, 0, True), (2000, 1072, True)])
def test_a_quantised_bundle_that_cannot_fit_is_refused_before_it_is_opened(
    quantised: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ram: int, swap: int, fits: bool
):
    """2,048 KiB of codes and 4 x 256 KiB of what is widened are 3,072: what the kernel says is free is faked."""
    (tmp_path / "meminfo").write_text(f"MemAvailable: {ram} kB\nSwapFree: {swap} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    opened: list[Path] = []
    monkeypatch.setattr(session_ort, "OrtSession", lambda path, **_: opened.append(path))
    files = dict.fromkeys((VISION, LANGUAGE, SCORER), FileRecord(0, "0" * 64))
    bundle = replace(quantised, manifest=replace(quantised.manifest, files=files))
    open_sessions.open_ort_sessions(bundle, (SCORER,), available=[CPU])  # it has no weights
    if fits:
        open_sessions.open_ort_sessions(bundle, (VISION, LANGUAGE), available=[CPU])
    else:
        with pytest.raises(MetaEmbedError, match=r"at least 0\.0 GiB of memory on a CPU, and 0\.0 GiB is free"):
            open_sessions.open_ort_sessions(bundle, (VISION, LANGUAGE), available=[CPU])
    assert [path.name for path in opened] == [SCORER, VISION, LANGUAGE] if fits else [SCORER]
