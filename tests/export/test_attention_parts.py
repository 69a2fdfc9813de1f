"""Whole-image attention in parts against the graph that was traced: ``deep`` has it in blocks 0, 3, 4 and 7 of eight."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from metaembed.export.attention_parts import PARTS, attend_in_parts
from metaembed.export.bundle import NARROW
from metaembed.export.graph import attach_weights, check_operators, save_graph, widen_for_cpu
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle, cpu_graph
from metaembed.runtime.session_ort import OrtSession

WHOLE_IMAGE_BLOCKS, WINDOW_BLOCKS = 4, 4


@pytest.fixture(params=["fp32", "bf16"])
def both(deep, request) -> tuple[Path, Path]:
    """The vision graph whole and in parts, over the same bytes."""
    whole = deep.save("vision", request.param, request.param)
    model = deep.trace("vision", request.param).clone()
    attach_weights(model, deep.refs(request.param))
    if request.param in NARROW:
        widen_for_cpu(model, NARROW[request.param])
    attend_in_parts(model)
    check_operators(model)
    path = deep.folder / f"vision-{request.param}-parts.onnx"
    save_graph(model, path)
    return whole, path


def test_parts_give_the_whole_attentions_embeddings(deep, both):
    """Three images of 3, 1 and 1 windows in one batch, so that two are padded; as traced, to 1e-6 of the largest value."""
    wanted, mine = (deep.encode_images(OrtSession(path, threads=1)) for path in both)
    np.testing.assert_allclose(mine, wanted, atol=1e-6 * np.abs(wanted).max())


def test_only_whole_image_attention_is_taken_apart(both):
    """By hand: a softmax for each part of four blocks and one for each of the others; no cast is left that changes nothing."""
    whole, parts = (
        Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node) for path in both
    )
    assert whole["Softmax"] == WHOLE_IMAGE_BLOCKS + WINDOW_BLOCKS
    assert parts["Softmax"] == WHOLE_IMAGE_BLOCKS * PARTS + WINDOW_BLOCKS
    assert parts["MatMul"] - whole["MatMul"] == 2 * WHOLE_IMAGE_BLOCKS * (PARTS - 1)


def test_a_narrow_bundle_keeps_whole_attention_for_engines(narrow_demo):
    """TensorRT fuses what it sees whole; the float32 twin is in parts, and the language graphs have nothing to split."""
    bundle = Bundle.open(narrow_demo("bf16"))
    depth, layers = bundle.manifest.geometry.vision.depth, bundle.manifest.geometry.text.layers
    full = len(bundle.manifest.geometry.vision.full_attention_blocks)
    count = {
        name: sum(
            node.op_type == "Softmax" for node in onnx.load(bundle.path(name), load_external_data=False).graph.node
        )
        for name in (VISION, cpu_graph(VISION), LANGUAGE, cpu_graph(LANGUAGE))
    }
    assert count == {
        VISION: depth,
        cpu_graph(VISION): depth + full * (PARTS - 1),
        LANGUAGE: layers,
        cpu_graph(LANGUAGE): layers,
    }


def test_a_bias_that_differs_between_queries_is_refused():
    """A causal decoder's: its rows are not alike, so parts of them would need parts of the bias."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["i", 2, "s", "s"]))
    bias = ir.Value(name="bias", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["i", 1, "s", "s"]))
    nodes = [ir.node("MatMul", [x, x]), ir.node("Add", [x, bias])]
    nodes[1].replace_input_with(0, nodes[0].outputs[0])
    nodes.append(ir.node("Softmax", [nodes[1].outputs[0]]))
    nodes.append(ir.node("MatMul", [nodes[2].outputs[0], x]))
    for node in nodes:
        node.outputs[0].shape = ir.Shape(["i", 2, "s", "s"])
    graph = ir.Graph([x, bias], [nodes[3].outputs[0]], nodes=nodes, opset_imports={"": 20})
    with pytest.raises(ValueError, match="not attention over a whole image"):
        attend_in_parts(ir.Model(graph, ir_version=10))


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from metaembed.bench.timing import peak_rss_mib
from metaembed.runtime.session_ort import OrtSession
session = OrtSession(Path(sys.argv[1]), threads=1)
def run(windows):
    shape = (1, windows, 64)
    session.run({"patches": np.zeros((*shape, 1176), np.float32), "patch_positions": np.zeros((*shape, 2), np.int64),
                 "patch_mask": np.ones(shape, bool)})
run(1)
before = peak_rss_mib()
run(64)
print(peak_rss_mib() - before)
"""


def test_memory_for_a_large_image_is_a_fraction_of_its_scores(both, deep):
    """1,024 visual tokens: 64 windows of 64 patches, whose scores alone are heads x 4,096^2 x 4 bytes a block."""
    scores = deep.geometry.vision.heads * (64 * 64) ** 2 * 4 / 2**20
    whole, parts = (
        float(subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True).stdout)
        for path in both
    )
    assert whole > scores
    assert parts < scores / 2
