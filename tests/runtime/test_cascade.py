"""Cascades against the stages written out with float64 sorting, and against the full scan."""

import sqlite3

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime import maxsim_native
from metaembed.runtime.budget import Budget
from metaembed.runtime.cascade import Stage, default_cascade
from metaembed.runtime.errors import UsageError
from metaembed.runtime.index import Index
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.int8 import quantize_int8
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.screen import may_be_best

R_Q, R_C, D = 4, 8, 24


def unit(rng, *shape):
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("cascade") / "index"
    Index.create(folder, Layout.for_vectors(D, R_C))
    vectors = unit(rng, 300, R_C, D)
    ids = [f"item{i:03}" for i in range(300)]
    with Index.open(folder).writer() as writer:
        for start, end in [(0, 100), (100, 101), (101, 300)]:
            writer.add(ids[start:end], vectors[start:end])
    return folder, ids, vectors.astype(ml_dtypes.bfloat16).astype(np.float64), unit(rng, R_Q, D)


def by_hand(vectors, query, stages, k):
    """Rank, cut, and rank again, in float64."""
    left = np.arange(len(vectors))
    for r_q, r_c, keep in stages:
        similarities = query[:r_q].astype(np.float64) @ vectors[left, :r_c].swapaxes(1, 2)
        scores = similarities.max(-1).sum(-1)
        left = left[np.argsort(-scores, kind="stable")[: keep or k]]
    return left


def test_a_cascade_is_written_as_tuples_texts_or_stages(corpus):
    folder, _, _, query = corpus
    with Index.open(folder) as index:
        found = [
            index.search(query, 10, cascade=cascade)
            for cascade in (
                [Stage(Budget(1, 1), 60), Stage(Budget(2, 4), 30), Stage(Budget(4, 8))],
                [(1, 1, 60), (2, 4, 30), (4, 8)],
                ["1,1:60", "2,4:30", "4,8"],
                ((np.int64(1), 1, 60), "2,4:30", [4, 8]),
            )
        ]
        assert found[1:] == found[:1] * 3
        assert index.search(query, 3, cascade="4,8") == index.search(query, 3, cascade=[(4, 8)])


@pytest.mark.parametrize(
    "stages",
    [
        [(4, 8, None)],
        [(1, 1, 60), (4, 8, None)],
        [(1, 1, 120), (2, 4, 40), (4, 8, None)],
        [(3, 2, 30), (1, 5, None)],
        [(1, 1, 1000), (4, 8, None)],
    ],
)
def test_every_stage_is_exact(corpus, stages):
    folder, ids, vectors, query = corpus
    with Index.open(folder) as index:
        hits = index.search(query, 10, cascade=[Stage(Budget(q, c), keep) for q, c, keep in stages])
    assert [hit.id for hit in hits] == [ids[i] for i in by_hand(vectors, query, stages, 10)]


def test_a_cascade_that_keeps_everything_is_the_full_scan(corpus):
    folder, _, _, query = corpus
    with Index.open(folder) as index:
        full = index.search(query, 300, cascade=[Stage(Budget(R_Q, R_C))])
        cascade = index.search(query, 300, cascade=[Stage(Budget(1, 1), 300), Stage(Budget(R_Q, R_C))])
    assert [hit.id for hit in full] == [hit.id for hit in cascade]
    np.testing.assert_allclose([hit.score for hit in full], [hit.score for hit in cascade], atol=1e-6)


def test_the_first_stage_touches_only_its_group(corpus, monkeypatch):
    """Checksums are checked when bytes are first read: counted by group."""
    folder, _, _, query = corpus
    with Index.open(folder) as index:
        index.search(query, 10, cascade=[Stage(Budget(1, 1), 20), Stage(Budget(R_Q, R_C))])
        checked = np.concatenate([part.segment._checked for part in index.snapshot().parts])
    assert checked.sum(axis=0).tolist() == [300, 20, 20]


@pytest.mark.parametrize("spread", [1.0, 0.01])
@pytest.mark.parametrize("keep", [10, 50, 299])
def test_the_screen_never_changes_a_result(tmp_path, spread, keep):
    """Float64 by hand; items that lie so close together that int8 confuses their order are told apart all the same."""
    rng = np.random.default_rng(1)
    vectors = unit(rng, 1, R_C, D) + spread * unit(rng, 300, R_C, D)
    query = unit(rng, R_Q, D)
    Index.create(tmp_path / "index", Layout.for_vectors(D, R_C, screen=True))
    with Index.open(tmp_path / "index") as index:
        with index.writer() as writer:
            writer.add([f"item{i:03}" for i in range(300)], vectors)
            writer.delete(["item007"])
        assert index.verify() == []
        hits = index.search(query, keep, cascade=[Stage(Budget(2, 1))])
    stored = vectors.astype(ml_dtypes.bfloat16).astype(np.float64)
    expected = [i for i in by_hand(stored, query, [(2, 1, None)], keep + 1) if i != 7][:keep]
    assert [hit.id for hit in hits] == [f"item{i:03}" for i in expected]


def test_the_screen_passes_over_most_of_what_is_far():
    rng = np.random.default_rng(2)
    query, vectors = unit(rng, 1, 128), unit(rng, 5000, 1, 128)
    exact = maxsim(query, vectors)[0]
    rows = may_be_best(query, quantize_int8(vectors), np.arange(5000), 10)
    assert set(np.argsort(-exact)[:10]) <= set(rows.tolist())
    assert len(rows) < 500


def test_codes_that_overflow_leave_it_to_the_exact_pass(tmp_path):
    """Float64 by hand: 127 + 0.6 * 126 = 202.8 times 1.5e36 is finite, the 127 + 126 that its codes stand for are not."""
    vectors = np.random.default_rng(3).standard_normal((300, 1, 127)).astype(np.float32)
    vectors[123] = 1.5e36 * np.array([127] + [0.6] * 126)
    Index.create(tmp_path / "index", Layout(127, (1,), screen=True))
    with Index.open(tmp_path / "index") as index:
        with index.writer() as writer:
            writer.add([str(i) for i in range(300)], vectors)
        (hit,) = index.search(np.ones((1, 127), np.float32), 1)
    assert hit.id == "123"
    assert hit.score == pytest.approx(vectors[123].astype(ml_dtypes.bfloat16).astype(np.float64).sum(), rel=1e-5)


@pytest.mark.parametrize("where", [(), ["n=2"]], ids=["scan", "picked"])
@pytest.mark.parametrize("layout", [{}, {"screen": True}, {"storage": "int8"}], ids=["bf16", "screen", "int8"])
@pytest.mark.parametrize("kernels", [True, False])
def test_an_item_whose_similarity_overflows_is_named_by_its_id(tmp_path, monkeypatch, where, layout, kernels):
    """By hand: 4 times 3e38 is beyond float32, in the second row of the second segment; of what is deleted nothing is asked."""
    if not kernels:
        monkeypatch.setattr(maxsim_native, "library", lambda: None)
    folder = tmp_path / "index"
    Index.create(folder, Layout(1, (1,), **layout))
    with Index.open(folder).writer() as writer:
        for segment in (1, 2):
            vectors = np.ones((20, 1, 1), np.float32)
            vectors[0] = vectors[segment - 1] = 3e38
            payloads = [{"n": segment if row < 3 else 0} for row in range(20)]
            writer.add([f"page {segment}-{row}" for row in range(20)], vectors, payloads)
        writer.delete(["page 1-0", "page 2-0"])
    query = np.full((1, 1), 4, np.float32)
    says = r"^item 'page 2-1' has a similarity that is NaN or infinite"
    with Index.open(folder) as index, pytest.raises(UsageError, match=says):
        index.search(query, 3, where=where)


def test_an_item_without_a_readable_id_is_named_by_its_row_or_left_out(tmp_path):
    folder = tmp_path / "index"
    Index.create(folder, Layout(1, (1,)))
    with Index.open(folder).writer() as writer:
        writer.add(["a", "b", "c"], np.array([1, 3e38, 2], np.float32)[:, None, None])
    (path,) = (folder / "segments").iterdir()
    with sqlite3.connect(folder / "catalogue.sqlite") as connection:
        connection.execute("UPDATE items SET id = 'x' WHERE id = 'b'")
    connection.close()
    query = np.full((1, 1), 4, np.float32)
    with Index.open(folder) as index, pytest.raises(UsageError, match=f"^row 1 of {path} has a similarity"):
        index.search(query)
    with Index.open(folder, skip_damaged=True) as index:
        assert [hit.id for hit in index.search(query)] == ["c", "a"]


def test_default_cascade_is_the_full_scan_while_small_and_keeps_a_tenth_beyond():
    largest = Budget(16, 64)
    assert default_cascade(10_000, largest) == (Stage(largest),)
    assert default_cascade(10_001, largest) == (Stage(Budget(4, 8), 1000), Stage(largest))
    assert default_cascade(10**6, largest) == (Stage(Budget(4, 8), 10**5), Stage(largest))
    assert default_cascade(10**6, Budget(2, 4)) == (Stage(Budget(2, 4)),)


def test_stages_read_and_print_alike():
    assert Stage.parse(" 1,1:1000 ") == Stage(Budget(1, 1), 1000)
    assert [str(Stage.parse(text)) for text in ("4,8:100", "16,64")] == ["4,8:100", "16,64"]
    for text in ("1:1000", "1,1:", "1,1:x", "", "1,1:0"):
        with pytest.raises(UsageError):
            Stage.parse(text)
