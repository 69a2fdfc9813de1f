"""The token table in INT8, a scale per row: most of the weights that are no Linear's (8 % of all of 3B's)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from metaembed.runtime.tensors import TOKEN_TABLE

from .qdq import Weights, external, initialiser, new_node


@dataclass(frozen=True, eq=False)
class TokenTable:
    """``Gather(table, ids)``: rows (b, t, hidden) of the table (vocab, hidden), in its stored type.

    Attributes:
        stored: the initialiser.
        rows: the rows as the graph computes with them: the Gather's output, or its Cast in a float32 twin.
    """

    gather: ir.Node
    stored: ir.Value
    rows: ir.Value


def find_table(model: ir.Model) -> TokenTable | None:
    """Where a graph looks its tokens up; None in a graph that does not."""
    value = model.graph.initializers.get(TOKEN_TABLE)
    if value is None:
        return None
    ((gather, _),) = value.uses()
    rows = gather.outputs[0]
    (user, *others), _ = zip(*rows.uses(), strict=True)
    return TokenTable(gather, value, user.outputs[0] if user.op_type == "Cast" and not others else rows)


def quantise_table(graph: ir.Graph, table: TokenTable, weights: Weights, kind: np.dtype) -> None:
    """``rows = DQ(Reshape(Q(Gather(DQ(codes), ids)))) * Gather(scales, ids)``, in place; all Q and DQ have the scale 1.

    A ``Gather`` of codes would say the same, but TensorRT-RTX 1.7.1 refuses it ("Quantized constant is only allowed before
    DQ"). Of this form it keeps the codes in its plan, with no room for a widened table. ONNX Runtime's CPU provider makes a
    ``Gather`` of codes of it, if both pairs of Q and DQ have one type when it looks. Two of its rewrites come first and
    would change one pair each: int8 to uint8 activations on x86, which the ``Reshape`` (of nothing) keeps from seeing the
    second pair, and int8 to uint8 constants where there is no VNNI; so the codes are no constant but the default of an input.

    Args:
        kind: the type that the deployed graph computes in, to which the rows' scales are rounded.
    """
    gather, ids, name = table.gather, table.gather.inputs[1], str(table.stored.name)
    codes, scales = weights.table(table.stored, kind)
    stored = external(graph, codes)
    graph.inputs.append(stored)
    compute, shape = table.rows.dtype, table.rows.shape
    assert compute is not None
    assert shape is not None
    one = initialiser(graph, f"{name}_one", np.ones((), compute.numpy()))
    zero = initialiser(graph, f"{name}_zero", np.zeros((), np.int8))
    keep = initialiser(graph, f"{name}_shape", np.zeros(len(shape), np.int64))  # of each axis, its own size

    widen = new_node("DequantizeLinear", [stored, one, zero], f"{name}/dequantise", compute, codes.shape)
    round_ = new_node("QuantizeLinear", [gather.outputs[0], one, zero], f"{name}/round", ir.DataType.INT8, shape)
    same = new_node("Reshape", [round_.outputs[0], keep], f"{name}/reshape", ir.DataType.INT8, shape)
    steps = new_node("DequantizeLinear", [same.outputs[0], one, zero], f"{name}/steps", compute, shape)
    each = ir.Shape([*shape[:-1], 1])
    scale = [new_node("Gather", [external(graph, scales), ids], f"{name}/scale", scales.dtype, each)]
    if scales.dtype != compute:  # the twin: one scale on disk serves both graphs
        scale.append(new_node("Cast", [scale[0].outputs[0]], f"{name}/wide_scale", compute, each, to=compute))
    rows = new_node("Mul", [steps.outputs[0], scale[-1].outputs[0]], f"{name}/rows", compute, shape)

    for user, place in tuple(table.rows.uses()):
        user.replace_input_with(place, rows.outputs[0])
    if table.rows is not gather.outputs[0]:
        graph.remove(table.rows.producer(), safe=True)
    round_.replace_input_with(0, gather.outputs[0])
    gather.replace_input_with(0, widen.outputs[0])
    gather.outputs[0].dtype = compute
    graph.insert_before(gather, widen)
    graph.insert_after(gather, [round_, same, steps, *scale, rows])
    del graph.initializers[TOKEN_TABLE]
