"""MaxSim against float64 brute force, written as the formula reads."""

import importlib
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed.runtime import maxsim_native
from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import UsageError
from metaembed.runtime.int8 import dequantize_int8, quantize_int8
from metaembed.runtime.maxsim import maxsim

module = importlib.import_module("metaembed.runtime.maxsim")  # the package exports a function of that name
N, R, D = 3, 5, 7
STORAGE = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def unit(rng, *shape, dtype=np.float32):
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(dtype)


def brute_force(queries, candidates):
    """sum_i max_j <q_i, c_j> in float64, one pair at a time."""
    return np.array(
        [
            [sum(max(np.dot(q, c) for c in item) for q in query) for item in candidates.astype(np.float64)]
            for query in queries.astype(np.float64)
        ]
    ).reshape(len(queries), len(candidates))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("q", "r_q", "n", "r_c", "d"), [(2, 4, N, R, D), (1, 1, 1, 1, 1), (3, 16, 5, 2, 130), (2, 3, 41, 64, 33)]
)
def test_scores_equal_float64_brute_force(dtype, q, r_q, n, r_c, d):
    rng = np.random.default_rng(0)
    queries, candidates = unit(rng, q, r_q, d), unit(rng, n, r_c, d, dtype=dtype)
    scores = maxsim(queries, candidates)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, brute_force(queries, candidates), rtol=0, atol=2e-6 * r_q)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(0, 20), st.integers(1, 9), st.integers(1, 70), st.integers(1, 200)
)
def test_tiles_of_any_size_give_the_same_scores(q, r_q, n, r_c, d, tile_floats):
    """Brute force judges; the tile is shrunk so that every loop runs more than once."""
    rng = np.random.default_rng(n)
    queries, candidates = unit(rng, q, r_q, d), unit(rng, n, r_c, d, dtype=ml_dtypes.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_FLOATS", tile_floats)
        scores = module.maxsim_reference(queries, [candidates])
    np.testing.assert_allclose(scores, brute_force(queries, candidates), rtol=0, atol=2e-6 * r_q)


def test_budget_equals_slicing_both_sides():
    rng = np.random.default_rng(1)
    queries, candidates = unit(rng, 2, 6, D), unit(rng, N, R, D)
    expected = brute_force(queries[:, :2], candidates[:, :4])
    np.testing.assert_allclose(maxsim(queries, candidates, Budget(2, 4)), expected, atol=1e-6)


def test_one_query_may_come_without_its_axis():
    rng = np.random.default_rng(2)
    query, candidates = unit(rng, 4, D), unit(rng, N, R, D)
    np.testing.assert_array_equal(maxsim(query, candidates), maxsim(query[None], candidates))


def test_non_contiguous_arrays_score_as_their_copies():
    rng = np.random.default_rng(3)
    queries = unit(rng, D, 4, 2).transpose(2, 1, 0)
    candidates = unit(rng, 2 * N, 2 * R, 3 * D)[::-2, ::2, ::3]
    np.testing.assert_allclose(maxsim(queries, candidates), brute_force(queries, candidates), atol=4e-6)


def test_no_candidates_give_an_empty_row_per_query():
    assert maxsim(np.ones((2, 4, D), np.float32), np.ones((0, R, D), np.float32)).shape == (2, 0)


def test_no_queries_give_no_rows():
    assert maxsim(np.ones((0, 4, D), np.float32), np.ones((N, R, D), np.float32)).shape == (0, N)


def test_int8_candidates_score_as_the_values_they_stand_for():
    rng = np.random.default_rng(4)
    queries, stored = unit(rng, 2, 4, 33), quantize_int8(unit(rng, N, R, 33))
    np.testing.assert_allclose(maxsim(queries, stored), brute_force(queries, dequantize_int8(stored)), atol=8e-6)
    assert maxsim(queries, stored, Budget(1, 2)).shape == (2, N)


def test_int8_codes_are_within_half_a_step():
    """Half of each vector's largest magnitude / 127, the definition of rounding; a zero vector stays zero."""
    vectors = np.random.default_rng(5).standard_normal((N, R, D)).astype(np.float32)
    vectors[1, 2] = 0
    error = np.abs(dequantize_int8(quantize_int8(vectors)) - vectors)
    assert (error <= np.abs(vectors).max(axis=-1, keepdims=True) / 127 / 2 * (1 + 1e-5)).all()


def test_int8_codes_of_denormal_numbers_are_within_half_a_step():
    """Float64 over whole multiples of the smallest number, 2**-149, from where a scale would round to 0 to where it is normal."""
    unit_ = 2.0**-149
    for largest in (np.arange(1, 50_000), np.arange(2**29, 2**31, 2**20)):
        vectors = np.stack([largest, -largest, largest // 3, largest // 254, 0 * largest], axis=-1) * unit_  # (n, d)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantized = quantize_int8(vectors[:, None].astype(np.float32))
        codes, scales = quantized.codes[:, 0].astype(np.float64), quantized.scales.astype(np.float64)
        values = vectors.astype(np.float32).astype(np.float64)
        ideal = np.abs(values).max(axis=-1, keepdims=True) / 127
        assert (np.abs(codes) <= 127).all()
        assert (np.sign(codes[:, :2]) == [1, -1]).all()
        assert (codes * values >= 0).all()
        assert (np.abs(scales - ideal) < np.maximum(1.01 * unit_, ideal * 2.0**-23)).all()
        assert (np.abs(codes * scales - values) <= scales / 2 * (1 + 1e-5)).all()


@pytest.fixture(params=["kernels", "numpy"])
def path(request, monkeypatch):
    """Both ways to a score; the first is numpy's too where there are no kernels."""
    if request.param == "numpy":
        monkeypatch.setattr(maxsim_native, "library", lambda: None)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["queries", "candidates"])
def test_a_value_that_is_not_finite_is_refused(value, side):
    """Minus infinity would hide behind the maximum; it is named all the same."""
    rng = np.random.default_rng(6)
    arrays = {"queries": unit(rng, 2, 4, D), "candidates": unit(rng, N, R, D)}
    arrays[side][1, 3, 2] = value
    with pytest.raises(UsageError, match="candidate 1 has" if side == "candidates" else "candidate 0 has"):
        maxsim(**arrays)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", STORAGE)
def test_minus_infinity_behind_a_maximum_is_refused(dtype):
    """By hand: -2 times 3e38 is beyond float32, and less than the 1 times 3e38 of the vector behind it."""
    queries, candidates = (
        np.array([[[3e38]]], np.float32),
        np.array([[[1], [1]], [[-2], [1]], [[0.5], [1]]]).astype(dtype),
    )
    with pytest.raises(UsageError, match="candidate 1 has"):
        maxsim(queries, candidates)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_overflows_is_refused(dtype, sign):
    """By hand: a maximum of 3e38 is finite, two of them are 6e38, beyond float32's 3.4e38. One query of two vectors has both."""
    queries = np.array([[[sign * 3e38], [0.5]], [[sign * 3e38], [sign * 3e38]]], np.float32)
    candidates = np.array([[[0.25]], [[1]], [[0.5]]]).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match="candidate 1 has"):
            maxsim(queries, candidates)
        (scores,) = module.score_parts(queries, [([candidates], None)])
        np.testing.assert_array_equal(np.isfinite(scores), [[True, True, True], [True, False, True]])
        np.testing.assert_allclose(
            maxsim(queries[:1], candidates), sign * np.array([[0.75e38, 3e38, 1.5e38]]), rtol=1e-2
        )


@pytest.mark.parametrize(
    ("queries", "candidates", "sentence"),
    [
        (np.ones((2, 4, 7), np.float32), np.ones((3, 5, 8), np.float32), "queries have 7 dims and candidates 8"),
        (np.ones(7, np.float32), np.ones((3, 5, 7), np.float32), r"queries have shape \(7,\)"),
        (np.ones((4, 7), np.float32), np.ones((5, 7), np.float32), r"candidates have shape \(5, 7\)"),
        (np.ones((4, 7), np.float32), np.ones((3, 0, 7), np.float32), "at least one vector"),
        (np.ones((4, 7), np.int64), np.ones((3, 5, 7), np.float32), "queries are int64"),
        (np.ones((4, 7), np.float32), np.ones((3, 5, 7), np.int8), "candidates are int8"),
    ],
)
def test_shapes_and_types_that_do_not_fit_get_one_sentence(queries, candidates, sentence):
    with pytest.raises(UsageError, match=sentence):
        maxsim(queries, candidates)


def test_a_budget_beyond_the_vectors_is_refused():
    with pytest.raises(UsageError, match="asks for 8 candidate Meta Tokens"):
        maxsim(np.ones((1, 4, D), np.float32), np.ones((N, R, D), np.float32), Budget(4, 8))
    for budget in (8, (4, 2), "4,2"):
        with pytest.raises(UsageError, match="a budget is a Budget"):
            maxsim(np.ones((1, 4, D), np.float32), np.ones((N, R, D), np.float32), budget)


def test_memory_stays_within_a_few_tiles():
    """numpy's own allocation tracing; the whole score tensor would be 64 MiB, all candidates in float32 32 MiB."""
    import tracemalloc

    queries = np.ones((1, 64, 32), np.float32)
    candidates = np.ones((4096, 64, 32), ml_dtypes.bfloat16)
    tracemalloc.start()
    maxsim(queries, candidates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * 4 * module.TILE_FLOATS
