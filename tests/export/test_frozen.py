"""Graphs frozen at one side and budget: expected vectors come from the graph that serves every budget, fed the same prompts."""

from __future__ import annotations

import numpy as np
import pytest

from metaembed.export.frozen import trace_frozen
from metaembed.export.graph import attach_weights, check_operators, save_graph
from metaembed.runtime.layout import candidate_meta_tokens, lay_out_prompts
from metaembed.runtime.session_ort import OrtSession

VECTORS = 5
PROMPTS = [np.array([1, 9, 10, 11], np.int64), np.array([1, 12], np.int64)]


@pytest.fixture(scope="module")
def frozen(deep) -> OrtSession:
    model = trace_frozen(deep.geometry, "candidate", VECTORS)
    attach_weights(model, deep.refs("fp32"))
    check_operators(model)
    save_graph(model, deep.folder / "frozen.onnx")
    return OrtSession(deep.folder / "frozen.onnx", threads=1)


def feeds(deep) -> dict[str, np.ndarray]:
    """A candidate appends all three query rows and five of its own (FACTS 1)."""
    meta = candidate_meta_tokens(deep.geometry.text.vocab, deep.geometry.query_tokens, VECTORS)
    laid = lay_out_prompts(PROMPTS, [None, None], meta, VECTORS, image_token=deep.geometry.image_token_id)
    return {**laid.feeds(), "image_embeddings": np.zeros((1, 1, deep.geometry.text.hidden), np.float32)}


def test_a_frozen_graph_takes_prompts_only_and_gives_the_same_vectors(deep, frozen: OrtSession):
    given = feeds(deep)
    wanted = deep.open("language", "fp32", "fp32").run(given)["embeddings"]
    longest = max(map(len, PROMPTS))
    prompts = {name: given[name][:, :longest] for name in ("token_ids", "image_rows")}
    mine = frozen.run({**{name: given[name] for name in frozen.inputs}, **prompts})["embeddings"]
    assert set(frozen.inputs) == set(given) - {"rows"}
    assert mine.shape == (2, VECTORS, deep.geometry.dim)
    np.testing.assert_allclose(mine, wanted, atol=1e-6)


def test_a_frozen_graph_is_small(deep, frozen: OrtSession):
    assert (deep.folder / "frozen.onnx").stat().st_size < 200_000
