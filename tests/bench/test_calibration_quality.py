"""What quantising costs in ranking, from embeddings made by hand; the expected values are worked out by hand."""

from math import log2

import numpy as np
import pytest

from metaembed.bench.calibration import measure_quality
from metaembed.bench.report_tables import make_calibration
from metaembed.runtime.budget import Budget

ITEMS = 12


def directions(order):
    """Query (1, 1, 2) and candidates (12, 1, 2): unit vectors whose angle to the query grows along ``order``."""
    angles = np.empty(ITEMS)
    angles[order] = np.arange(ITEMS) * 0.1
    candidates = np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None].astype(np.float32)
    return np.array([[[1.0, 0.0]]], np.float32), candidates


def test_changes_are_paired_over_the_queries_of_all_splits():
    """Two splits of a query each. In the second, the one relevant candidate falls from first to second place."""
    straight = directions(np.arange(ITEMS))
    swapped = directions(np.array([1, 0, *range(2, ITEMS)]))
    (record,) = measure_quality([[[0]], [[0]]], [straight, straight], [straight, swapped], [Budget(1, 1)], "int8")
    lost = 1 - 1 / log2(3)
    assert record["ndcg_at_5_fp32"] == 1
    assert record["ndcg_at_5"] == pytest.approx(1 - lost / 2, abs=5e-5)
    assert record["ndcg_change_low"] == pytest.approx(-lost, abs=5e-5)  # draws of the second query alone
    assert record["ndcg_change_high"] == 0  # of the first alone
    assert record["top10_overlap"] == 1  # the same ten, in another order
    assert record["worst_cosine"] == pytest.approx(np.cos(0.1), abs=2e-5)


def test_the_table_has_the_worst_budget_with_its_interval():
    common = {
        "kind": "calibration", "contender": "own-int8", "share_of_linear_multiplies": 1.0, "top10_overlap": 0.97,
        "worst_cosine": 0.99, "ndcg_at_5_fp32": 0.9, "queries": 1500, "candidates": 500, "test_seed": "1, 2",
        "artefact": "demo", "weight_bytes": 3, "weight_bytes_source": 4,
    }  # fmt: skip
    runs = [
        common | {"budget": "1,1", "ndcg_at_5": 0.896, "ndcg_change_low": -0.006, "ndcg_change_high": -0.002},
        common | {"budget": "2,4", "ndcg_at_5": 0.899, "ndcg_change_low": -0.003, "ndcg_change_high": 0.001},
    ]
    table = make_calibration(runs)
    assert table.rows == (("own-int8", "100.0%", "0.9900", "0.970", "-0.0040 (-0.0060 to -0.0020)", "0.750"),)
    assert "2 budgets on 1,500 queries, each of 500 candidates, test seeds 1, 2" in table.note
