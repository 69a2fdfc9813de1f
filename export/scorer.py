"""MaxSim as one ONNX graph: a flat GEMM over a chunk of candidates, then max, then sum. For ONNX Runtime and TensorRT.

One GEMM and two reductions, because einsum and a broadcast MatMul hold all pairs several times over: 9.7 GB against
2.2 GB for 64 queries and 16,384 candidates. Shapes: q queries, n candidates, r vectors, d dims.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from metaembed.runtime.budget import Budget
from metaembed.runtime.manifest import SCORER

OPSET = 20
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def make_scorer(dim: int, budget: Budget | None = None, precision: str = "bf16") -> onnx.ModelProto:
    """``queries`` [q, r_q, d] and ``candidates`` [n, r_c, d] -> ``scores`` [q, n] float32, higher is better.

    score(q, c) = sum over query vectors of the max over candidate vectors of the dot product (arXiv 2004.12832,
    section 3.3). Values come in ``precision`` and are widened before the product: products of bf16 values are exact in
    float32 and in TensorFloat-32, and the sums stay float32. ``budget`` fixes r_q and r_c; without it they are dynamic.
    """
    rows, columns = (budget.query, budget.candidate) if budget else ("r_q", "r_c")
    kind = TYPES[precision]
    constants = {
        "flat": [-1, dim],
        "zero": [0],
        "one": [1],
        "two": [2],
        "keep_rows": [0, -1],
        "any": [-1],
        "last": [2],
        "middle": [1],
    }
    nodes = [
        _node("Cast", ["queries"], "wide_queries", to=TensorProto.FLOAT),
        _node("Cast", ["candidates"], "wide_candidates", to=TensorProto.FLOAT),
        _node("Reshape", ["wide_queries", "flat"], "query_rows"),  # (q * r_q, d)
        _node("Reshape", ["wide_candidates", "flat"], "candidate_rows"),  # (n * r_c, d)
        _node("Transpose", ["candidate_rows"], "candidate_columns", perm=[1, 0]),
        _node("MatMul", ["query_rows", "candidate_columns"], "dots"),  # (q * r_q, n * r_c)
        _node("Shape", ["queries"], "query_shape"),
        _node("Shape", ["candidates"], "candidate_shape"),
        _node("Slice", ["query_shape", "one", "two", "zero"], "r_q_size"),
        _node("Slice", ["candidate_shape", "zero", "one", "zero"], "n_size"),
        _node("Slice", ["candidate_shape", "one", "two", "zero"], "r_c_size"),
        _node("Concat", ["keep_rows", "r_c_size"], "by_candidate", axis=0),
        _node("Reshape", ["dots", "by_candidate"], "pairs"),  # (q * r_q, n, r_c)
        _node("ReduceMax", ["pairs", "last"], "best", keepdims=0),  # (q * r_q, n)
        _node("Concat", ["any", "r_q_size", "n_size"], "by_query", axis=0),
        _node("Reshape", ["best", "by_query"], "best_by_query"),  # (q, r_q, n)
        _node("ReduceSum", ["best_by_query", "middle"], "scores", keepdims=0),  # (q, n)
    ]
    graph = helper.make_graph(
        nodes,
        "maxsim",
        [
            helper.make_tensor_value_info("queries", kind, ["q", rows, dim]),
            helper.make_tensor_value_info("candidates", kind, ["n", columns, dim]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["q", "n"])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_scorer(folder: Path, dim: int, budget: Budget | None = None, precision: str = "bf16") -> None:
    """Write ``make_scorer``'s graph into a bundle's folder; it has no weights and takes 2 KB.

    ``precision`` is the bundle's own, so that the scorer builds wherever the bundle's other graphs do.
    """
    onnx.save(make_scorer(dim, budget, precision), folder / SCORER)


def _node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)
