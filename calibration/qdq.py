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
            left over, each multiplied with the same codes of the weight. It costs a second product, and has 16 bits.
    """
    for group in groups:
        scale = weights.form.scale(amax[group.name], kind).astype(group.kind)
        for linear in group.linears:
            # The weight's node comes first: ONNX Runtime visits a product's later input before the earlier one, and so
            # widened all weights of an FP8 graph before its first product (16 of 16 MiB: 1.1 GB, in this order 89 MB).
            weight = _round_weight(model.graph, linear, weights, kind)
            rounded = _round_input(model.graph, linear, linear.input, scale, weights.form, "input")
            if group.name in twice:
                _add_remainder(model.graph, linear, scale, weights, kind)
            linear.matmul.replace_input_with(0, rounded)
            linear.matmul.replace_input_with(1, weight)
    _drop_unused(model.graph)


def _add_remainder(graph: ir.Graph, linear: Linear, scale: Array, weights: Weights, kind: np.dtype) -> None:
    """``y = x1 W' + x2 W'``: x2 is the rounded difference of x and the rounded x1. No pair is shared (see _round_input)."""
    name, form, matmul = linear.name, weights.form, linear.matmul
    weight = _round_weight(graph, linear, weights, kind, "/remainder")
    again = _round_input(graph, linear, linear.input, scale, form, "input_again")
    rest = ir.node("Sub", [linear.input, again], name=f"{name}/remainder")
    describe(rest, f"{name}/remainder/exact", again.dtype, linear.input.shape)
    graph.insert_before(matmul, rest)
    assert form.remainder is not None, f"{form.name} has no second step"
    deployed = np.asarray(scale * form.remainder, kind)  # the twin's is the same, widened
    small = deployed.astype(scale.dtype)
    rounded = _round_input(graph, linear, rest.outputs[0], small, form, "remainder")
    second = ir.node("MatMul", [rounded, weight], name=f"{name}/remainder/product")
    output = matmul.outputs[0]
    describe(second, f"{name}/remainder/part", weight.dtype, output.shape)
    total = ir.node("Add", [output, second.outputs[0]], name=f"{name}/both")
    for user, place in tuple(output.uses()):
        if user is not total:
            user.replace_input_with(place, total.outputs[0])
    describe(total, f"{name}/sum", weight.dtype, output.shape)
    graph.insert_before(matmul, second)
    graph.insert_after(matmul, total)


def _round_input(graph: ir.Graph, linear: Linear, value: ir.Value, scale: Array, form: Format, what: str) -> ir.Value:
    """A Q/DQ pair for each Linear, even where several read one tensor with one scale.

    ONNX Runtime fuses a pair into the integer product only when nothing else reads it: with one pair shared by q, k and v,
    7 of the demo's 21 decoder Linears ran on integers, with a pair each all 21 do.
    """
    name = f"{linear.name}/{what}"
    scale_value = initialiser(graph, f"{name}{SCALE}", scale)
    zero = initialiser(graph, f"{name}_zero", np.zeros((), form.code))  # also tells QuantizeLinear the type
    quantise = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{name}/quantise")
    describe(quantise, f"{name}/codes", form.onnx, value.shape)
    restore = ir.node("DequantizeLinear", [quantise.outputs[0], scale_value, zero], name=f"{name}/dequantise")
    describe(restore, f"{name}/rounded", ir.DataType.from_numpy(scale.dtype), value.shape)
    graph.insert_before(linear.matmul, [quantise, restore])
    return restore.outputs[0]


def _round_weight(graph: ir.Graph, linear: Linear, weights: Weights, kind: np.dtype, suffix: str = "") -> ir.Value:
    """The codes lie as the product reads them, (in, out), so axis 1 is the output channel and the Transpose goes.

    Where a Transpose follows, ONNX Runtime folds it when it opens the graph, and keeps 8 bytes a code beside the codes:
    a 3B bundle did not open in 24 GB.
    """
    name = str(linear.stored.name)
    codes, scale = weights.codes_and_scale(linear, kind)
    # Each reader names its codes and its zero itself, though the bytes are one: for processors without VNNI, ONNX Runtime
    # turns int8 weights into uint8 at each reader, and fails where two of them read the same names.
    codes_value, scale_value = external(graph, codes, suffix), external(graph, scale)
    compute = ir.DataType.from_numpy(linear.kind)
    nodes = []
    if scale.dtype != compute:  # the twin: one scale on disk serves both graphs
        cast = ir.node("Cast", [scale_value], {"to": compute}, name=f"{name}{SCALE}/cast{suffix}")
        scale_value = describe(cast, f"{name}{SCALE}/wide{suffix}", compute, scale.shape)
        nodes.append(cast)
    zero = initialiser(graph, f"{name}_zero{suffix}", np.zeros(tuple(scale.shape.numpy()), weights.form.code))
    attributes = {"axis": 1} if weights.form.per_channel else {}
    restore = ir.node(
        "DequantizeLinear", [codes_value, scale_value, zero], attributes, name=f"{name}/dequantise{suffix}"
    )
    describe(restore, f"{name}/rounded{suffix}", compute, codes.shape)
    graph.insert_before(linear.matmul, [*nodes, restore])
    return restore.outputs[0]


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


def external(graph: ir.Graph, tensor: ir.ExternalTensor, suffix: str = "") -> ir.Value:
    """The initialiser of that tensor and suffix: a new one, or the one that is there.

    It owns what it refers to by: writing a graph gives a tensor its initialiser's name, and ``tensor`` is every graph's.
    """
    name = f"{tensor.name}{suffix}"
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
