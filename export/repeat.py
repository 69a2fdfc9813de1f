"""Deep graphs from shallow traces: layers of one kind differ in their weights' names only, so one traced layer serves all.

Tracing 7B whole took 223 s (language) and 141 s (vision) on two contended cores; three layers take seconds. A test holds
the result against a whole trace: same operators, same uses of each weight, same outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

from metaembed.runtime.errors import BundleError

SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of torch's exporter: the modules that a node came from


def repeat_layers(model: ir.Model, stack: str, plan: Sequence[int]) -> None:
    """Replace the traced layers of ``stack`` by ``len(plan)`` layers, in place.

    Args:
        model: an optimised trace, its nodes still carrying torch's metadata.
        stack: name of the module list, for example ``language_model.layers``.
        plan: for every layer of the deep model, which traced layer to copy; the first must be 0 and is kept.
    """
    graph = model.graph
    traced = _nodes_by_layer(graph, stack)
    if plan[0] != 0 or sorted(traced) != list(range(max(plan) + 1)):
        raise BundleError(f"{stack}: a plan {list(plan)} does not fit the traced layers {sorted(traced)}")
    ends = {layer: nodes[-1].outputs[0] for layer, nodes in traced.items()}
    last = traced[max(traced)][-1]
    final_users = [use for use in ends[max(traced)].uses() if use.node not in traced[max(traced)]]
    originals = {name: value for name, value in graph.initializers.items() if _layer_of(name, stack) not in (None, 0)}
    x, added, weights = ends[0], [], {}
    for layer, source in enumerate(plan[1:], start=1):
        own = {
            value: _renamed(value, f"{stack}.{source}.", f"{stack}.{layer}.")
            for name, value in originals.items()
            if _layer_of(name, stack) == source
        }
        nodes, x = _copy_layer(traced[source], {**own, ends[source - 1]: x}, layer)
        added += nodes
        weights.update({value.name: value for value in own.values()})
    graph.insert_after(last, added)
    for node, index in final_users:
        node.replace_input_with(index, x)
    for name in originals:
        originals[name].name = f"{name}/traced"  # frees the name; the value goes with its node
    _drop_traced(model, originals.values())
    for value in weights.values():
        graph.initializers.add(value)
    passes.CommonSubexpressionEliminationPass()(model)  # copies of what all layers share


def _nodes_by_layer(graph: ir.Graph, stack: str) -> dict[int, list[ir.Node]]:
    found: dict[int, list[ir.Node]] = {}
    for node in graph:
        scopes = node.metadata_props.get(SCOPES, "")
        start = scopes.find(f"'{stack}.")
        if start >= 0:
            number = scopes[start + len(stack) + 2 :].split("'")[0].split(".")[0]
            found.setdefault(int(number), []).append(node)
    return found


def _layer_of(name: str, stack: str) -> int | None:
    head, _, rest = name.partition(f"{stack}.")
    return int(rest.split(".")[0]) if rest and not head else None


def _renamed(value: ir.Value, old: str, new: str) -> ir.Value:
    assert value.name is not None
    return ir.Value(name=value.name.replace(old, new, 1), shape=value.shape, type=value.type)


def _copy_layer(
    nodes: Sequence[ir.Node], replaced: Mapping[ir.Value, ir.Value], layer: int
) -> tuple[list[ir.Node], ir.Value]:
    """Copies of a layer's nodes with some values replaced; also the copy of the last output."""
    values = dict(replaced)
    copies = []
    for node in nodes:
        outputs = [ir.Value(name=f"{out.name}/{layer}", shape=out.shape, type=out.type) for out in node.outputs]
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        copies.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                outputs=outputs,
                name=f"{node.name}/{layer}",
            )
        )
        values.update(zip(node.outputs, outputs, strict=True))
    return copies, copies[-1].outputs[0]


def _drop_traced(model: ir.Model, weights: Sequence[ir.Value]) -> None:
    """Remove the copied originals. What they computed for several layers (a mask's reshaping) stays, since it is used."""
    passes.RemoveUnusedNodesPass()(model)
    kept = [value.name for value in weights if value.uses()]
    if kept:
        raise BundleError(f"the traced layers cannot be told apart: {kept[0]} is used outside its own layer")
