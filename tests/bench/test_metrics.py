"""Retrieval metrics against trec_eval itself (the package pytrec-eval-terrier)."""

import numpy as np
import pytest

from metaembed.bench.metrics import mean_reciprocal_rank, ndcg, recall

pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec-eval-terrier is not installed")


@pytest.fixture
def ranking():
    """7 queries over 30 candidates without ties, 1 to 9 of them relevant."""
    rng = np.random.default_rng(3)
    scores = rng.permuted(np.tile(np.arange(30.0), (7, 1)), axis=1)
    relevant = [sorted(rng.permutation(30)[: rng.integers(1, 10)].tolist()) for _ in range(7)]
    return scores, relevant


def trec_eval(scores, relevant, measure):
    truth = {f"q{q}": {f"c{c}": 1 for c in wanted} for q, wanted in enumerate(relevant)}
    run = {f"q{q}": {f"c{c}": float(score) for c, score in enumerate(row)} for q, row in enumerate(scores)}
    per_query = pytrec_eval.RelevanceEvaluator(truth, {measure}).evaluate(run)
    return np.mean([next(iter(values.values())) for values in per_query.values()])


@pytest.mark.parametrize("cutoff", [1, 5, 10])
def test_ndcg_equals_trec_eval(ranking, cutoff):
    assert ndcg(*ranking, cutoff) == pytest.approx(trec_eval(*ranking, f"ndcg_cut.{cutoff}"))


@pytest.mark.parametrize("cutoff", [1, 5, 10])
def test_recall_equals_trec_eval(ranking, cutoff):
    assert recall(*ranking, cutoff) == pytest.approx(trec_eval(*ranking, f"recall.{cutoff}"))


def test_reciprocal_rank_equals_trec_eval(ranking):
    assert mean_reciprocal_rank(*ranking) == pytest.approx(trec_eval(*ranking, "recip_rank"))


def test_equal_scores_do_not_count_as_a_perfect_ranking():
    """Hand count: with all scores equal the order is the index, so candidate 3 stands fourth."""
    assert mean_reciprocal_rank(np.zeros((1, 5)), [[3]]) == 1 / 4


def test_a_query_without_relevant_candidates_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        ndcg(np.zeros((2, 5)), [[1], []])
