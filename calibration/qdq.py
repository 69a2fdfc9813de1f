"""Insert explicit Q/DQ around Linears, ONNX to ONNX: the one form of quantisation that TensorRT 10.3 to 11 all take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .formats import Format
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
        """A weight's codes (out, in) and its scale, (out,) or (), of ``kind``."""
        name = str(linear.stored.name)
        if name + CODES not in self._made:
            values = np.asarray(self.read(linear.stored), np.float32)
            scale = self.form.weight_scale(values, kind)
            self._keep(name + CODES, self.form.quantise(values, scale[:, None] if self.form.per_channel else scale))
            self._keep(name + SCALE, scale)
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
    model: ir.Model, groups: Sequence[Group], amax: Mapping[str, float], weights: Weights, kind: np.dtype
) -> None:
    """Quantise and dequantise the inputs and weights of ``groups``, in place.

    Args:
        groups: groups of this very model.
        amax: range of each group's input, by the group's name.
        kind: the type that the deployed graph computes in, to which all scales are rounded. The float32 twin of a bf16
            graph gets the same numbers, widened.
    """
    for group in groups:
        scale = weights.form.scale(amax[group.name], kind).astype(group.kind)
        for linear in group.linears:
            linear.matmul.replace_input_with(0, _round_input(model.graph, linear, scale, weights.form))
            _round_weight(model.graph, linear, weights, kind)
    _drop_unused(model.graph)


def _round_input(graph: ir.Graph, linear: Linear, scale: Array, form: Format) -> ir.Value:
    """A Q/DQ pair for each Linear, even where several read one tensor with one scale.

    ONNX Runtime fuses a pair into the integer product only when nothing else reads it: with one pair shared by q, k and v,
    7 of the demo's 21 decoder Linears ran on integers, with a pair each all 21 do.
    """
    value, name = linear.input, linear.name
    scale_value = _initialiser(graph, f"{name}/input{SCALE}", scale)
    zero = _initialiser(graph, f"{name}/input_zero", np.zeros((), form.code))  # also tells QuantizeLinear the type
    quantise = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{name}/input/quantise")
    _describe(quantise, f"{name}/input/codes", form.onnx, value.shape)
    restore = ir.node("DequantizeLinear", [quantise.outputs[0], scale_value, zero], name=f"{name}/input/dequantise")
    _describe(restore, f"{name}/input/rounded", ir.DataType.from_numpy(scale.dtype), value.shape)
    graph.insert_before(linear.matmul, [quantise, restore])
    return restore.outputs[0]


def _round_weight(graph: ir.Graph, linear: Linear, weights: Weights, kind: np.dtype) -> None:
    """The codes keep the checkpoint's layout (out, in), before the Transpose, so axis 0 is the output channel."""
    name = str(linear.stored.name)
    codes, scale = weights.codes_and_scale(linear, kind)
    codes_value, scale_value = _external(graph, codes), _external(graph, scale)
    compute = ir.DataType.from_numpy(linear.kind)
    before = []
    if scale.dtype != compute:  # the twin: one scale on disk serves both graphs
        cast = ir.node("Cast", [scale_value], {"to": compute}, name=f"{name}{SCALE}/cast")
        scale_value = _describe(cast, f"{name}{SCALE}/wide", compute, scale.shape)
        before.append(cast)
    zero = _initialiser(graph, f"{name}_zero", np.zeros(tuple(scale.shape.numpy()), weights.form.code))
    attributes = {"axis": 0} if weights.form.per_channel else {}
    restore = ir.node("DequantizeLinear", [codes_value, scale_value, zero], attributes, name=f"{name}/dequantise")
    _describe(restore, f"{name}/rounded", compute, linear.stored.shape)
    transpose = linear.matmul.inputs[1].producer()
    graph.insert_before(transpose, [*before, restore])
    transpose.replace_input_with(0, restore.outputs[0])


def _describe(node: ir.Node, name: str, kind: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, kind, shape
    return output


def _initialiser(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(value)
    return value


def _external(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(value)
    return value


def _drop_unused(graph: ir.Graph) -> None:
    """Remove casts and initialisers that nothing reads any more."""
    for node in reversed(tuple(graph)):
        if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
