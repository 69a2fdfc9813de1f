"""Whole-image attention part by part, for graphs that compute in float32: all its scores never exist at once.

Qwen2.5-VL's 16 heads have 1 GiB of scores for an image of 1,024 visual tokens and 16 GiB for one of 4,096. In bf16 and fp16
TensorRT fuses attention and keeps none, but only where it sees it whole: those graphs stay as they were traced.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

PARTS = 16  # of the queries: 64 patches a window always divide by it


def attend_in_parts(model: ir.Model) -> None:
    """Rewrite softmax(q k' + bias) v of a vision graph's whole-image blocks into ``PARTS`` equal runs of queries, in place.

    Each row's sums stay what they were. Attention inside windows has the fixed length 64 and is left alone.

    Raises:
        ValueError: a softmax of open length is not of that form, or its bias differs between queries.
    """
    graph = model.graph
    softmaxes = [node for node in graph if node.op_type == "Softmax" and not isinstance(node.inputs[0].shape[-1], int)]
    if not softmaxes:
        return
    head_size = _maker(_maker(softmaxes[0].inputs[0], "Add").inputs[0], "MatMul").inputs[0].shape[-1]
    # (i, h, s, e) -> (i, h, PARTS, s / PARTS, e); a 0 keeps the axis in that place
    constants = {"attention_parts": np.array([0, 0, PARTS, -1, head_size])}
    constants |= {f"attention_part_{part}": np.array(part) for part in range(PARTS)}
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()]
    for value in values:
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
        graph.register_initializer(value)
    for softmax in softmaxes:
        _split(graph, softmax, *values)


def _split(graph: ir.Graph, softmax: ir.Node, shape: ir.Value, *places: ir.Value) -> None:
    add = _maker(softmax.inputs[0], "Add")
    first, bias = _maker(add.inputs[0], "MatMul"), add.inputs[1]
    ((last, _),) = softmax.outputs[0].uses()
    if last.op_type != "MatMul" or bias.shape[-2] != 1:
        raise ValueError(f"{softmax.name} is not attention over a whole image")
    (queries, keys), values = first.inputs, last.inputs[1]
    tape, mixed = Tape(), []
    parts = tape.op("Reshape", [queries, shape])
    for place in places:
        part = tape.op("Gather", [parts, place], {"axis": 2})  # (i, h, s / PARTS, e)
        scores = tape.op("Add", [tape.op("MatMul", [part, keys]), bias])  # (i, h, s / PARTS, s)
        mixed.append(tape.op("MatMul", [tape.op("Softmax", [scores], {"axis": -1}), values]))
    whole = tape.op("Concat", mixed, {"axis": 2})
    ir.convenience.replace_nodes_and_values(graph, last, [first, add, softmax, last], tape.nodes, last.outputs, [whole])


def _maker(value: ir.Value, kind: str) -> ir.Node:
    """The node that computes a value, of the kind that it must be."""
    node = value.producer()
    if node is None or node.op_type != kind:
        raise ValueError(f"{value.name} does not come from {kind}")
    return node
