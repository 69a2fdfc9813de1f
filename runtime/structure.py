"""Whether a bundle's graphs and weights fit together, for a bundle that has no golden vectors or is too large to replay.

Read from the files themselves: operators, inputs, outputs, and the range of bytes that each weight takes. Then, where
ONNX Runtime is installed, it opens each graph that it can run, with weights left on disk.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import BundleError, describe_unusable
from .frozen import find_frozen
from .manifest import DEFAULT_OPSET, LANGUAGE, SCORER, VISION, Bundle, cpu_graph
from .protobuf import Fields, messages, read_fields, text

log = logging.getLogger(__name__)

# Every operator a graph of the default opset may hold. All are in the ONNX-TensorRT 10.3 operator table
# (github.com/onnx/onnx-tensorrt/blob/release/10.3-GA/docs/operators.md), the parser that JetPack 6.2 ships.
OPERATORS = frozenset(
    "Add And Cast Clip Concat Constant Cos Div Erf Expand Gather GreaterOrEqual Greater Identity LessOrEqual Less "
    "MatMul Max Min Mul Neg Not Pow Range Reciprocal ReduceMax ReduceMean ReduceSum Reshape Shape Sigmoid Sin Slice "
    "Softmax Sqrt Squeeze Sub Transpose Unsqueeze Where".split()
)
FUSED = frozenset({"Attention", "RMSNormalization"})  # opset 23's, for parsers from TensorRT 10.15 on
QUANTISED = frozenset({"QuantizeLinear", "DequantizeLinear"})
Signature = tuple[set[str], set[str]]
# CONTRIBUTING.md: inputs and output of each graph.
SIGNATURES: dict[str, Signature] = {
    VISION: ({"patches", "patch_positions", "patch_mask"}, {"image_embeddings"}),
    LANGUAGE: ({"token_ids", "image_rows", "image_embeddings", "positions", "mask", "rows"}, {"embeddings"}),
    SCORER: ({"queries", "candidates"}, {"scores"}),
}
# onnx.proto: ModelProto.graph; GraphProto.node, .initializer, .input, .output; NodeProto.op_type; ValueInfoProto.name;
# TensorProto.dims, .data_type, .name, .external_data; StringStringEntryProto.key, .value.
GRAPH, NODE, INITIALIZER, INPUT, OUTPUT, OP_TYPE, VALUE_NAME = 7, 1, 5, 11, 12, 4, 1
DIMS, DATA_TYPE, TENSOR_NAME, EXTERNAL, KEY, VALUE = 1, 2, 8, 13, 1, 2
# TensorProto.DataType: float, uint8, int8, int32, int64, bool, float16, bfloat16, float8e4m3fn.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2, 17: 1}


def allowed_operators(opset: int) -> frozenset[str]:
    """Every operator that a graph of this opset may hold, Q/DQ aside."""
    return OPERATORS if opset == DEFAULT_OPSET else OPERATORS | FUSED


@dataclass(frozen=True)
class GraphRecord:
    """One graph: how many nodes, and how many weights of how many bytes it reads from ``files``."""

    name: str
    nodes: int
    weights: int
    weight_bytes: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.nodes} nodes, {self.weights} weights, {self.weight_bytes:,} bytes in {len(self.files)} files"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_structure(bundle: Bundle) -> list[GraphRecord]:
    """Check every graph of an opened bundle.

    Raises:
        BundleError: a graph is missing or damaged, holds an operator outside the list, has other inputs or outputs, or
            reads a weight from beyond a file or from a file that the manifest does not name.
    """
    inputs, outputs = SIGNATURES[LANGUAGE]
    frozen = dict.fromkeys(find_frozen(bundle.manifest), (inputs - {"rows"}, outputs))
    fixed = {
        name: signature for name, signature in SIGNATURES.items() if name != SCORER or name in bundle.manifest.files
    }
    expected = fixed | frozen
    twins = {name: cpu_graph(name) for name in expected if cpu_graph(name) in bundle.manifest.files}
    records = [_check_graph(bundle, name, expected[name]) for name in expected]
    records += [_check_graph(bundle, twin, expected[name]) for name, twin in twins.items()]
    _open_graphs(bundle, [twins.get(name, name) for name in expected])
    return records


def _check_graph(bundle: Bundle, name: str, expected: Signature) -> GraphRecord:
    path, manifest = bundle.path(name), bundle.manifest
    try:
        graph = read_fields(messages(read_fields(path.read_bytes()), GRAPH)[0])
        weights = [_weight_range(read_fields(tensor)) for tensor in messages(graph, INITIALIZER)]
        operators = Counter(text(read_fields(node), OP_TYPE) for node in messages(graph, NODE))
        inputs, outputs = (
            {text(read_fields(end), VALUE_NAME) for end in messages(graph, kind)} for kind in (INPUT, OUTPUT)
        )
        defaults = {text(read_fields(tensor), TENSOR_NAME) for tensor in messages(graph, INITIALIZER)}
    except (ValueError, IndexError, KeyError):
        raise BundleError(f"{path} is not an ONNX graph; export again") from None
    strange = sorted(
        set(operators) - allowed_operators(manifest.opset) - (QUANTISED if manifest.quantization else frozenset())
    )
    if strange:
        raise BundleError(f"{path} holds operators outside the allow-list: {', '.join(strange)}")
    needed = inputs - defaults  # a quantised token table is an input with a default
    if (needed, outputs) != expected:
        raise BundleError(
            f"{path} takes {sorted(needed)} and gives {sorted(outputs)}, not {list(map(sorted, expected))}"
        )
    external = [weight for weight in weights if weight is not None]
    for weight in external:
        _check_range(bundle, path, *weight)
    files = tuple(sorted({location for _, location, *_ in external}))
    return GraphRecord(name, operators.total(), len(external), sum(weight[3] for weight in external), files)


Range = tuple[str, str, int, int, int]  # name, file, offset, length, and the length that shape and type ask for


def _weight_range(tensor: Fields) -> Range | None:
    """Where an external tensor lies; None for one inside the graph."""
    entries = {text(pair, KEY): text(pair, VALUE) for pair in map(read_fields, messages(tensor, EXTERNAL))}
    if not entries:
        return None
    dims = [value for number, value in tensor if number == DIMS and isinstance(value, int)]
    kind = next(value for number, value in tensor if number == DATA_TYPE and isinstance(value, int))
    wanted = prod(dims) * ITEM_BYTES[kind]
    return text(tensor, TENSOR_NAME), entries["location"], int(entries.get("offset", 0)), int(entries["length"]), wanted


def _check_range(bundle: Bundle, graph: Path, name: str, location: str, offset: int, length: int, wanted: int) -> None:
    record = bundle.manifest.files.get(location)
    if record is None:
        raise BundleError(f"{graph} reads {name} from {location}, which the manifest does not name")
    if length != wanted or offset < 0 or offset + length > record.bytes:
        raise BundleError(
            f"{graph} reads {name} ({wanted} bytes) from {offset}..{offset + length} of {location}, which has {record.bytes}"
        )


def _open_graphs(bundle: Bundle, graphs: list[str]) -> None:
    """Open what ONNX Runtime's CPU provider can run: the float32 twins of narrow graphs, else the graphs."""
    try:
        from .session_ort import OrtSession
    except ImportError as error:
        log.warning("graphs and weights were read, but no graph was opened: onnxruntime %s", describe_unusable(error))
        return
    quantised = bundle.manifest.quantization is not None
    for (
        name
    ) in graphs:  # ONNX Runtime does not open INT8 groups in two steps without folding, and codes are small enough
        OrtSession(bundle.path(name), lean=not quantised, quantised=quantised).close()
