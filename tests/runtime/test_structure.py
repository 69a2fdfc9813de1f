"""metaembed-check --structure, on the demo's bundle and on forgeries of it that keep their hashes; made with onnx itself."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import onnx
import pytest

from metaembed.runtime.cli_check import main
from metaembed.runtime.errors import BundleError, MetaEmbedError
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle
from metaembed.runtime.open_sessions import open_ort_sessions
from metaembed.runtime.structure import check_structure


def test_a_good_bundle_passes_and_its_weights_are_counted(demo_bundle: Path):
    """Expected counts from the onnx package."""
    for record, name in zip(check_structure(Bundle.open(demo_bundle)), (VISION, LANGUAGE, SCORER), strict=True):
        graph = onnx.load(demo_bundle / name, load_external_data=False).graph
        external = [tensor for tensor in graph.initializer if tensor.external_data]
        assert (record.name, record.nodes, record.weights) == (name, len(graph.node), len(external))
        lengths = [int(entry.value) for tensor in external for entry in tensor.external_data if entry.key == "length"]
        assert record.weight_bytes == sum(lengths)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "onnxruntime is not installed"),
        (
            ImportError("libcudart.so.12: cannot open shared object file"),
            "cannot be loaded (libcudart.so.12: cannot open",
        ),
    ],
)
def test_graphs_that_could_not_be_opened_are_said_to_be_so(demo_bundle: Path, monkeypatch, caplog, error, says):
    """Found in review: onnxruntime's own failure was called a missing package, and the structure's check said nothing."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "onnxruntime":
                raise error

    for name in ("onnxruntime", "metaembed.runtime.session_ort", "metaembed.runtime.session_ort_gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with caplog.at_level(logging.WARNING, "metaembed"):
        assert check_structure(Bundle.open(demo_bundle))
    assert says in caplog.text
    with pytest.raises(MetaEmbedError) as refusal:
        open_ort_sessions(Bundle.open(demo_bundle), [VISION])
    assert says in str(refusal.value)


def test_golden_vectors_are_not_needed(bundle: Path, edit_manifest, capsys: pytest.CaptureFixture[str]):
    for name in ("query", "candidate"):
        (bundle / f"golden/{name}.safetensors").unlink()
    edit_manifest(lambda data: [data["files"].pop(f"golden/{name}.safetensors") for name in ("query", "candidate")])
    assert main([str(bundle), "--structure"]) == 0
    assert "were not compared" in capsys.readouterr().out
    assert main([str(bundle), "--structure", "--json"]) == 0
    assert [record["name"] for record in json.loads(capsys.readouterr().out)] == [VISION, LANGUAGE, SCORER]


def set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


FORGERIES = {
    "beyond the file": (lambda m: set_entry(first_external(m), "offset", "9999999999"), "which has"),
    "of another length": (lambda m: set_entry(first_external(m), "length", "4"), "bytes\\) from"),
    "from another file": (lambda m: set_entry(first_external(m), "location", "bundle.json"), "manifest does not name"),
    "a strange operator": (lambda m: setattr(m.graph.node[3], "op_type", "LSTM"), "outside the allow-list: LSTM"),
    "another input": (lambda m: setattr(m.graph.input[0], "name", "tokens"), "takes"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_graph_that_does_not_fit_is_one_sentence(bundle: Path, replace_file, forgery: str):
    """The forger vouches for the file, so that only its content is wrong."""
    change, sentence = FORGERIES[forgery]
    model = onnx.load(bundle / LANGUAGE, load_external_data=False)
    change(model)
    with pytest.raises(BundleError, match=sentence):
        check_structure(Bundle.open(replace_file(LANGUAGE, model.SerializeToString())))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x3a\x05abc"])
def test_what_is_no_graph_is_one_sentence(bundle: Path, replace_file, content: bytes):
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        check_structure(Bundle.open(replace_file(VISION, content)))
