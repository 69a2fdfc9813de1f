"""Insert explicit Q/DQ around Linears, ONNX to ONNX: the one form of quantisation that TensorRT 10.3 to 11 all take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .formats import FORMATS, Format
from .linears import Group, Linear, read_tensor
from .smoothing import Changes, smooth

Array = NDArray[Any]
CODES, SCALE = "_quantised", "_scale"


class Weights:
    """Codes, scales and smoothed values, made once, kept as raw files in ``folder/work``, shared by all graphs.

    Args:
        folder: what the external tensors of all graphs are relative to.
        changes: the smoothing of each parameter.
    """

    def __init__(self, folder: Path, form: Format, changes: Changes) -> None:
        self.folder, self.form, self.changes = folder, form, changes
        self._made: dict[str, ir.ExternalTensor] = {}
        (folder / "work").mkdir(exist_ok=True)

    def read(self, value: ir.Value) -> Array:
        """An initialiser's values after smoothing, in its stored type."""
        return smooth(self.changes, str(value.name), read_tensor(self.folder, value.const_value))

    def codes_and_scale(self, linear: Linear, kind: np.dtype) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """A weight's codes (in, out), as products read them, and its scale, (out,) or (), of ``kind``."""
        name = str(linear.stored.name)
        if name + CODES not in self._made:
            values = np.asarray(self.read(linear.stored), np.float32)
            scale = self.form.weight_scale(values, kind)
            self._keep(name + CODES, self.form.quantise(values, scale[:, None] if self.form.per_channel else scale).T)
            self._keep(name + SCALE, scale)
        return self._made[name + CODES], self._made[name + SCALE]

    def table(self, stored: ir.Value, kind: np.dtype) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """A table's INT8 codes (rows, columns), whatever the Linears' format, and its rows' scales (rows, 1) of ``kind``."""
        name = str(stored.name)
        if name + CODES not in self._made:
            form, values = FORMATS["int8"], np.asarray(self.read(stored), np.float32)
            scales = form.weight_scale(values, kind)[:, None]
            self._keep(name + CODES, form.quantise(values, scales))
            self._keep(name + SCALE, scales)
        return self._made[name + CODES], self._made[name + SCALE]

    def smoothed(self, value: ir.Value) -> ir.ExternalTensor:
        """An initialiser that smoothing changes, on disk."""
        name = str(value.name)
        if name not in self._made:
            self._keep(name, self.read(value))
        return self._made[name]

    def _keep(self, name: str, array: Array) -> None:
        location = f"work/{len(self._made)}.bin"
        (self.folder / location).write_bytes(np.ascontiguousarray(array).tobytes())
        kind = ir.DataType.from_numpy(array.dtype)
        self._made[name] = ir.ExternalTensor(
            location, 0, array.nbytes, kind, shape=ir.Shape(array.shape), name=name, base_dir=str(self.folder)
        )


def insert_qdq(
    model: ir.Model,
    groups: Sequence[Group],
    amax: Mapping[str, float],
    weights: Weights,
    kind: np.dtype,
    twice: Collection[str] = (),
) -> None:
    """Quantise and dequantise the inputs and weights of ``groups``, in place.

    Args:
        groups: groups of this very model.
        amax: range of each group's input, by the group's name.
        kind: the type that the deployed graph computes in, to which all scales are rounded. The float32 twin of a bf16
            graph gets the same numbers, widened.
        twice: names of groups whose input is quantised in two steps: its codes, then the codes of what their rounding
            left over, both multiplied with the same codes of the weight. It costs a second product; its input has 16 bits
            in INT8, and twice the significant bits in FP8.
    """
    for group in groups:
        scale = weights.form.scale(amax[group.name], kind).astype(group.kind)
        values = group.input
        if group.name in twice:
            values = _stack_remainder(model.graph, group, scale, weights.form)
        for linear in group.linears:
            # The weight's node comes first: ONNX Runtime visits a product's later input before the earlier one, and so
            # widened all weights of an FP8 graph before its first product (16 of 16 MiB: 1.1 GB, in this order 89 MB).
            weight = _round_weight(model.graph, linear, weights, kind)
            rounded = _round_input(model.graph, linear.matmul, values, scale, weights.form, f"{linear.name}/input")
            linear.matmul.replace_input_with(0, rounded)
            linear.matmul.replace_input_with(1, weight)
            if group.name in twice:
                _add_halves(model.graph, linear, weights.form)
    _drop_unused(model.graph)


def _stack_remainder(graph: ir.Graph, group: Group, scale: Array, form: Format) -> ir.Value:
    """``[x, (x - DQ(Q(x))) / remainder]``, (2, ...): what rounding leaves over, magnified until it has the range of x.

    One product then takes both with one scale. With two products, each with its own scale, TensorRT-RTX 1.7.1 crashed where
    FP8 was in a bf16 or fp16 graph for compute capability 8.9.
    """
    first, x = group.linears[0], group.input
    name, before, kind, shape = first.name, first.matmul, ir.DataType.from_numpy(group.kind), x.shape
    assert shape is not None
    rounded = _round_input(graph, before, x, scale, form, f"{name}/first")
    zero = initialiser(graph, "axis_0", np.zeros(1, np.int64))
    factor = initialiser(graph, f"{name}/magnify", np.asarray(1 / form.remainder, group.kind))
    one, two = ir.Shape([1, *shape]), ir.Shape([2, *shape])

    def add(op: str, inputs: list[ir.Value], what: str, size: ir.Shape, **attributes: int) -> ir.Value:
        node = new_node(op, inputs, f"{name}/{what}", kind, size, **attributes)
        graph.insert_before(before, node)
        return node.outputs[0]

    rest = add("Sub", [x, rounded], "rest", shape)
    rest = add("Mul", [rest, factor], "magnified", shape)
    halves = [add("Unsqueeze", [v, zero], what, one) for v, what in ((x, "upper"), (rest, "lower"))]
    return add("Concat", halves, "stacked", two, axis=0)


def _add_halves(graph: ir.Graph, linear: Linear, form: Format) -> None:
    """``y[0] + y[1] * remainder`` wherever the product was used."""
    name, product = linear.name, linear.matmul.outputs[0]
    shape, kind = product.shape, product.dtype
    assert shape is not None
    assert kind is not None
    users = tuple(product.uses())
    product.shape = ir.Shape([2, *shape])
    factor = initialiser(graph, f"{name}/reduce", np.asarray(form.remainder, kind.numpy()))
    place = [initialiser(graph, f"index_{index}", np.array(index, np.int64)) for index in range(2)]
    upper, lower = (
        new_node("Gather", [product, at], f"{name}/half_{k}", kind, shape, axis=0) for k, at in enumerate(place)
    )
    small = new_node("Mul", [lower.outputs[0], factor], f"{name}/reduced", kind, shape)
    total = new_node("Add", [upper.outputs[0], small.outputs[0]], f"{name}/sum", kind, shape)
    graph.insert_after(linear.matmul, [upper, lower, small, total])
    for user, position in users:
        user.replace_input_with(position, total.outputs[0])


def _round_input(graph: ir.Graph, before: ir.Node, value: ir.Value, scale: Array, form: Format, name: str) -> ir.Value:
    """A Q/DQ pair for each Linear, even where several read one tensor with one scale.

    ONNX Runtime fuses a pair into the integer product only when nothing else reads it: with one pair shared by q, k and v,
    7 of the demo's 21 decoder Linears ran on integers, with a pair each all 21 do.
    """
    scale_value = initialiser(graph, f"{name}{SCALE}", scale)
    zero = initialiser(graph, f"{name}_zero", np.zeros((), form.code))  # also tells QuantizeLinear the type
    quantise = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{name}/quantise")
    describe(quantise, f"{name}/codes", form.onnx, value.shape)
    restore = ir.node("DequantizeLinear", [quantise.outputs[0], scale_value, zero], name=f"{name}/dequantise")
    describe(restore, f"{name}/rounded", ir.DataType.from_numpy(scale.dtype), value.shape)
    graph.insert_before(before, [quantise, restore])
    return restore.outputs[0]


def _round_weight(graph: ir.Graph, linear: Linear, weights: Weights, kind: np.dtype) -> ir.Value:
    """The codes lie as the product reads them, (in, out), so axis 1 is the output channel and the Transpose goes.

    Where a Transpose follows, ONNX Runtime folds it when it opens the graph, and keeps 8 bytes a code beside the codes:
    a 3B bundle did not open in 24 GB.
    """
    name = str(linear.stored.name)
    codes, scale = weights.codes_and_scale(linear, kind)
    codes_value, scale_value = external(graph, codes), external(graph, scale)
    compute = ir.DataType.from_numpy(linear.kind)
    nodes = []
    if scale.dtype != compute:  # the twin: one scale on disk serves both graphs
        cast = ir.node("Cast", [scale_value], {"to": compute}, name=f"{name}{SCALE}/cast")
        scale_value = describe(cast, f"{name}{SCALE}/wide", compute, scale.shape)
        nodes.append(cast)
    zero = initialiser(graph, f"{name}_zero", np.zeros(tuple(scale.shape.numpy()), weights.form.code))
    attributes = {"axis": 1} if weights.form.per_channel else {}
    restore = ir.node("DequantizeLinear", [codes_value, scale_value, zero], attributes, name=f"{name}/dequantise")
    describe(restore, f"{name}/rounded", compute, codes.shape)
    graph.insert_before(linear.matmul, [*nodes, restore])
    return restore.outputs[0]


def new_node(
    op: str, inputs: Sequence[ir.Value | None], name: str, kind: ir.DataType, shape: ir.Shape | None, **attributes: int
) -> ir.Node:
    """A node whose one output is ``<name>/out``; in no graph yet."""
    node = ir.node(op, inputs, attributes, name=name)
    describe(node, f"{name}/out", kind, shape)
    return node


def describe(node: ir.Node, name: str, kind: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    """A node's output, named and typed."""
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, kind, shape
    return output


def initialiser(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new one, or the one that has this name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(value)
    return value


def external(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """The initialiser of that tensor: a new one, or the one that is there.

    It owns what it refers to by: writing a graph gives a tensor its initialiser's name, and ``tensor`` is every graph's.
    """
    name = str(tensor.name)
    if name in graph.initializers:
        return graph.initializers[name]
    place = tensor.location, tensor.offset, tensor.nbytes
    own = ir.ExternalTensor(*place, tensor.dtype, shape=tensor.shape, name=name, base_dir=tensor.base_dir)
    value = ir.Value(name=name, shape=own.shape, type=ir.TensorType(own.dtype), const_value=own)
    graph.initializers.add(value)
    return value


def _drop_unused(graph: ir.Graph) -> None:
    """Remove casts, transposes and initialisers that nothing reads any more."""
    for node in reversed(tuple(graph)):
        if (
            node.op_type in ("Cast", "Transpose")
            and not node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
        ):
            graph.remove(node, safe=True)
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
