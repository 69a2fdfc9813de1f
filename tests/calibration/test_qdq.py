"""Q/DQ insertion on a small graph written by hand: results from integer arithmetic in numpy, structure counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from safetensors.numpy import load_file

from metaembed.calibration.formats import FORMATS
from metaembed.calibration.linears import check_finite, find_groups, read_tensor
from metaembed.calibration.packing import pack_weights
from metaembed.calibration.qdq import Weights, insert_qdq
from metaembed.calibration.sessions import ExactSession
from metaembed.runtime import session_ort
from metaembed.runtime.cpu import has_vnni
from metaembed.runtime.errors import BundleError
from metaembed.runtime.session_ort import OrtSession

B, T, K, N = 2, 3, 5, 7
SINGLE = np.dtype(np.float32)
RNG = np.random.default_rng(0)
PARAMETERS = {
    "layer.q_proj.weight": RNG.normal(0, 1, (N, K)).astype(np.float32),
    "layer.k_proj.weight": RNG.normal(0, 9, (N, K)).astype(np.float32),
    "layer.o_proj.weight": RNG.normal(0, 1, (K, N)).astype(np.float32),
    "layer.o_proj.bias": RNG.normal(0, 1, K).astype(np.float32),
    "custom_text_proj.weight": RNG.normal(0, 1, (K, K)).astype(np.float32),
}
X = RNG.normal(0, 1, (B, T, K)).astype(np.float32)
AMAX = {"layer.{q_proj,k_proj}": 2.0, "layer.o_proj": 50.0}  # 2.0 clips some of X


def write_graph(folder: Path, name: str, parameters: dict[str, np.ndarray] = PARAMETERS, inputs: int = K) -> ir.Model:
    """x -> q + k -> o + bias -> head, as the exporter writes Linears; weights external, behind an offset."""
    (folder / "weights").mkdir(exist_ok=True)
    nodes, tensors = [], []
    with (folder / "weights/w.bin").open("wb") as file:
        file.write(b"offset..")
        for key, array in parameters.items():
            tensor = onnx.numpy_helper.from_array(array, key)
            onnx.external_data_helper.set_external_data(tensor, "weights/w.bin", file.tell(), array.nbytes)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensors.append(tensor)
            file.write(array.tobytes())
    for linear, x in (("layer.q_proj", "x"), ("layer.k_proj", "x"), ("layer.o_proj", "qk"), ("custom_text_proj", "ob")):
        nodes.append(helper.make_node("Transpose", [f"{linear}.weight"], [f"{linear}/t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"{linear}/t"], [linear]))
        if linear == "layer.k_proj":
            nodes.append(helper.make_node("Add", ["layer.q_proj", linear], ["qk"]))
        if linear == "layer.o_proj":
            nodes.append(helper.make_node("Add", [linear, "layer.o_proj.bias"], ["ob"]))
    values = [
        helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, ["b", "t", inputs]) for v in ("x", "custom_text_proj")
    ]
    graph = helper.make_graph(nodes, name, values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / name)
    return ir.load(folder / name)


def quantised(tmp_path: Path, form: str) -> ir.Model:
    model = write_graph(tmp_path, "g.onnx")
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, Weights(tmp_path, FORMATS[form], {}), SINGLE)
    return model


def run(model: ir.Model, folder: Path) -> np.ndarray:
    return ExactSession(model, folder).run({"x": X})["custom_text_proj"]


def head(o: np.ndarray) -> np.ndarray:
    return (o + PARAMETERS["layer.o_proj.bias"]) @ PARAMETERS["custom_text_proj.weight"].T.astype(np.float64)


def test_int8_equals_integer_products_computed_by_hand(tmp_path):
    """Codes as integers, exact int64 products, scales in float64: nothing of the library's own quantiser."""

    def linear(x: np.ndarray, weight: np.ndarray, amax: float) -> np.ndarray:
        s = np.float32(amax) / np.float32(127)
        codes = np.clip(np.rint(x.astype(np.float32) / s), -128, 127).astype(np.int64)
        scales = (np.abs(weight).max(1) / 127).astype(np.float32)
        weight_codes = np.rint(weight / scales[:, None]).astype(np.int64)
        return (codes @ weight_codes.T) * (np.float64(s) * scales)

    q, k, o = (PARAMETERS[f"layer.{name}_proj.weight"] for name in "qko")
    expected = head(linear(linear(X, q, 2.0) + linear(X, k, 2.0), o, 50.0))
    np.testing.assert_allclose(run(quantised(tmp_path, "int8"), tmp_path), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("twice", [(), ("layer.{q_proj,k_proj}",)], ids=["one step", "two steps"])
def test_fp8_equals_values_rounded_to_e4m3_by_hand(tmp_path, twice):
    """E4M3 by its definition: 4 significant bits above 2^-6, steps of 2^-9 below, clipped at 448, in float64.

    In two steps what is left over is rounded too, sixteen times as large: half a unit of 4 bits, so that 4 more follow.
    """
    model = write_graph(tmp_path, "g.onnx")
    weights = Weights(tmp_path, FORMATS["fp8"], {})
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, weights, SINGLE, twice=twice)

    def e4m3(x: np.ndarray) -> np.ndarray:
        x = np.clip(x.astype(np.float64), -448, 448)
        step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6) - 3)
        return np.rint(x / step) * step

    def rounded(x: np.ndarray, s: np.float32) -> np.ndarray:
        return e4m3(x.astype(np.float32) / s) * np.float64(s)

    def linear(x: np.ndarray, weight: np.ndarray, amax: float, *, twice: bool = False) -> np.ndarray:
        s, w = np.float32(amax / 448), np.float32(np.abs(weight).max() / 448)
        first = rounded(x, s)
        second = rounded((x.astype(np.float32) - first.astype(np.float32)) * 16, s) / 16 if twice else 0.0
        return (first + second) @ e4m3(weight / w).T * np.float64(w)

    q, k, o = (PARAMETERS[f"layer.{name}_proj.weight"] for name in "qko")
    inner = linear(X, q, 2.0, twice=bool(twice)) + linear(X, k, 2.0, twice=bool(twice))
    np.testing.assert_allclose(run(model, tmp_path), head(linear(inner, o, 50.0)), rtol=1e-5, atol=1e-4)


def test_two_steps_equal_the_sum_of_two_integer_products_by_hand(tmp_path):
    """The remainder's scale is the input's / 256; what is clipped in the first step is clipped in the second."""
    model = write_graph(tmp_path, "g.onnx")
    weights = Weights(tmp_path, FORMATS["int8"], {})
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, weights, SINGLE, twice=("layer.{q_proj,k_proj}",))

    def rounded(x: np.ndarray, s: float) -> np.ndarray:
        return np.clip(np.rint(x / s), -128, 127) * s

    def linear(x: np.ndarray, weight: np.ndarray, amax: float, *, twice: bool) -> np.ndarray:
        s = np.float32(amax) / np.float32(127)
        first = rounded(x.astype(np.float32), s)
        second = rounded(x.astype(np.float32) - first.astype(np.float32), s / 256) if twice else 0.0
        scales = (np.abs(weight).max(1) / 127).astype(np.float32)
        return (first + second).astype(np.float64) @ (
            np.rint(weight / scales[:, None]) * scales[:, None].astype(float)
        ).T

    q, k, o = (PARAMETERS[f"layer.{name}_proj.weight"] for name in "qko")
    inner = linear(X, q, 2.0, twice=True) + linear(X, k, 2.0, twice=True)
    expected = head(linear(inner, o, 50.0, twice=False))
    np.testing.assert_allclose(run(model, tmp_path), expected, rtol=1e-5, atol=1e-4)
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["MatMul"], counts["DequantizeLinear"]) == (
        4,
        3 + 3 + 1,
    )  # one remainder for q and k, no weight twice
    ir.save(model, tmp_path / "quantised.onnx")
    onnx.checker.check_model(tmp_path / "quantised.onnx", full_check=True)


@pytest.mark.parametrize("vnni", [False, True])
def test_integer_kernels_take_two_steps_with_and_without_vnni(tmp_path, monkeypatch, vnni):
    """ONNX Runtime has other kernels for processors with VNNI; those for the rest are exact on every processor."""
    monkeypatch.setattr(session_ort, "has_vnni", lambda: vnni)
    model = write_graph(tmp_path, "g.onnx")
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, Weights(tmp_path, FORMATS["int8"], {}), SINGLE, twice=AMAX)
    exact = run(model, tmp_path)
    pack_weights([model], tmp_path, "int8")
    ir.save(model, tmp_path / "quantised.onnx")
    found = OrtSession(tmp_path / "quantised.onnx", quantised=True).run({"x": X})["custom_text_proj"]
    if not vnni or has_vnni():
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-3)


def test_two_steps_leave_a_hundredth_of_the_error_of_the_input():
    """Half a step of 1/127 becomes half a step of 1/32512, and a whole one at the ends: 128 codes are clipped to 127."""
    values = np.linspace(-3, 3, 10_001, dtype=np.float32)
    scale = FORMATS["int8"].scale(3.0, SINGLE)
    once = values - FORMATS["int8"].round_trip(values, scale)
    twice = once - FORMATS["int8"].round_trip(once, scale * np.float32(FORMATS["int8"].remainder))
    assert np.abs(twice).max() < np.abs(once).max() / 127
    assert (twice**2).mean() < (once**2).mean() / 40_000


def test_every_linear_has_its_own_pair_and_the_head_stays_high(tmp_path):
    """By hand: three inputs, two of them the same tensor with the same scale, and three weights; not the head's."""
    model = quantised(tmp_path, "int8")
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"], counts["MatMul"]) == (3, 3 + 3, 4)
    scales = [model.graph.initializers[f"layer.{name}_proj/input_scale"].const_value.numpy() for name in "qk"]
    assert scales[0] == scales[1] == np.float32(2.0) / np.float32(127)
    assert "custom_text_proj.weight" in model.graph.initializers
    assert "layer.q_proj.weight" not in model.graph.initializers
    ir.save(model, tmp_path / "quantised.onnx")
    onnx.checker.check_model(tmp_path / "quantised.onnx", full_check=True)


OPEN = """
import sys
from pathlib import Path
from metaembed.runtime.session_ort import OrtSession

def anonymous():
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(status.split()[0]) * 1024

before = anonymous()
session = OrtSession(Path(sys.argv[1]), quantised=True)
print(anonymous() - before)
"""


def test_an_open_session_keeps_few_bytes_a_code(tmp_path):
    """At most a copy made unsigned and a packed one, and a byte of slack. It was 10 bytes with a Transpose after the codes."""
    side = 2048
    rng = np.random.default_rng(3)
    names = ("layer.q_proj", "layer.k_proj", "layer.o_proj", "custom_text_proj")
    big = {f"{name}.weight": rng.standard_normal((side, side)).astype(np.float32) for name in names}
    big["layer.o_proj.bias"] = np.zeros(side, np.float32)
    model = write_graph(tmp_path, "g.onnx", big, side)
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, Weights(tmp_path, FORMATS["int8"], {}), SINGLE)
    assert [node.op_type for node in model.graph].count("Transpose") == 1  # the head's
    pack_weights([model], tmp_path, "int8")
    ir.save(model, tmp_path / "quantised.onnx")
    command = [sys.executable, "-c", OPEN, tmp_path / "quantised.onnx"]
    kept = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    codes, head = 3 * side**2, 2 * 4 * side**2  # the head: folded, and packed
    assert codes <= kept <= 3 * codes + head + 16e6


def test_a_group_left_out_is_left_as_it_was(tmp_path):
    model = write_graph(tmp_path, "g.onnx")
    groups = [group for group in find_groups({"g.onnx": model}) if group.name == "layer.o_proj"]
    insert_qdq(model, groups, AMAX, Weights(tmp_path, FORMATS["int8"], {}), SINGLE)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
    assert "layer.q_proj.weight" in model.graph.initializers


def test_bf16_scales_are_stored_in_bf16_and_codes_made_with_them(tmp_path):
    """The scale that TensorRT will read is the rounded one: codes * scale is within half a step of the weight."""
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in PARAMETERS.items()}
    model = write_graph(tmp_path, "g.onnx", narrow)
    kind = np.dtype(ml_dtypes.bfloat16)
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, Weights(tmp_path, FORMATS["int8"], {}), kind)
    values = model.graph.initializers
    codes, scale = (
        read_tensor(tmp_path, values[f"layer.q_proj.weight{end}"].const_value) for end in ("_quantised", "_scale")
    )
    assert scale.dtype == values["layer.q_proj/input_scale"].const_value.numpy().dtype == kind
    wide = scale.astype(np.float64)[:, None]
    assert codes.shape == (K, N)
    codes = codes.T
    error = np.abs(codes * wide - narrow["layer.q_proj.weight"].astype(np.float64))
    clipped = np.abs(codes) == 127
    assert (error[~clipped] <= wide.repeat(K, 1)[~clipped] / 2 * 1.0001).all()


def test_packed_weights_are_stored_once_and_give_the_same_result(tmp_path):
    one, two = quantised(tmp_path, "int8"), ir.load(tmp_path / "g.onnx")
    weights = Weights(tmp_path, FORMATS["int8"], {})
    insert_qdq(two, find_groups({"g.onnx": two}), AMAX, weights, SINGLE)
    before = run(two, tmp_path)
    pack_weights([two, two], tmp_path, "int8")
    np.testing.assert_array_equal(run(two, tmp_path), before)
    np.testing.assert_array_equal(run(one, tmp_path), before)
    stored = load_file(tmp_path / "weights/int8-01.safetensors")
    assert {name: array.nbytes for name, array in stored.items()} == {
        f"layer.{name}_proj.weight_quantised": N * K for name in "qko"
    }
    assert set(load_file(tmp_path / "weights/high-01.safetensors")) == {
        *(f"layer.{name}_proj.weight_scale" for name in "qko"),
        "layer.o_proj.bias",
        "custom_text_proj.weight",
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value):
    bad = PARAMETERS["layer.k_proj.weight"].copy()
    bad[2, 3] = value
    model = write_graph(tmp_path, "g.onnx", {**PARAMETERS, "layer.k_proj.weight": bad})
    with pytest.raises(
        BundleError, match=r"layer.k_proj.weight in \S+/weights/w.bin holds 1 values that are NaN or infinite"
    ):
        check_finite(tmp_path, [model])


@pytest.mark.parametrize("twice", [(), ("layer.{q_proj,k_proj}", "layer.o_proj")], ids=["one step", "two steps"])
def test_a_weight_is_widened_when_its_product_comes_not_all_of_them_before_the_first(tmp_path: Path, twice: tuple):
    """By ONNX Runtime's own profile: all at once, a 3B FP8 bundle would take 13 GB beside its codes on a CPU."""
    model = write_graph(tmp_path, "g.onnx")
    insert_qdq(model, find_groups({"g.onnx": model}), AMAX, Weights(tmp_path, FORMATS["fp8"], {}), SINGLE, twice=twice)
    ir.save(model, tmp_path / "quantised.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(tmp_path / "quantised.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": X})
    events = json.loads(Path(session.end_profiling()).read_bytes())
    ran = [(event["args"]["op_name"], event["name"]) for event in events if event["name"].endswith("_kernel_time")]
    wide = [(op != "MatMul") - (op == "MatMul") for op, name in ran if op == "MatMul" or ".weight/dequantise" in name]
    assert wide == [1, -1] * 3 + [-1], "the head's product, the last, has no widened weight"
