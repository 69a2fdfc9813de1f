"""What happens to a traced graph before it is written: optimise, point the weights at safetensors shards, check operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnxscript import optimizer

from metaembed.runtime.errors import BundleError
from metaembed.runtime.structure import allowed_operators


@dataclass(frozen=True)
class WeightRef:
    """Where the bytes of one tensor lie: raw little-endian row-major, as in safetensors."""

    location: str  # relative to the graph's folder
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]


def optimise(model: ir.Model) -> None:
    """Fold constants and remove dead nodes, in place, without touching the weights.

    The weights become graph inputs meanwhile: the optimiser would fold ``Transpose(weight)`` and inline the result.
    """
    graph = model.graph
    weights = weights_of(model)
    for value in weights:
        del graph.initializers[value.name]
    graph.inputs.extend(weights)
    optimizer.optimize_ir(model)
    for value in weights:
        graph.inputs.remove(value)
        graph.initializers.add(value)


def weights_of(model: ir.Model) -> list[ir.Value]:
    """The initialisers that a trace left without values: the weights."""
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def attach_weights(model: ir.Model, refs: Mapping[str, WeightRef]) -> None:
    """Point every weight of the graph at its bytes; a weight stored in another type gets one Cast behind it.

    Raises:
        BundleError: a weight of the graph has no bytes, or bytes of another shape.
    """
    graph = model.graph
    for value in weights_of(model):
        name, ref = value.name, refs.get(value.name)
        if ref is None or tuple(ref.shape) != tuple(value.shape.numpy()):
            found = "is missing" if ref is None else f"has shape {list(ref.shape)}"
            raise BundleError(f"weight {name} {found}; the graph needs {[int(size) for size in value.shape]}")
        tensor = ir.ExternalTensor(
            ref.location, ref.offset, ref.length, ref.dtype, shape=ir.Shape(ref.shape), name=name
        )
        if ref.dtype != value.dtype:
            wide = value.dtype
            value.type = ir.TensorType(
                ref.dtype
            )  # not value.dtype = ..., which changes every value that shares the type
            _cast_after(graph, value, wide)
        value.const_value = tensor


def _cast_after(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Give every user of ``value`` a cast of it; rows of a table are gathered first, then cast."""
    users = tuple(value.uses())
    gathers = [node for node, index in users if node.op_type == "Gather" and index == 0]
    for node in gathers:
        output = node.outputs[0]
        output.type = ir.TensorType(value.dtype)
        _replace_users(graph, output, tuple(output.uses()), dtype, after=node)
    others = tuple((node, index) for node, index in users if node not in gathers)
    if others:
        _replace_users(graph, value, others, dtype, after=None)


def _replace_users(
    graph: ir.Graph, value: ir.Value, users: Sequence[tuple[ir.Node, int]], dtype: ir.DataType, after: ir.Node | None
) -> None:
    cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/cast")
    cast.outputs[0].name = f"{value.name}/{dtype.name.lower()}"
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
    if after is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(after, cast)


def widen_for_cpu(model: ir.Model, narrow: ir.DataType) -> None:
    """Make a bf16 or fp16 graph, weights attached, compute in float32 from the same bytes, in place.

    ONNX Runtime's CPU provider has no bf16 MatMul, Add, Softmax or Where. For the CPU only: in TensorRT the casts would
    double the weights and hide the fused attention.
    """
    graph, wide = model.graph, ir.DataType.FLOAT
    weights = {value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)}
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", wide)
        if node.op_type == "Constant":
            raise BundleError("a Constant node is left in the graph; constants must be initialisers")
    for value in tuple(graph.initializers.values()):
        if value.dtype != narrow:
            continue
        if value in weights:
            _cast_after(graph, value, wide)
        else:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(wide)
    for node in tuple(graph):  # what was a cast between the two types
        ends = (*node.inputs, *node.outputs)
        if node.op_type == "Cast" and all(end.dtype == wide for end in ends) and not ends[1].is_graph_output():
            ends[1].replace_all_uses_with(ends[0])
            graph.remove(node, safe=True)


def check_operators(model: ir.Model) -> None:
    """Raise BundleError when the graph holds an operator outside its opset's list, which a TensorRT parser might refuse."""
    allowed = allowed_operators(model.opset_imports[""])
    strange = sorted({node.op_identifier()[1] for node in model.graph.all_nodes()} - allowed)
    if strange or model.functions:
        raise BundleError(
            f"the traced graph holds operators outside the allow-list: {', '.join(strange) or 'functions'}"
        )


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph, without torch's metadata (stack traces, paths); weights stay where they are."""
    for owner in (model, model.graph, *model.graph.all_nodes()):
        owner.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    ir.save(model, path)
