"""INT8 and FP8 numbers: expected values from tables, from float64 by hand, and from ONNX's own reference evaluator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from metaembed.calibration.formats import FORMATS, find_format
from metaembed.runtime.errors import UsageError

SINGLE = np.dtype(np.float32)


def test_int8_codes_are_counted_by_hand():
    """Scale 0.5: 0.75 / 0.5 = 1.5 and 1.25 / 0.5 = 2.5 tie to the even 2; 100 is clipped to 127, never to -128."""
    codes = FORMATS["int8"].quantise(np.array([0.0, 0.75, 1.25, -0.26, 100.0, -100.0]), np.float32(0.5))
    assert codes.tolist() == [0, 2, 2, -1, 127, -127]


def test_fp8_codes_are_those_of_the_e4m3_table():
    """arXiv 2209.05433, table 1: largest 448, smallest normal 2^-6, smallest subnormal 2^-9; 3 bits of mantissa."""
    values = np.array([448.0, 1000.0, 2.0**-6, 2.0**-9, 2.0**-10, 17.0, 19.0])
    codes = FORMATS["fp8"].quantise(values, np.float32(1))
    # 17 and 19 lie between the neighbours 16, 18 and 20: ties go to the even mantissa.
    assert codes.astype(float).tolist() == [448, 448, 2**-6, 2**-9, 0, 16, 20]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_round_trip_equals_the_reference_evaluator_of_onnx(name):
    form = FORMATS[name]
    values = np.random.default_rng(0).normal(0, 3, (5, 7)).astype(np.float32)
    scale = form.scale(np.abs(values).max(), SINGLE)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "roundtrip",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, values.shape)],
        [
            onnx.numpy_helper.from_array(scale, "s"),
            helper.make_tensor("z", int(form.onnx), [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": values})
    np.testing.assert_array_equal(form.round_trip(values, scale), expected)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_codes_are_made_with_the_scale_as_it_is_stored(kind):
    """1 / 127 has no short form: bf16 rounds it to 2^-7 * 1.0078125, so the code of 1.0 is round(127.0039...) = 127."""
    scale = FORMATS["int8"].scale(1.0, np.dtype(kind))
    assert scale.dtype == kind
    expected = round(1.0 / float(scale))
    assert FORMATS["int8"].quantise(np.array([1.0]), scale) == min(expected, 127)


def test_weights_have_a_scale_per_output_channel_in_int8_and_one_in_fp8():
    weight = np.array([[1.0, -127.0, 3.0], [0.0, 0.0, 0.0], [254.0, 5.0, 7.0]])
    assert FORMATS["int8"].weight_scale(weight, SINGLE).tolist() == [1.0, 1.0, 2.0]  # the dead channel gets 1, not 0
    assert FORMATS["fp8"].weight_scale(weight, SINGLE) == np.float32(254 / 448)


def test_a_scale_never_underflows_to_zero():
    """1e-9 / 127 is below the smallest float16, 6e-8."""
    assert FORMATS["int8"].scale(1e-9, np.dtype(np.float16)) > 0


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(UsageError, match="'int4' is not one of int8, fp8"):
        find_format("int4")
