"""Other quantisers on the same graphs and the same calibration feeds: onnxruntime's static quantisation, NVIDIA ModelOpt."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.calibration.dataset import CalibrationItem
from metaembed.calibration.linears import Linear, find_linears, load_graphs, read_tensor
from metaembed.calibration.observe import encode_item
from metaembed.calibration.sessions import ExactSession
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle
from metaembed.runtime.session import Arrays

Feeds = Mapping[str, Sequence[Arrays]]
SCRIPT = Path(__file__).with_name("modelopt_ptq.py")
MODELOPT_LIMIT_S = 3600


@dataclass(frozen=True)
class Method:
    """One way to use a tool. ``linears_only``: on the Linears that ours may quantise, not on the tool's own choice."""

    name: str
    linears_only: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)


ONNXRUNTIME = (
    Method("onnxruntime MinMax linears", True, {"calibrate_method": "MinMax"}),
    Method("onnxruntime MinMax all MatMuls", False, {"calibrate_method": "MinMax"}),
    Method("onnxruntime Entropy linears", True, {"calibrate_method": "Entropy"}),
    Method("onnxruntime Percentile linears", True, {"calibrate_method": "Percentile"}),
)
MODELOPT = (
    Method("ModelOpt int8 defaults", False, {"quantize_mode": "int8"}),
    Method("ModelOpt int8 max linears", True, {"quantize_mode": "int8", "calibration_method": "max"}),
    Method("ModelOpt fp8 defaults", False, {"quantize_mode": "fp8"}),
    Method("ModelOpt fp8 max linears", True, {"quantize_mode": "fp8", "calibration_method": "max"}),
)


class Recorder:
    """A session that keeps the feeds it is given."""

    def __init__(self, session: ExactSession) -> None:
        self._session = session
        self.feeds: list[Arrays] = []
        self.description, self.inputs, self.max_items = session.description, session.inputs, session.max_items

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.feeds.append(dict(feeds))
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()


def record_feeds(bundle: Bundle, items: Iterable[CalibrationItem], threads: int) -> dict[str, list[Arrays]]:
    """What each graph is fed when the items are encoded at the largest budget."""
    models = load_graphs(bundle.folder)
    recorders = {
        name: Recorder(ExactSession(models[name], bundle.folder, threads=threads)) for name in (VISION, LANGUAGE)
    }
    with Encoder(bundle, *recorders.values()) as encoder:
        for item in items:
            encode_item(encoder, item)
    return {name: recorder.feeds for name, recorder in recorders.items()}


def write_plain_graphs(bundle: Bundle, folder: Path) -> dict[str, list[str]]:
    """Both graphs as these tools like them: weights inside, those of Linears transposed for good, so that they are seen to be
    weights and get a scale per channel. Returns the names of the Linears' MatMuls, by graph."""
    folder.mkdir(parents=True)
    names = {}
    for graph, model in load_graphs(bundle.folder).items():
        linears = list(find_linears(model))
        for linear in linears:
            _fold_transpose(model, linear, bundle.folder)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(np.array(read_tensor(bundle.folder, value.const_value)), name=value.name)
        names[graph] = [str(linear.matmul.name) for linear in linears]
        ir.save(model, folder / graph)
    return names


def _fold_transpose(model: ir.Model, linear: Linear, folder: Path) -> None:
    transpose = linear.matmul.inputs[1].producer()
    assert transpose is not None
    values = np.ascontiguousarray(np.asarray(read_tensor(folder, linear.stored.const_value), linear.kind).T)
    name = f"{linear.stored.name}_transposed"
    tensor = ir.tensor(values, name=name)
    folded = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(folded)
    linear.matmul.replace_input_with(1, folded)
    model.graph.remove(transpose, safe=True)
    if not linear.stored.uses():
        del model.graph.initializers[str(linear.stored.name)]


def quantise_with_onnxruntime(
    method: Method, plain: Path, linears: Mapping[str, Sequence[str]], feeds: Feeds, folder: Path
) -> None:
    """onnxruntime's static quantisation: symmetric INT8, per-channel weights."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    folder.mkdir(parents=True)
    for graph, names in linears.items():
        quantize_static(
            plain / graph,
            folder / graph,
            _Reader(feeds[graph]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names) if method.linears_only else None,
            calibrate_method=getattr(CalibrationMethod, method.arguments["calibrate_method"]),
            # A stride of one input: histograms of all at once need inputs of one size.
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "CalibStridedMinMax": 1},
        )


class _Reader:
    """The calibration data reader that onnxruntime asks for."""

    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self._feeds = feeds
        self._rest = iter(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._rest = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Arrays | None:
        return next(self._rest, None)


def save_feeds(feeds: Feeds, folder: Path) -> None:
    """One npz a graph, for a quantiser in another process."""
    for graph, rows in feeds.items():
        arrays = {f"{place}/{name}": values for place, row in enumerate(rows) for name, values in row.items()}
        np.savez(folder / f"{graph}.npz", **arrays)


def quantise_with_modelopt(
    method: Method, python: Path, plain: Path, linears: Mapping[str, Sequence[str]], folder: Path
) -> None:
    """ModelOpt's ONNX quantisation, run by the Python of an environment that has it, on the feeds saved in ``plain``.

    Raises:
        MetaEmbedError: it failed; the last line that it wrote is quoted.
    """
    folder.mkdir(parents=True)
    for graph, names in linears.items():
        arguments = dict(method.arguments)
        if method.linears_only:
            arguments["nodes_to_quantize"] = [f"^{re.escape(name)}$" for name in names]
        files = {"graph": plain / graph, "feeds": plain / f"{graph}.npz", "output": folder / graph}
        job = folder / f"{graph}.json"
        job.write_text(json.dumps({key: str(path.resolve()) for key, path in files.items()} | {"arguments": arguments}))
        done = subprocess.run(
            [python, SCRIPT, job], capture_output=True, text=True, timeout=MODELOPT_LIMIT_S, check=False
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise MetaEmbedError(f"{method.name} failed on {graph}: {last[:300]}")
