"""Scanning in chunks: against float64 by hand, against scanning at once, and the memory that it takes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaembed.runtime import index_scan, maxsim_native
from metaembed.runtime.index import Index, Part, Snapshot
from metaembed.runtime.index_layout import Layout

SIZES = (97, 1, 60, 200)
R_C, D = 3, 4
CONSTANTS = ("index_scan.CHUNK_ITEMS", "contenders.BITE", "contenders.SURPLUS", "contenders.DESCRIBED")
small = st.tuples(st.integers(2, 400), st.integers(1, 100), st.integers(1, 60), st.integers(1, 50))


def cut(patch, values):
    """Lower the constants on which no result may depend."""
    for name, value in zip(CONSTANTS, values, strict=True):
        patch.setattr(f"metaembed.runtime.{name}", value)


def fill(folder, layout, ids, vectors, sizes=SIZES, deleted=()):
    Index.create(folder, layout)
    with Index.open(folder).writer() as writer:
        start = 0
        for size in sizes:
            rows = range(start, start := start + size)
            writer.add([ids[i] for i in rows], vectors[rows.start : rows.stop], [{"n": i} for i in rows])
        writer.delete(deleted)


@pytest.fixture(scope="module", params=[False, True], ids=["", "screen"])
def tied(request, tmp_path_factory):
    """Vectors of -1, 0 and 1: float32 adds their products exactly, so equal items tie. A fifth is deleted."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, (sum(SIZES), R_C, D)).astype(np.float32)
    vectors[120:260] = vectors[120]
    ids = [f"item{i:03}" for i in rng.permutation(sum(SIZES))]
    gone = {ids[i] for i in rng.permutation(sum(SIZES))[: sum(SIZES) // 5]}
    folder = tmp_path_factory.mktemp("tied") / "index"
    fill(folder, Layout(D, (1, R_C), screen=request.param), ids, vectors, deleted=gone)
    return folder, ids, vectors, gone


def by_hand(vectors, ids, left, query, stages):
    """(id, score) of the last stage's best: every stage sorts by float64 score, then by id."""
    for r_q, r_c, keep in stages:
        similarities = query[:r_q].astype(np.float64) @ vectors[:, :r_c].astype(np.float64).swapaxes(1, 2)
        scores = similarities.max(-1).sum(-1)
        left = sorted(left, key=lambda i: (-scores[i], ids[i]))[:keep]
    return [(ids[i], scores[i]) for i in left]


@settings(max_examples=60, deadline=None)
@given(small, st.integers(1, 400), st.integers(1, 400), st.sampled_from([0, 60, 300]), st.integers(0, 3))
def test_chunks_find_what_float64_finds_by_hand(tied, constants, keep, k, first, seed):
    """Ties, deletions, several segments, conditions that leave much or little, more kept than a chunk holds."""
    folder, ids, vectors, gone = tied
    query = np.random.default_rng(seed).integers(-1, 2, (2, D)).astype(np.float32)
    k = min(k, keep)
    for stages in ([(1, 1, k)], [(1, 1, keep), (2, 3, k)]):
        living = [i for i in range(first, len(ids)) if ids[i] not in gone]
        with pytest.MonkeyPatch.context() as patch, Index.open(folder) as index:
            cut(patch, constants)
            hits = index.search(query, k, cascade=stages, where=[f"n>={first}"] if first else [])
        assert [(hit.id, hit.score) for hit in hits] == by_hand(vectors, ids, living, query, stages)


@pytest.mark.skipif(maxsim_native.library() is None, reason="BLAS rounds items by where they lie in its tiles")
@pytest.mark.parametrize("storage", ["bf16", "int8", "screen"])
def test_chunks_change_no_bit_of_a_score(tmp_path, storage):
    """Expected: the same search with all items in one chunk."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((sum(SIZES), 5, 40)).astype(np.float32)
    layout = Layout(40, (1, 5), "bf16" if storage == "screen" else storage, screen=storage == "screen")
    fill(tmp_path / "i", layout, [str(i) for i in range(len(vectors))], vectors, deleted=["7", "300"])
    query = rng.standard_normal((3, 40)).astype(np.float32)

    def found():
        with Index.open(tmp_path / "i") as index:
            return [
                [(hit.id, hit.score) for hit in index.search(query, k, cascade=cascade)]
                for k, cascade in [(3, "2,1"), (350, "3,5"), (20, ["1,1:150", "3,5"])]
            ]

    expected = found()
    assert [len(hits) for hits in expected] == [3, 350, 20]
    for constants in [(7, 3, 2, 2), (100, 16, 5, 5), (101, 1000, 1, 1)]:
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, constants)
            assert found() == expected


@pytest.mark.parametrize("screen", [False, True])
def test_damaged_items_are_left_out_of_every_chunk(tmp_path, monkeypatch, screen):
    """The three best are damaged, in three chunks; expected by hand from the others."""
    rng = np.random.default_rng(2)
    vectors = rng.integers(-3, 4, (300, 1, 16)).astype(np.float32)
    query = vectors[5, :1]
    vectors[[20, 130, 270]] = 4 * query
    ids = [f"item{i:03}" for i in range(300)]
    folder = tmp_path / "i"
    fill(folder, Layout(16, (1,), screen=screen), ids, vectors, (300,))
    (path,) = (folder / "segments").iterdir()
    content = bytearray(path.read_bytes())
    for row in (20, 130, 270):
        content[8 + int.from_bytes(content[:8], "little") + row * 16 * 2] ^= 1
    path.write_bytes(content)
    cut(monkeypatch, (100, 30, 5, 5))
    with Index.open(folder, skip_damaged=True) as index:
        hits = index.search(query, 9, cascade="1,1")
    left = [i for i in range(300) if i not in (20, 130, 270)]
    assert [(hit.id, hit.score) for hit in hits] == by_hand(vectors, ids, left, query, [(1, 1, 9)])


def test_small_segments_are_scored_together_and_large_ones_in_chunks(tmp_path, monkeypatch):
    """Counted by hand, in what one call scores: waking threads for each of many segments took longer than scoring them."""
    folder, vectors = tmp_path / "i", np.ones((50, 1, D), np.float32)
    fill(folder, Layout(D, (1,)), [str(i) for i in range(50)], vectors, (8, 8, 8, 20, 6))
    calls = []
    real = index_scan.score_parts

    def counted(queries, parts):
        calls.append([groups[0].shape[0] for groups, _ in parts])
        return real(queries, parts)

    monkeypatch.setattr("metaembed.runtime.index_scan.score_parts", counted)
    with Index.open(folder) as index:
        index.search(vectors[0], 3, cascade="1,1")
        monkeypatch.setattr("metaembed.runtime.index_scan.CHUNK_ITEMS", 16)
        index.search(vectors[0], 3, cascade="1,1")
    assert calls == [[8, 8, 8, 20, 6], [8, 8], [8, 16], [4, 6]]


def peak_mib(run):
    """What a call held at most; numpy's arrays and Python's objects, as both report to tracemalloc."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module", params=[False, True], ids=["", "screen"])
def many(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "index"
    vectors = np.random.default_rng(3).standard_normal((50_000, 1, 32)).astype(np.float32)
    Index.create(folder, Layout(32, (1,), screen=request.param))
    with Index.open(folder).writer() as writer:
        writer.add([f"{i:06}" for i in range(len(vectors))], vectors)
    return folder, vectors


@pytest.mark.parametrize("cascade", ["1,1", ["1,1:20000", "2,1"]])
def test_the_memory_of_a_search_does_not_grow_with_the_index(many, cascade):
    """3 million items, one segment over and over. The target is 16 MB a thread; all items at once took 13 bytes each, and
    their scores alone would take 11 MiB."""
    folder, vectors = many
    query = vectors[:2, 0]
    with Index.open(folder) as index:
        index.search(query, 5, cascade=cascade)  # compares checksums
        (part,) = index.snapshot().parts
        parts = [Part(part.number, part.segment, part.alive, i * part.segment.items) for i in range(60)]
        index._snapshot = Snapshot(parts)
        assert len(index) == 3_000_000
        assert peak_mib(lambda: index.search(query, 5, cascade=cascade)) < 8


def test_what_a_chunk_takes_is_given_back_before_the_next(many, monkeypatch):
    """50,000 items of one segment, 2,000 at once. All at once took 0.9 MiB, and 1.7 through the screen."""
    folder, vectors = many
    cut(monkeypatch, (2000, 1000, 500, 200))
    with Index.open(folder, verify=False) as index:
        assert peak_mib(lambda: index.search(vectors[0], 5, cascade="1,1")) < 0.15


def test_the_memory_of_comparing_checksums_does_not_grow_with_the_index(many, monkeypatch):
    folder, vectors = many
    monkeypatch.setattr("metaembed.runtime.index_segment.CHECKED", 1000)
    with Index.open(folder) as index:
        # 9 bytes an item for the scan of one chunk; all items' checksums at once took 56 more.
        assert peak_mib(lambda: index.search(vectors[0], 5, cascade="1,1")) < 2


def test_items_that_tie_take_no_memory_of_their_own(tmp_path, monkeypatch):
    """6,000 equal items: the smallest ids are found although few of them are held. All ids at once took 3.5 MiB."""
    ids = [f"{i:05}" for i in np.random.default_rng(4).permutation(6000)]
    fill(tmp_path / "i", Layout(D, (1,)), ids, np.ones((6000, 1, D), np.float32), (6000,))
    cut(monkeypatch, (1000, 500, 100, 50))
    found = []
    with Index.open(tmp_path / "i", verify=False) as index:
        query = np.ones((1, D), np.float32)
        assert peak_mib(lambda: found.extend(index.search(query, 30, cascade="1,1"))) < 0.15
    assert [hit.id for hit in found] == sorted(ids)[:30]
