"""The gate itself: expected values by hand or in float64, and every way in which it must not pass."""

import json
import math

import numpy as np
import pytest

from metaembed.runtime.errors import UsageError
from metaembed.runtime.parity import (
    TOLERANCES,
    ParityRecord,
    RankingRecord,
    Tolerance,
    compare,
    compare_rankings,
    require,
)

EXACT, LOOSE = TOLERANCES["fp32"], TOLERANCES["int8"]


@pytest.fixture
def embeddings() -> np.ndarray:
    """(n, r, d) = (3, 5, 7), L2-normalised."""
    values = np.random.default_rng(0).standard_normal((3, 5, 7))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("length", [1.002, 0.998, 128.0])
def test_vectors_that_were_not_normalised_fail_though_their_cosine_is_1(embeddings: np.ndarray, length: float):
    record = compare(embeddings, embeddings * length, LOOSE)
    assert record.min_cosine == pytest.approx(1.0, abs=1e-6)
    assert record.norm_error == pytest.approx(abs(length - 1), abs=1e-4)
    assert not record
    assert "a norm is off by" in str(record)
    assert compare(embeddings, embeddings * 1.0005, LOOSE), "bf16 rounds by less"


def test_the_tolerances_are_those_of_the_design():
    """The table of DESIGN.md, copied by hand: cosine, top-10 overlap, max abs."""
    table = {name: (t.cosine, t.overlap, t.max_abs) for name, t in TOLERANCES.items()}
    assert table == {
        "fp32": (0.999999, 1.0, 1e-5),
        "bf16": (0.999, 0.98, math.inf),
        "fp16": (0.999, 0.98, math.inf),
        "int8": (0.98, 0.95, math.inf),
        "fp8": (0.98, 0.95, math.inf),
    }


def test_equal_embeddings_pass(embeddings: np.ndarray):
    record = compare(embeddings, embeddings.copy(), EXACT)
    assert record
    assert (record.vectors, record.max_abs) == (15, 0.0)


def test_worst_vector_and_values_by_hand():
    """Item 1, vector 2 is turned by 0.1 rad in the plane of the first two dims: cosine cos(0.1), max abs sin(0.1)."""
    reference = np.zeros((2, 3, 4), np.float32)
    reference[..., 0] = 1
    turned = reference.copy()
    turned[1, 2, :2] = math.cos(0.1), math.sin(0.1)
    record = compare(reference, turned, LOOSE)
    assert record.worst == (1, 2)
    assert record.min_cosine == pytest.approx(math.cos(0.1), abs=1e-7)
    assert record.max_abs == pytest.approx(math.sin(0.1), abs=1e-7)
    assert record, "cos(0.1) = 0.995 is within int8's 0.98"
    assert not compare(reference, turned, TOLERANCES["bf16"]), "and outside bf16's 0.999"
    assert "item 1, vector 2" in str(record)


def test_one_value_off_by_more_than_max_abs_fails_fp32(embeddings: np.ndarray):
    off = embeddings.copy()
    off[2, 4, 6] += 2e-5
    record = compare(embeddings, off, EXACT)
    assert not record
    assert record.min_cosine >= EXACT.cosine, "the cosine alone would have let it pass"


def test_agreement_is_computed_in_float64():
    """In float32 the cosine of nearly equal vectors rounds to 1; in float64 it is 1 - 0.5e-8."""
    a = np.array([[[1.0, 0.0]]])
    b = np.array([[[1.0, 1e-4]]])
    assert compare(a, b, EXACT).min_cosine == pytest.approx(1 / math.sqrt(1 + 1e-8), abs=1e-15)


@pytest.mark.parametrize("axis", [0, 1])
def test_permuted_items_or_vectors_fail(embeddings: np.ndarray, axis: int):
    assert not compare(embeddings, np.roll(embeddings, 1, axis), LOOSE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["reference", "candidate", "both"])
def test_one_nan_or_infinity_fails(embeddings: np.ndarray, value: float, broken: str):
    bad = embeddings.copy()
    bad[1, 3, 2] = value
    pair = {"reference": (bad, embeddings), "candidate": (embeddings, bad), "both": (bad, bad)}[broken]
    record = compare(*pair, Tolerance(cosine=-1, overlap=0))
    assert not record
    assert record.worst == (1, 3)


def test_a_vector_of_zeros_fails(embeddings: np.ndarray):
    bad = embeddings.copy()
    bad[0, 1] = 0
    assert not compare(embeddings, bad, Tolerance(cosine=-1, overlap=0))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_nothing_compared_is_a_failure(shape: tuple[int, int, int]):
    record = compare(np.zeros(shape), np.zeros(shape), Tolerance(cosine=-1, overlap=0))
    assert not record
    assert "nothing" in str(record)


def test_no_record_of_nothing_passes():
    """Whatever its numbers say."""
    assert not ParityRecord(vectors=0, max_abs=0, min_cosine=1, worst=(0, 0), tolerance=LOOSE)
    assert not RankingRecord(queries=0, ranks=10, overlap=1, tolerance=LOOSE)


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 5, 6), (2, 5, 7), (15, 7), (1, 3, 5, 7)])
def test_other_shapes_are_refused(embeddings: np.ndarray, shape: tuple[int, ...]):
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(embeddings, np.zeros(shape), LOOSE)


def test_ranking_overlap_by_hand():
    """Query 0 keeps both of its top 2, query 1 keeps one of two: (1 + 0.5) / 2."""
    reference = np.array([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    candidate = np.array([[4.0, 5, 3, 2, 1], [5, 0, 3, 2, 1]])
    record = compare_rankings(reference, candidate, LOOSE, ranks=2)
    assert record.overlap == 0.75
    assert not record
    assert compare_rankings(reference, candidate, Tolerance(cosine=0, overlap=0.75), ranks=2)


def test_equal_scores_rank_equally():
    scores = np.random.default_rng(0).standard_normal((3, 40))
    assert compare_rankings(scores, scores * 2 + 1, EXACT)
    assert not compare_rankings(scores, -scores, LOOSE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("broken", ["reference", "candidate", "both"])
def test_a_nan_among_the_scores_fails(value: float, broken: str):
    scores = np.random.default_rng(0).standard_normal((3, 40))
    bad = scores.copy()
    bad[1, np.argmin(scores[1])] = value
    pair = {"reference": (bad, scores), "candidate": (scores, bad), "both": (bad, bad)}[broken]
    assert not compare_rankings(*pair, Tolerance(cosine=0, overlap=0))


def test_no_queries_rank_nothing():
    assert not compare_rankings(np.zeros((0, 40)), np.zeros((0, 40)), Tolerance(cosine=0, overlap=0))


@pytest.mark.parametrize(("shape", "other"), [((3, 40), (3, 41)), ((3, 10), (3, 10)), ((40,), (40,))])
def test_rankings_that_say_nothing_are_refused(shape: tuple[int, ...], other: tuple[int, ...]):
    with pytest.raises(UsageError):
        compare_rankings(np.zeros(shape), np.zeros(other), EXACT)


def test_require_names_every_failure_and_an_empty_list_is_one(embeddings: np.ndarray):
    good = compare(embeddings, embeddings, EXACT)
    bad = RankingRecord(queries=2, ranks=10, overlap=0.5, tolerance=EXACT)
    assert require([("a", good)]) == []
    assert [line.split(":")[0] for line in require([("a", good), ("b", bad), ("c", bad)])] == ["b", "c"]
    assert require([]) == ["nothing was compared"]


def test_records_are_json_and_say_whether_they_passed(embeddings: np.ndarray):
    assert json.loads(json.dumps(compare(embeddings, embeddings, EXACT).to_json()))["passed"] is True
    assert json.loads(json.dumps(compare(embeddings, -embeddings, EXACT).to_json()))["passed"] is False
