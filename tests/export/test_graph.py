"""Optimising and pointing at weights, on a graph small enough to count: y = (x W) + b, run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from metaembed.export.graph import (
    WeightRef,
    attach_weights,
    check_operators,
    optimise,
    save_graph,
    weights_of,
)
from metaembed.runtime.errors import BundleError
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle

FLOAT = ir.DataType.FLOAT
W = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)  # stored (out, in), as torch's Linear
B = np.arange(5, dtype=np.float32)


def value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape))


@pytest.fixture
def model() -> ir.Model:
    """MatMul(x, Transpose(w)) + b, and a node that nobody uses."""
    x, w, b = value("x", ["n", 3]), value("w", [5, 3]), value("b", [5])
    nodes = [ir.node("Transpose", [w], {"perm": [1, 0]}), ir.node("Neg", [x])]
    nodes.append(ir.node("MatMul", [x, nodes[0].outputs[0]]))
    nodes.append(ir.node("Add", [nodes[2].outputs[0], b]))
    y = nodes[3].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), ir.Shape(["n", 5])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[w, b], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def write_weights(folder: Path, dtype: type = np.float32, ir_dtype: ir.DataType = FLOAT) -> dict[str, WeightRef]:
    """Both tensors in one file behind 8 bytes of something else, as in a safetensors file."""
    w, b = W.astype(dtype).tobytes(), B.astype(dtype).tobytes()
    (folder / "weights.bin").write_bytes(b"headers!" + w + b)
    return {
        "w": WeightRef("weights.bin", 8, len(w), ir_dtype, (5, 3)),
        "b": WeightRef("weights.bin", 8 + len(w), len(b), ir_dtype, (5,)),
    }


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_optimising_keeps_every_weight_and_removes_dead_nodes(model: ir.Model):
    optimise(model)
    assert {weight.name for weight in weights_of(model)} == {"w", "b"}
    assert [graph_input.name for graph_input in model.graph.inputs] == ["x"]
    assert sorted(node.op_type for node in model.graph) == ["Add", "MatMul", "Transpose"]


@pytest.mark.parametrize(
    ("dtype", "ir_dtype"),
    [(np.float32, FLOAT), (ml_dtypes.bfloat16, ir.DataType.BFLOAT16), (np.float16, ir.DataType.FLOAT16)],
)
def test_a_graph_reads_its_weights_from_the_shard(model: ir.Model, tmp_path: Path, dtype: type, ir_dtype: ir.DataType):
    """Expected in numpy, with the weights rounded to the stored type."""
    attach_weights(model, write_weights(tmp_path, dtype, ir_dtype))
    save_graph(model, tmp_path / "g.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    wide_w, wide_b = (array.astype(dtype).astype(np.float32) for array in (W, B))
    np.testing.assert_allclose(run(tmp_path / "g.onnx", x), x @ wide_w.T + wide_b, atol=1e-5)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == (0 if dtype is np.float32 else 2)


def test_weights_stay_out_of_the_graph_file(model: ir.Model, tmp_path: Path):
    refs = write_weights(tmp_path)
    before = (tmp_path / "weights.bin").read_bytes()
    attach_weights(model, refs)
    save_graph(model, tmp_path / "g.onnx")
    assert (tmp_path / "weights.bin").read_bytes() == before
    assert W.tobytes() not in (tmp_path / "g.onnx").read_bytes()


def test_a_weight_that_is_missing_is_named(model: ir.Model, tmp_path: Path):
    refs = write_weights(tmp_path)
    del refs["b"]
    with pytest.raises(BundleError, match="weight b is missing"):
        attach_weights(model, refs)


def test_a_weight_of_another_shape_is_named(model: ir.Model, tmp_path: Path):
    refs = write_weights(tmp_path)
    refs["w"] = WeightRef("weights.bin", 8, 60, FLOAT, (3, 5))
    with pytest.raises(BundleError, match=r"weight w has shape \[3, 5\]; the graph needs \[5, 3\]"):
        attach_weights(model, refs)


def test_an_operator_outside_the_list_is_named(model: ir.Model):
    check_operators(model)
    next(node for node in model.graph if node.op_type == "Neg").op_type = "LSTM"
    with pytest.raises(BundleError, match="LSTM"):
        check_operators(model)


@pytest.mark.parametrize("name", ["Attention", "RMSNormalization"])
def test_the_operators_of_opset_23_belong_to_its_graphs_alone(model: ir.Model, name: str):
    next(node for node in model.graph if node.op_type == "Neg").op_type = name
    with pytest.raises(BundleError, match=name):
        check_operators(model)
    model.opset_imports[""] = 23
    check_operators(model)


def test_onnxruntime_makes_one_operator_of_every_norm(demo_bundle, tmp_path):
    """Expected by hand: two norms a block and one behind the last. A pattern that it does not know is eight nodes instead."""
    bundle = Bundle.open(demo_bundle, verify=False)
    geometry = bundle.manifest.geometry
    for name, blocks in ((VISION, geometry.vision.depth), (LANGUAGE, geometry.text.layers)):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        options.log_severity_level = 3
        ort.InferenceSession(str(bundle.path(name)), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(tmp_path / name, load_external_data=False)
        assert sum(node.op_type == "SimplifiedLayerNormalization" for node in optimised.graph.node) == 2 * blocks + 1
