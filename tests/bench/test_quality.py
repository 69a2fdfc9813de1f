"""Quality per query against pytrec_eval, cascades against exhaustive search, and the bootstrap against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from metaembed.bench.dataset import Dataset, Item
from metaembed.bench.quality import confidence_interval, judge, measure_quality, score_cascade
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage

MEASURES = {"ndcg_cut_5": "ndcg_at_5", "recall_1": "recall_at_1", "recall_10": "recall_at_10", "recip_rank": "mrr"}


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def embedded(rng):
    """Unit vectors: 5 queries of 4 vectors, 31 candidates of 6, 7 dims."""
    return tuple(_unit(rng.standard_normal(shape).astype(np.float32)) for shape in ((5, 4, 7), (31, 6, 7)))


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_metrics_equal_trec_eval_with_graded_judgements(rng):
    """Expected: pytrec_eval, NIST's own C code, on the same scores and grades."""
    scores = rng.permuted(np.tile(np.linspace(0, 1, 29), (11, 1)), axis=1)
    relevant = [{int(c): float(rng.integers(1, 4)) for c in rng.permutation(29)[: k + 1]} for k in range(11)]
    ours = judge(iter(scores), relevant)
    qrels = {f"q{k}": {f"c{c}": int(grade) for c, grade in grades.items()} for k, grades in enumerate(relevant)}
    run = {f"q{k}": {f"c{c}": float(score) for c, score in enumerate(row)} for k, row in enumerate(scores)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.5", "recall.1,10", "recip_rank"}).evaluate(run)
    for theirs_name, name in MEASURES.items():
        np.testing.assert_allclose(ours[name], [theirs[f"q{k}"][theirs_name] for k in range(11)], atol=1e-12)


def test_of_equal_scores_the_lower_index_wins():
    """Expected by hand: with all scores equal, candidate 2 of 4 has rank 3."""
    assert judge(iter(np.zeros((1, 4))), [{2: 1.0}])["mrr"][0] == pytest.approx(1 / 3)


def test_cascade_that_keeps_everything_equals_exhaustive_search(embedded):
    cascade = list(score_cascade(*embedded, [Stage(Budget(1, 1), 31), Stage(Budget(4, 6))]))
    plain = list(score_cascade(*embedded, [Stage(Budget(4, 6))]))
    np.testing.assert_array_equal(np.argsort(cascade), np.argsort(plain))


def test_cascade_ranks_survivors_by_the_last_stage_and_the_rest_behind_them(embedded):
    """Expected: float64 einsum over each stage's prefixes, survivors chosen by sorting."""
    queries, candidates = (side.astype(np.float64) for side in embedded)
    found = np.array(
        list(score_cascade(*embedded, [Stage(Budget(1, 2), 9), Stage(Budget(2, 3), 4), Stage(Budget(4, 6))]))
    )
    stages = [
        np.einsum("qid,njd->qnij", queries[:, :r], candidates[:, :s]).max(3).sum(2) for r, s in ((1, 2), (2, 3), (4, 6))
    ]
    for k in range(5):
        nine = set(np.argsort(-stages[0][k])[:9])
        four = set(sorted(nine, key=lambda c: -stages[1][k, c])[:4])
        wanted = sorted(
            range(31), key=lambda c: (c not in four, c not in nine, -_stage_score(stages, k, c, nine, four))
        )
        assert np.argsort(-found[k]).tolist() == wanted


def _stage_score(stages, k, c, nine, four):
    return stages[2 if c in four else 1 if c in nine else 0][k, c]


def test_interval_agrees_with_the_normal_approximation(rng):
    """Expected: mean +- 1.96 standard errors, which a bootstrap of many values approaches."""
    values = rng.uniform(size=2000)
    low, high = confidence_interval(values)
    error = 1.96 * values.std() / len(values) ** 0.5
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_record_names_its_budget_and_the_size_of_its_index(embedded):
    """Expected by hand: 6 vectors of 7 dims and 2 bytes."""
    items = tuple(Item(str(k), "text", None) for k in range(31))
    dataset = Dataset("made up", items, items[:5], ({0: 1.0},) * 5)
    (plain, cascade) = measure_quality(
        dataset, *embedded, [[Stage(Budget(4, 6))], [Stage(Budget(1, 1), 7), Stage(Budget(4, 6))]]
    )
    assert plain["cascade"] is None
    assert (cascade["budget"], cascade["cascade"]) == ("4,6", "1,1:7 4,6")
    assert plain["index_kib_per_item"] == 6 * 7 * 2 / 1024
    assert plain["ndcg_low"] <= plain["ndcg_at_5"] <= plain["ndcg_high"]
