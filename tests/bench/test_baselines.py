"""The untrained baselines against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from metaembed.bench.baselines import Tokens, all_tokens, last_token, load_demo_model, pooled_spans
from metaembed.bench.quality import score_cascade
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.errors import BundleError, UsageError

DIMS = 7


def _tokens(seed, lengths):
    rng = np.random.default_rng(seed)
    vectors = np.zeros((len(lengths), max(lengths), DIMS), np.float32)
    for item, length in enumerate(lengths):
        some = rng.standard_normal((length, DIMS))
        vectors[item, :length] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return Tokens(vectors, np.array(lengths))


def test_all_token_scores_ignore_padding():
    """Expected: MaxSim over the real positions alone, item by item in float64."""
    queries, candidates = _tokens(0, [3, 5]), _tokens(1, [4, 2, 6])
    asking, answering = all_tokens(queries, candidates)
    found = np.array(list(score_cascade(asking, answering, [Stage(Budget(5, 6))])))
    for q in range(2):
        for c in range(3):
            mine = queries.vectors[q, : queries.lengths[q]].astype(np.float64)
            theirs = candidates.vectors[c, : candidates.lengths[c]].astype(np.float64)
            assert found[q, c] == pytest.approx((mine @ theirs.T).max(1).sum(), abs=1e-5)


def test_pooled_spans_are_means_of_equal_parts():
    """Expected by hand: 6 positions in 3 spans are pairs; one span is the mean of all; norms are 1."""
    tokens = _tokens(2, [6])
    spans = pooled_spans(tokens, 3)[0]
    for span in range(3):
        mean = tokens.vectors[0, 2 * span : 2 * span + 2].mean(0)
        np.testing.assert_allclose(spans[span], mean / np.linalg.norm(mean), atol=1e-6)
    whole = tokens.vectors[0].mean(0)
    np.testing.assert_allclose(pooled_spans(tokens, 1)[0, 0], whole / np.linalg.norm(whole), atol=1e-6)


def test_more_spans_than_positions_repeat_positions():
    tokens = _tokens(3, [2])
    spans = pooled_spans(tokens, 5)[0]
    assert {tuple(row) for row in spans.round(5).tolist()} == {
        tuple(row) for row in tokens.vectors[0].round(5).tolist()
    }


def test_the_last_token_is_the_last_real_one():
    tokens = _tokens(4, [3, 5])
    np.testing.assert_array_equal(last_token(tokens)[:, 0], [tokens.vectors[0, 2], tokens.vectors[1, 4]])


def test_folders_without_the_demo_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no weights"):
        load_demo_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(BundleError, match="no checkpoint of the demo model"):
        load_demo_model(tmp_path)
