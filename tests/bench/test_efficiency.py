"""Costs against the paper's printed table and against limits worked out by hand."""

from __future__ import annotations

import pytest

from metaembed.bench.efficiency import REPORTED, encoder_costs, measure_scoring, scoring_costs
from metaembed.runtime.known_models import KNOWN
from metaembed.runtime.plan import find_geometry

# 2 r_c D n / 2039 GB/s for 7B and 100,000 candidates, worked out by hand.
A100_MS = {"1,1": 0.35, "2,4": 1.41, "4,8": 2.81, "8,16": 5.62, "16,64": 22.5}


def test_operations_and_index_equal_the_papers_table():
    """Expected: MetaEmbed's table 4, which rounds 0.67 GiB up."""
    costs = {cost["budget"]: cost for cost in scoring_costs("7b", KNOWN["7b"].geometry)}
    for budget, (gflop, gib, _) in REPORTED.items():
        assert costs[budget]["gflop"] == pytest.approx(gflop, rel=0.02)
        assert costs[budget]["index_gib"] == pytest.approx(gib, rel=0.02)
        assert costs[budget]["reported"]["gflop"] == gflop


def test_an_a100_cannot_score_faster_than_it_reads():
    costs = scoring_costs("7b", KNOWN["7b"].geometry)
    assert {cost["budget"]: cost["limit_ms"]["a100-80gb"] for cost in costs} == pytest.approx(A100_MS, rel=0.02)


def test_only_the_papers_model_has_reported_figures():
    assert all(cost["reported"] is None for cost in scoring_costs("3b", KNOWN["3b"].geometry))


def test_the_encoder_dominates_one_query():
    """FACTS: at 1,024 image tokens the 7B encoder does about 20 TFLOP, scoring at most 0.73."""
    largest = encoder_costs("7b", KNOWN["7b"].geometry)[-1]
    assert largest["image_tokens"] == 1024
    assert 15e3 < largest["vision_gflop"] + largest["language_gflop"] < 25e3


def test_measured_scoring_says_what_it_measured(demo_folder):
    """Expected by hand: limits of 1 GFLOP/s and 1e9 GB/s make every budget bound by 2 r_q r_c d n operations."""
    geometry = find_geometry(str(demo_folder))
    limits = {"gflops": 1.0, "read_gb_s": 1e9}
    (record, *_) = measure_scoring("demo", geometry, limits, rounds=1)
    assert record["candidates"] == 100_000
    assert record["limit_ms"] == pytest.approx(2 * 128 * 100_000 / 1e6)
    assert record["bound_by"] == "compute"
    assert record["scaled_ms"] == record["median_ms"]
