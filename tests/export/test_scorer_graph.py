"""The scorer graph in ONNX Runtime, against MaxSim spelled out in float64."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from metaembed.export.scorer import make_scorer, write_scorer
from metaembed.runtime.budget import Budget
from metaembed.runtime.errors import UsageError
from metaembed.runtime.golden import golden_path, read_golden
from metaembed.runtime.graph_maxsim import Scorer, chunk_size, maxsim_by_graph
from metaembed.runtime.manifest import SCORER, Bundle
from metaembed.runtime.session_ort import OrtSession

q, n, d = 3, 11, 7
TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def embeddings(seed, shape, kind):
    values = np.random.default_rng(seed).standard_normal(shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(kind)


def maxsim_float64(queries, candidates):
    """The definition, pair by pair (arXiv 2004.12832, section 3.3)."""
    queries, candidates = queries.astype(np.float64), candidates.astype(np.float64)
    return np.array([[(a @ b.T).max(1).sum() for b in candidates] for a in queries])


@pytest.fixture
def scorer(tmp_path):
    def make(budget=None, precision="bf16"):
        write_scorer(tmp_path, d, budget, precision)
        return OrtSession(tmp_path / "scorer.onnx")

    return make


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(2, 5), Budget(16, 64)], ids=str)
def test_scores_equal_the_definition_in_float64(scorer, budget, precision):
    kind = TYPES[precision]
    queries, candidates = embeddings(0, (q, budget.query, d), kind), embeddings(1, (n, budget.candidate, d), kind)
    for session in (scorer(budget, precision), scorer(None, precision)):
        scores = maxsim_by_graph(session, queries, candidates)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, maxsim_float64(queries, candidates), atol=3e-6 * budget.query)


def test_bf16_products_are_not_rounded_again(scorer):
    """1.0078125 squared is 1.01568603515625: bf16 would keep 1.015625."""
    value = np.full((1, 1, d), 0, ml_dtypes.bfloat16)
    value[0, 0, 0] = 1.0078125
    assert maxsim_by_graph(scorer(), value, value)[0, 0] == np.float32(1.0078125) ** 2


@pytest.mark.parametrize("memory", [700, 2000, 1 << 20])
def test_chunks_do_not_change_scores(scorer, memory):
    queries, candidates = embeddings(2, (q, 2, d), np.float32), embeddings(3, (n, 5, d), np.float32)
    session = scorer(None, "fp32")
    whole = maxsim_by_graph(session, queries, candidates)
    np.testing.assert_array_equal(maxsim_by_graph(session, queries, candidates, memory_bytes=memory), whole)


def test_chunk_size_is_the_memory_over_the_bytes_of_one_candidate():
    """By hand: r_c d (2 + 4) = 5 * 7 * 6 = 210; dots and maxima 4 * 3 * 2 * 6 = 144."""
    assert chunk_size(354 * 9 + 353, q, 2, 5, d) == 9
    with pytest.raises(UsageError, match="354 bytes for one candidate"):
        chunk_size(353, q, 2, 5, d)


def test_a_fixed_budget_refuses_other_sizes(scorer):
    session = scorer(Budget(2, 5), "fp32")
    with pytest.raises(Exception, match="invalid dimensions"):
        maxsim_by_graph(session, embeddings(0, (q, 3, d), np.float32), embeddings(1, (n, 5, d), np.float32))


def test_graph_is_one_gemm_and_two_reductions():
    model = make_scorer(d)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMul") == 1
    assert [kind for kind in kinds if kind.startswith("Reduce")] == ["ReduceMax", "ReduceSum"]


def test_more_queries_than_one_run_takes_are_scored_in_groups(scorer):
    queries, candidates = embeddings(4, (70, 2, d), np.float32), embeddings(5, (n, 5, d), np.float32)
    scores = maxsim_by_graph(scorer(None, "fp32"), queries, candidates)
    np.testing.assert_allclose(scores, maxsim_float64(queries, candidates), atol=1e-5)


def test_a_session_with_a_limit_gets_chunks_within_it(scorer):
    session = scorer(None, "fp32")
    seen = []

    class Limited:
        inputs, max_items = session.inputs, 4

        def run(self, feeds):
            seen.append(len(feeds["candidates"]))
            return session.run(feeds)

    queries, candidates = embeddings(2, (q, 2, d), np.float32), embeddings(3, (n, 5, d), np.float32)
    scores = maxsim_by_graph(Limited(), queries, candidates)
    np.testing.assert_allclose(scores, maxsim_float64(queries, candidates), atol=1e-5)
    assert seen == [4, 4, 3]


def test_every_bundle_carries_its_scorer_and_it_scores(demo_bundle):
    """In the bundle's own type, hashed by the manifest, and against float64 on the golden vectors themselves."""
    bundle = Bundle.open(demo_bundle)
    assert SCORER in bundle.manifest.files
    queries, candidates = (read_golden(bundle.path(golden_path(side)))[1] for side in ("query", "candidate"))
    with Scorer.open(bundle) as scorer:
        assert scorer.dtype == np.float32
        scores = scorer.scores(queries, candidates)
    np.testing.assert_allclose(scores, maxsim_float64(queries, candidates), atol=1e-5)


def test_the_scorer_is_no_part_of_what_an_index_remembers(demo_bundle):
    """Bundles older than the scorer keep their fingerprint when they are exported again."""
    manifest = Bundle.open(demo_bundle, verify=False).manifest
    older = {name: record for name, record in manifest.files.items() if name != SCORER}
    assert replace(manifest, files=older).fingerprint == manifest.fingerprint
