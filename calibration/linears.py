"""Find the Linears of a traced graph, and group those that read one tensor: they share its scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.runtime.errors import BundleError
from metaembed.runtime.finite import count_not_finite
from metaembed.runtime.manifest import LANGUAGE, VISION

GRAPHS = (VISION, LANGUAGE)
WEIGHT = ".weight"
HEAD = "custom_text_proj"  # stays high: every rounding there reaches the embedding unmixed


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ Transpose(weight)``: a module of the checkpoint, and where it stands in a graph.

    Attributes:
        name: of the module, for example ``language_model.layers.0.mlp.up_proj``.
        stored: the initialiser, (out, in).
        weight: what the Transpose reads: the initialiser, or its Cast to the type that the graph computes in.
    """

    name: str
    matmul: ir.Node
    stored: ir.Value
    weight: ir.Value

    @property
    def input(self) -> ir.Value:
        value = self.matmul.inputs[0]
        assert value is not None
        return value

    @property
    def size(self) -> int:
        """Weights: also the multiply-adds that one row of input costs."""
        return int(np.prod(self.stored.shape.numpy()))

    @cached_property
    def kind(self) -> np.dtype:
        """The type that the graph computes in."""
        cast = self.weight.producer()
        return (self.stored.dtype if cast is None else ir.DataType(cast.attributes["to"].as_int())).numpy()


@dataclass(frozen=True, eq=False)
class Group:
    """Linears of one graph that read the same tensor, and are quantised, or kept high, together."""

    name: str
    graph: str
    linears: tuple[Linear, ...]

    @property
    def input(self) -> ir.Value:
        return self.linears[0].input

    @property
    def size(self) -> int:
        return sum(linear.size for linear in self.linears)

    @property
    def kind(self) -> np.dtype:
        return self.linears[0].kind


def load_graphs(folder: Path) -> dict[str, ir.Model]:
    """Both graphs of a bundle; weights stay on disk."""
    return {name: ir.load(folder / name) for name in GRAPHS}


def find_groups(graphs: Mapping[str, ir.Model]) -> list[Group]:
    """All groups of Linears, in the order in which they run.

    Raises:
        BundleError: a graph has none, which would make every later share and sum meaningless.
    """
    found = []
    for graph, model in graphs.items():
        by_input: dict[str, list[Linear]] = {}
        for linear in find_linears(model):
            by_input.setdefault(str(linear.input.name), []).append(linear)
        if not by_input:
            raise BundleError(f"{graph} holds no Linear that could be quantised")
        found += [Group(name_group([x.name for x in same]), graph, tuple(same)) for same in by_input.values()]
    return found


def find_linears(model: ir.Model) -> Iterator[Linear]:
    """Linears in graph order. The patch embedding (a reshaped Conv3d) does not match, and the head is left out."""
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        cast = weight.producer()
        stored = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else weight
        name = str(stored.name)
        if stored.is_initializer() and name.endswith(WEIGHT) and not name.startswith(HEAD):
            yield Linear(name.removesuffix(WEIGHT), node, stored, weight)


def name_group(names: Sequence[str]) -> str:
    """``layers.0.mlp.{gate_proj,up_proj}``: the module that holds them all, and their own names in braces."""
    if len(names) == 1:
        return names[0]
    parents, own = zip(*(name.rsplit(".", 1) for name in names), strict=True)
    return f"{parents[0]}.{{{','.join(own)}}}"


def read_tensor(folder: Path, tensor: ir.TensorProtocol) -> NDArray:
    """The values of an initialiser; external ones memory-mapped from the bundle's folder.

    onnx-ir's own reader refuses hard links, which a bundle's weight files are.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(tensor.shape.numpy())
    return np.memmap(folder / tensor.location, tensor.dtype.numpy(), "r", tensor.offset or 0, shape)


def check_finite(folder: Path, models: Iterable[ir.Model]) -> None:
    """Refuse weights with NaN or infinity, by name and file.

    Raises:
        BundleError: the first such weight, with how many of its values are affected.
    """
    for model in models:
        for name, value in model.graph.initializers.items():
            values = read_tensor(folder, value.const_value)
            if value.dtype.is_floating_point() and (count := count_not_finite(values)):
                file = getattr(value.const_value, "location", "the graph")
                raise BundleError(
                    f"weight {name} in {folder}/{file} holds {count} values that are NaN or infinite; nothing can be scaled"
                )
